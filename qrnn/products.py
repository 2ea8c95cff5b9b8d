"""Matrix products in the fastest library at hand. Axes: N rows, n input channels, m output channels.

torch takes float32 products on a CPU to MKL, which keeps its fast kernels for Intel's processors: on an AMD EPYC they
ran at 220 to 240 GFLOP/s where oneDNN's ran at 500. oneDNN's are in torch too, but only its compiler calls them.
"""

import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

PIECE = 6 << 20  # bytes of an accumulated product that lie between product and sum at once, in the cache


def _vendor() -> str:
    """The processor's maker as the system tells it, GenuineIntel or AuthenticAMD for example."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor()
    return next((line for line in info.read_text().splitlines() if line.startswith("vendor_id")), "")


ONEDNN = (
    torch.backends.mkl.is_available()
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    and "Intel" not in _vendor()
)
"""Whether float32 products on the CPU go to oneDNN."""


def times(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a b + bias, (N, m), of a (N, n), b (n, m) and bias (m,) in one dtype, with any strides."""
    if _to_onednn(a) and not torch.is_grad_enabled():  # oneDNN's operator has no gradient
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")
    return a @ b if bias is None else torch.addmm(bias, a, b)


def add_times(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a b, in place, of out (N, m), a (N, n) and b (n, m)."""
    if not _to_onednn(a) or torch.is_grad_enabled():
        out.addmm_(a, b)
        return
    pieces = -(-out.numel() * out.element_size() // PIECE)
    for into, rows in zip(out.chunk(pieces), a.chunk(pieces), strict=True):
        into.add_(times(rows, b))


class Linear(nn.Linear):
    """nn.Linear with its product in the fastest library."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., m) of x (..., n)."""
        if not _to_onednn(x) or torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        return _Affine.apply(x.reshape(-1, x.shape[-1]), self.weight, self.bias).view(*x.shape[:-1], -1)


class _Affine(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return times(x, weight.t(), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias = inputs
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        return (
            times(grad, weight) if needs_x else None,
            times(grad.t(), x) if needs_weight else None,
            grad.sum(0) if ctx.has_bias else None,
        )


def _to_onednn(a: Tensor) -> bool:
    wanted = ONEDNN and a.device.type == "cpu" and a.dtype == torch.float32 and a.numel() > 0
    if not wanted or torch.compiler.is_compiling():
        return False
    return bool(torch.backends.mkldnn.enabled) and not torch._C._are_functorch_transforms_active()

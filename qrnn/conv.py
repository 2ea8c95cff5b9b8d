"""Convolution over time without an unfolded copy of the input (section 2, eq. 1 and 2).

Axes: T time steps, B batch rows, n input channels, m output channels, k filter width. In (T, B, n) the input
shifted by a step is an offset view, so a filter of width k is k matrix products accumulating into one output.
"""

from typing import Any

import torch
from torch import Tensor


def conv_over_time(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, tail: Tensor | None = None, causal: bool = True
) -> Tensor:
    """y_t = bias + sum over j of x_{t - k + 1 + j} weight_j, the masked convolution of eq. 1; or the unmasked
    one.

    Args:
        x: (T, B, n).
        weight: (k, n, m); weight[k - 1] meets the current step, weight[0] the oldest.
        bias: (m,) or None.
        tail: (k - 1, B, n), the inputs just before x; zeros if None. Only with `causal`.
        causal: if false, the k - 1 steps of zero padding are divided over both sides, and where k is even the
            extra one is
            on the left: y_t then sees x_{t - ceil((k - 1) / 2)} to x_{t + floor((k - 1) / 2)}.

    Returns:
        y (T, B, m), contiguous. Under autocast the operands are cast to autocast's dtype and so is y.

    Raises:
        ValueError: a shape that does not fit, or a tail with causal=False.
    """
    padded = _padded(x, weight, tail, causal)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        padded, weight, bias = padded.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return _OffsetProducts.apply(padded, weight, bias)


def next_tail(x: Tensor, tail: Tensor | None, kernel_size: int, lengths: Tensor | None = None) -> Tensor:
    """The last k - 1 inputs of every row: what the next window's causal convolution needs, (k - 1, B, n).

    Args:
        x: (T, B, n), this window. tail: (k - 1, B, n), the inputs before it; zeros if None.
        lengths: (B,) int64, the steps of each row that count; all T if None.
    """
    width = kernel_size - 1
    if lengths is None and x.shape[0] >= width:
        return x[x.shape[0] - width :].clone()  # a view would keep the whole window's input alive
    known = torch.cat([x.new_zeros((width, *x.shape[1:])) if tail is None else tail.to(x.dtype), x])
    if lengths is None:
        return known[x.shape[0] :].clone()
    steps = lengths + torch.arange(width, device=x.device).unsqueeze(-1)  # (k - 1, B)
    return known.gather(0, steps.unsqueeze(-1).expand(-1, -1, x.shape[2]))


def _padded(x: Tensor, weight: Tensor, tail: Tensor | None, causal: bool) -> Tensor:
    """x with k - 1 further steps, (T + k - 1, B, n)."""
    if x.dim() != 3 or weight.dim() != 3 or x.shape[2] != weight.shape[1]:
        raise ValueError(f"x: expected (T, B, n = {weight.shape[1]}) for a weight (k, n, m), got {tuple(x.shape)}")
    width = weight.shape[0] - 1
    shape = (width, *x.shape[1:])
    if tail is not None and not causal:
        raise ValueError("tail: expected None with causal=False, got a tensor: an unmasked convolution carries nothing")
    if tail is not None and tail.shape != shape:
        raise ValueError(f"tail: expected (k - 1, B, n) = {shape}, got {tuple(tail.shape)}")
    if width == 0:
        return x
    if causal:
        return torch.cat([x.new_zeros(shape) if tail is None else tail.to(x.dtype), x])
    return torch.nn.functional.pad(x, (0, 0, 0, 0, width - width // 2, width // 2))


class _OffsetProducts(torch.autograd.Function):
    """k matrix products of offset views, accumulating in place in both directions."""

    @staticmethod
    def forward(padded: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        steps, rows = padded.shape[0] - weight.shape[0] + 1, padded.shape[1]
        first = padded[:steps].reshape(steps * rows, -1)
        y = first @ weight[0] if bias is None else torch.addmm(bias, first, weight[0])
        for j in range(1, weight.shape[0]):
            y.addmm_(padded[j : j + steps].reshape(steps * rows, -1), weight[j])
        return y.view(steps, rows, -1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        padded, weight, bias = inputs
        ctx.save_for_backward(padded, weight)
        ctx.has_bias = bias is not None

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        padded, weight = ctx.saved_tensors
        steps, rows, outputs = grad.shape
        flat = grad.reshape(steps * rows, outputs)
        grad_padded = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_padded = torch.zeros_like(padded)
            for j in range(weight.shape[0]):
                grad_padded[j : j + steps].view(steps * rows, -1).addmm_(flat, weight[j].t())
        if ctx.needs_input_grad[1]:
            windows = (padded[j : j + steps].reshape(steps * rows, -1) for j in range(weight.shape[0]))
            grad_weight = torch.stack([window.t() @ flat for window in windows])
        return grad_padded, grad_weight, flat.sum(0) if ctx.has_bias else None

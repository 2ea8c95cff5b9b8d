"""Convolution over time without an unfolded copy of the input (section 2, eq. 1 and 2).

Axes: T time steps, B batch rows, n input channels, m output channels, k filter width. In (T, B, n) the input
shifted by a step is an offset view, so a filter of width k is k matrix products accumulating into one output.
Steps before the first and beyond the last are zeros that are never stored.
"""

from typing import Any

import torch
from torch import Tensor

from .products import add_times, times


def conv_over_time(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    tail: Tensor | None = None,
    causal: bool = True,
    extra_padding: str = "left",
    plain: bool = False,
) -> Tensor:
    """y_t = bias + sum over j of x_{t - k + 1 + j} weight_j, the masked convolution of eq. 1; or the unmasked
    one.

    Args:
        x: (T, B, n).
        weight: (k, n, m); weight[k - 1] meets the current step, weight[0] the oldest.
        bias: (m,) or None.
        tail: (k - 1, B, n), the inputs just before x; zeros if None. Only with `causal`.
        causal: if false, the k - 1 steps of zero padding are divided over both sides (section 3.3 has it so,
            without saying how).
        extra_padding: "left" or "right", the side of the odd step where k is even and the filter unmasked. On
            the left y_t sees x_{t - ceil((k - 1) / 2)} to x_{t + floor((k - 1) / 2)}, on the right the reverse.
        plain: by torch's differentiable operations, with a padded copy of x, as within a torch.func transform.

    Returns:
        y (T, B, m), contiguous. Under autocast the operands are cast to autocast's dtype and so is y.

    Raises:
        ValueError: a shape or dtype that does not fit, a tail with causal=False, or padding on no such side.
    """
    _check(x, weight, tail, causal)
    check_extra_padding(extra_padding, causal)
    dtype = product_dtype(x, weight)
    if dtype != weight.dtype:
        weight = weight.to(dtype)
    if bias is not None and dtype != bias.dtype:
        bias = bias.to(dtype)
    width = weight.shape[0] - 1
    before = None if tail is None or width == 0 else tail.to(dtype).contiguous()
    left = width if causal else width // 2 if extra_padding == "right" else width - width // 2
    if plain or (not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()):
        return _padded_products(x.to(dtype), before, weight, bias, left)
    return _OffsetProducts.apply(x.to(dtype).contiguous(), before, weight, bias, left)


def product_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype in which x meets the weights: autocast's where it acts, as for torch's own products, else theirs.

    Raises:
        ValueError: x and the weights differ in dtype, without autocast.
    """
    # As torch's own products do, doubles stay doubles; and the meta device, which has no autocast, may not be asked.
    if x.dtype != torch.float64 and x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    if x.dtype != weight.dtype:
        raise ValueError(f"x: expected dtype {weight.dtype}, as the weights, got {x.dtype}")
    return x.dtype


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


def check_extra_padding(side: str, causal: bool) -> None:
    """Raises ValueError unless the side is "left", or "right" of an unmasked filter."""
    if side not in ("left", "right"):
        raise ValueError(f"extra_padding: expected left or right, got {side!r}")
    if side == "right" and causal:
        raise ValueError("extra_padding: expected left with causal=True, whose padding is on the left, got 'right'")


def _check(x: Tensor, weight: Tensor, tail: Tensor | None, causal: bool) -> None:
    if x.dim() != 3 or weight.dim() != 3 or x.shape[2] != weight.shape[1]:
        raise ValueError(f"x: expected (T, B, n = {weight.shape[1]}) for a weight (k, n, m), got {tuple(x.shape)}")
    shape = (weight.shape[0] - 1, *x.shape[1:])
    if tail is not None and not causal:
        raise ValueError("tail: expected None with causal=False, got a tensor: an unmasked convolution carries nothing")
    if tail is not None and tail.shape != shape:
        raise ValueError(f"tail: expected (k - 1, B, n) = {shape}, got {tuple(tail.shape)}")


def _overlaps(steps: int, width: int, left: int, has_tail: bool) -> list[tuple[int, bool, int, int, int]]:
    """(j, whether it reads the tail, first step read, first step written, steps) of each product but the one with
    weight[left], which meets every step in its own place."""
    found = []
    for j in range(width):
        shift = j - left
        if shift and abs(shift) < steps:
            found.append((j, False, max(0, shift), max(0, -shift), steps - abs(shift)))
        if shift < 0 and has_tail:
            found.append((j, True, j, 0, min(-shift, steps)))
    return found


def _padded_products(x: Tensor, tail: Tensor | None, weight: Tensor, bias: Tensor | None, left: int) -> Tensor:
    """What `_OffsetProducts` gives, out of place."""
    width = weight.shape[0] - 1
    before = x.new_zeros((left, *x.shape[1:])) if tail is None else tail
    padded = torch.cat([before, x, x.new_zeros((width - left, *x.shape[1:]))])
    products = [padded[j : j + x.shape[0]] @ weight[j] for j in range(width + 1)]
    return sum(products[1:], start=products[0] if bias is None else products[0] + bias)


class _OffsetProducts(torch.autograd.Function):
    """Matrix products of offset views, accumulating in place in both directions; x is neither padded nor copied."""

    @staticmethod
    def forward(x: Tensor, tail: Tensor | None, weight: Tensor, bias: Tensor | None, left: int) -> Tensor:
        y = times(x.flatten(0, 1), weight[left], bias).view(*x.shape[:2], weight.shape[2])
        for j, in_tail, first, to, count in _overlaps(x.shape[0], weight.shape[0], left, tail is not None):
            source = tail if in_tail and tail is not None else x
            add_times(y[to : to + count].flatten(0, 1), source[first : first + count].flatten(0, 1), weight[j])
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, tail, weight, bias, ctx.left = inputs
        ctx.save_for_backward(x, tail, weight)
        ctx.has_bias = bias is not None

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, tail, weight = ctx.saved_tensors
        grad = grad.contiguous()
        flat, overlaps = grad.flatten(0, 1), _overlaps(x.shape[0], weight.shape[0], ctx.left, tail is not None)
        needs_x, needs_tail, needs_weight, *_ = ctx.needs_input_grad
        grad_x = times(flat, weight[ctx.left].t()).view(x.shape) if needs_x else None
        grad_tail = torch.zeros_like(tail) if needs_tail else None
        grad_weight = torch.zeros_like(weight) if needs_weight else None
        if grad_weight is not None:
            add_times(grad_weight[ctx.left], x.flatten(0, 1).t(), flat)
        for j, in_tail, first, to, count in overlaps:
            source, into = (tail, grad_tail) if in_tail else (x, grad_x)
            part = grad[to : to + count].flatten(0, 1)
            if into is not None:
                add_times(into[first : first + count].flatten(0, 1), part, weight[j].t())
            if grad_weight is not None:
                add_times(grad_weight[j], source[first : first + count].flatten(0, 1).t(), part)
        return grad_x, grad_tail, grad_weight, flat.sum(0) if ctx.has_bias else None, None

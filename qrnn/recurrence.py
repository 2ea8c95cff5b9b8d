"""An LSTM's recurrence with noise, after its input's products: the definition, and its gradient written out.

Axes: T time steps, B batch rows, m hidden size. Gates lie side by side in torch's order: input, forget, cell, output.

Both functions take
    inputs: (T, B, 4m), W x + b of all steps.
    h, c: (B, m), before the first step.
    weight: (4m, m), of h.
    mask: (B, m) factors of h on its way into the gates, the same at all steps; None for 1.
    stays: (T, 2, B, m) bool, where c (at 0) and h (at 1) keep the value of the step before; None for nowhere.
and return (h after each step (T, B, m), c after the last (B, m)).
"""

from typing import Any

import torch
from torch import Tensor


def by_steps(
    inputs: Tensor,
    h: Tensor,
    c: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    stays: Tensor | None,
    share: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The definition, step by step, differentiated by autograd. `share` of every new value is the one before."""
    outputs = []
    for t, gates in enumerate(inputs.unbind(0)):
        i, f, g, o = torch.addmm(gates, h if mask is None else h * mask, weight.t()).to(c.dtype).chunk(4, dim=-1)
        new_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        new_h = o.sigmoid() * new_c.tanh()
        if share:
            new_c, new_h = torch.lerp(new_c, c, share), torch.lerp(new_h, h, share)
        if stays is not None:
            new_c, new_h = torch.where(stays[t, 0], c, new_c), torch.where(stays[t, 1], h, new_h)
        h, c = new_h, new_c
        outputs.append(h)
    return torch.stack(outputs), c


def with_gradient(
    inputs: Tensor, h: Tensor, c: Tensor, weight: Tensor, mask: Tensor | None, stays: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`by_steps` in fewer operations, for training: the weight's gradient is one product for all steps."""
    return _Recurrence.apply(inputs, h.to(inputs.dtype), c.to(inputs.dtype), weight, mask, stays)


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        h: Tensor,
        c: Tensor,
        weight: Tensor,
        mask: Tensor | None,
        stays: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        steps, rows, size = inputs.shape[0], *h.shape
        gates = inputs.new_empty(inputs.shape)  # contiguous, whatever the strides of inputs
        states, cells = (inputs.new_empty((steps + 1, rows, size)) for _ in range(2))  # before each step, and after all
        squashed = torch.empty_like(states[1:])  # tanh of c before it may stay
        states[0], cells[0] = h, c
        for t in range(steps):
            seen = states[t] if mask is None else states[t] * mask
            torch.addmm(inputs[t], seen, weight.t(), out=gates[t])
            gates[t, :, : 2 * size].sigmoid_()
            gates[t, :, 2 * size : 3 * size].tanh_()
            gates[t, :, 3 * size :].sigmoid_()
            i, f, g, o = gates[t].chunk(4, dim=-1)
            torch.mul(f, cells[t], out=cells[t + 1]).addcmul_(i, g)
            torch.tanh(cells[t + 1], out=squashed[t])
            torch.mul(o, squashed[t], out=states[t + 1])
            if stays is not None:
                cells[t + 1] = torch.where(stays[t, 0], cells[t], cells[t + 1])
                states[t + 1] = torch.where(stays[t, 1], states[t], states[t + 1])
        ctx.save_for_backward(gates, states, cells, squashed, weight, mask, stays)
        return states[1:].clone(), cells[-1].clone()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, grad_c: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            gradients = _Recurrence._gradients(ctx, grad_output, grad_c)
        if torch.is_grad_enabled():  # create_graph=True: as constants they would make a second derivative wrong
            gradients = _Undifferentiable.apply(torch.ones(1, requires_grad=True), *gradients)
        return *gradients, None, None

    @staticmethod
    def _gradients(ctx: Any, grad_output: Tensor, grad_c: Tensor) -> tuple[Tensor, ...]:
        """Of inputs, h, c and weight."""
        gates, states, cells, squashed, weight, mask, stays = ctx.saved_tensors
        i, f, g, o = gates.chunk(4, dim=-1)
        steps, rows, size = squashed.shape
        # Derivatives of c by the first three gates before their functions, of h by the fourth and by c.
        of_c = torch.stack([g * i * (1 - i), cells[:-1] * f * (1 - f), i * (1 - g * g)], dim=2)  # (T, B, 3, m)
        of_h, through = squashed * o * (1 - o), o * (1 - squashed * squashed)
        grads = torch.empty_like(gates).view(steps, rows, 4, size)
        grad_h = torch.zeros_like(grad_c)
        for t in range(steps - 1, -1, -1):
            grad_h = grad_h + grad_output[t]
            kept_c = kept_h = None
            if stays is not None:
                kept_c, kept_h = grad_c * stays[t, 0], grad_h * stays[t, 1]
                grad_c, grad_h = grad_c - kept_c, grad_h - kept_h
            grad_c = torch.addcmul(grad_c, grad_h, through[t])
            torch.mul(grad_c.unsqueeze(1), of_c[t], out=grads[t, :, :3])
            torch.mul(grad_h, of_h[t], out=grads[t, :, 3])
            grad_c = grad_c * f[t]
            grad_h = grads[t].flatten(1) @ weight
            grad_h = grad_h if mask is None else grad_h * mask
            if kept_c is not None and kept_h is not None:
                grad_c, grad_h = grad_c + kept_c, grad_h + kept_h
        seen = states[:-1] if mask is None else states[:-1] * mask
        grad_weight = grads.view(-1, 4 * size).t() @ seen.flatten(0, 1)
        return grads.view_as(gates), grad_h, grad_c, grad_weight


class _Undifferentiable(torch.autograd.Function):
    """Tensors as they are, behind one that requires a gradient."""

    @staticmethod
    def forward(ctx: Any, _: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError(
            "VariationalLSTM: in training it has first derivatives only, got a request for the second;"
            " evaluation on a CPU, or with zoneout, has both"
        )

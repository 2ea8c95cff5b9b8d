"""A layer that reads its rows in both directions. Axes: T time steps, B batch rows, n input size, m hidden size."""

from typing import Any

import torch
from torch import Tensor, nn

from .layer import Mode, QRNNLayer, QRNNLayerState, reverse_steps


class BidirectionalLayer(nn.Module):
    """Two layers with the interface of one: `ahead` reads each row forwards, `back` from the row's own end.

    Outputs, gates and every tensor of the state hold the two side by side in the last axis, `ahead` first. A
    state that is given starts `back` at the row's end, as nn.LSTM's does; so two windows with carried state
    are not one sequence here.
    """

    def __init__(self, ahead: QRNNLayer, back: QRNNLayer) -> None:
        super().__init__()
        self.ahead, self.back = ahead, back

    def reset_parameters(self) -> None:
        """Draws all parameters of both anew."""
        self.ahead.reset_parameters()
        self.back.reset_parameters()

    def forward(
        self,
        x: Tensor,
        state: QRNNLayerState | None = None,
        lengths: Tensor | None = None,
        context: Tensor | None = None,
        *,
        mode: Mode = "window",
    ) -> tuple[Any, QRNNLayerState]:
        """(h (T, B, 2 m), state) of x (T, B, n), as `QRNNLayer.forward`; ungated, (c, o) of that width in h's place."""
        if mode == "step":
            raise ValueError("mode: expected window or ungated with two directions, got 'step'")
        first, second = _split(state)
        ahead, after = self.ahead(x, first, lengths, context, mode=mode)
        back, other = self.back(reverse_steps(x, lengths), second, lengths, context, mode=mode)
        return _side_by_side(ahead, back, lengths), _join(after, other)


def _side_by_side(ahead: Any, back: Any, lengths: Tensor | None) -> Any:
    """Two tensors (T, B, m) as one, the second read from its rows' end; of pairs of them, or None, a pair, or None."""
    if isinstance(ahead, tuple):
        return tuple(_side_by_side(one, other, lengths) for one, other in zip(ahead, back, strict=True))
    return None if ahead is None else torch.cat([ahead, reverse_steps(back, lengths)], dim=-1)


def _split(state: QRNNLayerState | None) -> tuple[QRNNLayerState | None, QRNNLayerState | None]:
    if state is None:
        return None, None
    halves = [tensor.chunk(2, dim=-1) for tensor in state]
    return QRNNLayerState(*(half[0] for half in halves)), QRNNLayerState(*(half[1] for half in halves))


def _join(ahead: QRNNLayerState, back: QRNNLayerState) -> QRNNLayerState:
    return QRNNLayerState(*(torch.cat(pair, dim=-1) for pair in zip(ahead, back, strict=True)))

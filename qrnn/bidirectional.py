"""A layer that reads its rows in both directions. Axes: T time steps, B batch rows, n input size, m hidden size."""

import torch
from torch import Tensor, nn

from .layer import QRNNLayer, QRNNLayerState, reverse_steps

Ungated = tuple[Tensor, Tensor | None]


class BidirectionalLayer(nn.Module):
    """Two layers with the interface of one: `ahead` reads each row forwards, `back` from the row's own end.

    Outputs, gates and every tensor of the state hold the two side by side in the last axis, `ahead` first. A
    state that is given starts `back` at the row's end, as nn.LSTM's does; so two windows with carried state
    are not one sequence here.
    """

    def __init__(self, ahead: QRNNLayer, back: QRNNLayer) -> None:
        super().__init__()
        self.ahead, self.back = ahead, back

    def forward(
        self,
        x: Tensor,
        state: QRNNLayerState | None = None,
        lengths: Tensor | None = None,
        context: Tensor | None = None,
    ) -> tuple[Tensor, QRNNLayerState]:
        """(h (T, B, 2 m), state) of x (T, B, n), as `QRNNLayer.forward`."""
        first, second = _split(state)
        ahead, after = self.ahead(x, first, lengths, context)
        back, other = self.back(reverse_steps(x, lengths), second, lengths, context)
        return torch.cat([ahead, reverse_steps(back, lengths)], dim=-1), _join(after, other)

    def forward_ungated(
        self,
        x: Tensor,
        state: QRNNLayerState | None = None,
        lengths: Tensor | None = None,
        context: Tensor | None = None,
    ) -> tuple[Ungated, QRNNLayerState]:
        """((c (T, B, 2 m), o (T, B, 2 m) or None), state), as `QRNNLayer.forward_ungated`."""
        first, second = _split(state)
        (c, o), after = self.ahead.forward_ungated(x, first, lengths, context)
        (c_back, o_back), other = self.back.forward_ungated(reverse_steps(x, lengths), second, lengths, context)
        c = torch.cat([c, reverse_steps(c_back, lengths)], dim=-1)
        if o is not None and o_back is not None:
            o = torch.cat([o, reverse_steps(o_back, lengths)], dim=-1)
        return (c, o), _join(after, other)


def _split(state: QRNNLayerState | None) -> tuple[QRNNLayerState | None, QRNNLayerState | None]:
    if state is None:
        return None, None
    halves = [tensor.chunk(2, dim=-1) for tensor in state]
    return QRNNLayerState(*(half[0] for half in halves)), QRNNLayerState(*(half[1] for half in halves))


def _join(ahead: QRNNLayerState, back: QRNNLayerState) -> QRNNLayerState:
    return QRNNLayerState(*(torch.cat(pair, dim=-1) for pair in zip(ahead, back, strict=True)))

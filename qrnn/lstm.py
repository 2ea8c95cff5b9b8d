"""Stacks of LSTM layers behind the QRNN's interface: the paper's baselines.

Axes: T time steps, B batch rows, n input size, m hidden size.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .layer import Mode, last_step
from .pooling.reference import steps_beyond
from .stack import Stack, State
from .state import known_to_torch


@known_to_torch
class LSTMLayerState(NamedTuple):
    """What a layer hands to the next window of the same rows."""

    h: Tensor
    """(B, m) the output at each row's last step."""
    c: Tensor
    """(B, m) the cell after each row's last step."""


class LSTM(Stack):
    """Layers of torch's nn.LSTM (cuDNN on CUDA) with dense connections, dropout between layers and lengths.

    Args:
        input_size, hidden_size, num_layers, dense, dropout, bias, batch_first, device, dtype: as for `qrnn.QRNN`.
        context_size: width of the encoder states that `start` will be given: None, or hidden_size, since an
            LSTM decoder begins in its encoder's last state.

    Raises:
        ValueError: an argument out of range; the message names it, with expected and got.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        dense: bool = False,
        dropout: float = 0.0,
        bias: bool = True,
        batch_first: bool = False,
        context_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            input_size, hidden_size, num_layers, dense=dense, dropout=dropout, bias=bias, batch_first=batch_first
        )
        if context_size not in (None, hidden_size):
            raise ValueError(f"context_size: expected None or hidden_size = {hidden_size}, got {context_size}")
        for index in range(num_layers):
            self.layers.append(self._make_layer(self.layer_input_size(index), device, dtype))

    def start(self, encoder_state: State) -> tuple[State | None, tuple[Tensor, ...] | None]:
        """(state, context) with which a decoder begins: the encoder's last (h, c), and no context."""
        return State(tuple(LSTMLayerState(layer.h, layer.c) for layer in encoder_state.layers)), None

    def _make_layer(self, input_size: int, device: torch.device | str | None, dtype: torch.dtype | None) -> nn.LSTM:
        return nn.LSTM(input_size, self.hidden_size, bias=self.bias, device=device, dtype=dtype)

    def _first_state(self, index: int, h: Tensor, c: Tensor) -> LSTMLayerState:
        return LSTMLayerState(h, c)

    def _run(
        self, layer: Any, x: Tensor, state: Any, lengths: Tensor | None, context: Tensor | None, mode: Mode
    ) -> tuple[Any, Any]:
        if context is not None:
            raise ValueError("context: expected None, an LSTM takes an encoder's state as its own, got tensors")
        output, after = self._window(layer, x.unsqueeze(0) if mode == "step" else x, state, lengths)
        if mode == "step":
            return output[0], after
        return ((output, None) if mode == "ungated" else output), after

    def _window(self, layer: Any, x: Tensor, state: Any, lengths: Tensor | None) -> tuple[Tensor, LSTMLayerState]:
        """(output, state) of one layer over a window x (T, B, n)."""
        if x.shape[0] == 0:
            raise ValueError("x: expected at least one time step, got T = 0")
        start = None if state is None else (state.h.unsqueeze(0), state.c.unsqueeze(0))
        if lengths is None:
            output, (h, c) = layer(x, start)
            return output, LSTMLayerState(h[0], c[0])
        output, c = _run_frozen(layer, x, start, lengths)
        return output, LSTMLayerState(last_step(output, lengths, None if state is None else state.h), c)


_SHUT = 1e4  # a pre-activation at which a sigmoid is exactly 1 (and 0 at its negative) in every float type


def _run_frozen(layer: nn.LSTM, x: Tensor, start: Any, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """(output, last c) over rows of unequal length, padding included in the computation but frozen.

    One more input channel is 1 beyond a row's length. Its weights shut the input and output gates and open the forget
    gate, so that there c stays, the output is 0, and every gradient is exactly 0. It comes with three channels of
    zeros, since products of rows that do not begin at 16 bytes are slow on CUDA.

    A packed sequence, which leaves padding out, has its lengths on the host: on CUDA each layer would wait for the
    device, and unpacking and its gradient take a launch a time step. On the CPU it makes training 2 to 8 times slower.
    """
    beyond = steps_beyond(lengths, x.shape[0])
    mark = nn.functional.pad(beyond.to(x.dtype), (0, 3))
    x = torch.cat([x.masked_fill(beyond, 0.0), mark], dim=-1)
    first, *others = layer.all_weights[0]
    shut = first.new_tensor([-_SHUT, _SHUT, 0.0, -_SHUT])  # torch's order: input, forget, cell, output
    shut = nn.functional.pad(shut.repeat_interleave(layer.hidden_size).unsqueeze(-1), (0, 3))
    wider = torch.cat([first, shut], dim=-1)
    if start is None:
        start = (x.new_zeros((1, x.shape[1], layer.hidden_size)),) * 2
    output, _, c = torch.lstm(x, start, [wider, *others], layer.bias, 1, 0.0, layer.training, False, False)
    return output, c[0]

"""A stack of quasi-recurrent layers with nn.LSTM's conventions (section 2.1), and the choice between the
families.

Axes: T time steps, B batch rows, n input size, m hidden size, k filter width.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .layer import QRNNLayer, check_positive
from .pooling.ops import check_lengths


class State(NamedTuple):
    """What a stack hands to the next window of the same rows: for each layer a tuple of tensors.

    Every tensor's last axis but one is the batch, which is what makes the methods common to both families.
    Each layer's tuple has fields `h` and `c`, (B, m): the output and the memory after each row's last step.
    """

    layers: tuple

    def detach(self) -> "State":
        """The same values, cut off from the graph (truncated backpropagation)."""
        return self._map(Tensor.detach)

    def index_select(self, rows: Tensor) -> "State":
        """The state of rows `rows` (int64, any number, repeats allowed), e.g. to reorder a beam."""
        return self._map(lambda tensor: tensor.index_select(-2, rows))

    def to(self, *args, **kwargs) -> "State":
        """Every tensor's `.to(*args, **kwargs)`."""
        return self._map(lambda tensor: tensor.to(*args, **kwargs))

    def _map(self, change) -> "State":
        return State(tuple(type(layer)(*map(change, layer)) for layer in self.layers))


class Stack(nn.Module, ABC):
    """What both families share: layers in a row, dropout between them, dense connections, (T, B, n) or (B, T,
    n).

    A subclass fills `self.layers` and says how one layer runs (`_run`, `_run_ungated`) and how a decoder
    begins (`start`).
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        *,
        dense: bool,
        dropout: float,
        batch_first: bool,
    ) -> None:
        super().__init__()
        check_positive(input_size=input_size, hidden_size=hidden_size, num_layers=num_layers)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}")
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.dense, self.dropout, self.batch_first = dense, dropout, batch_first
        self.layers = nn.ModuleList()

    def layer_input_size(self, layer: int) -> int:
        """Channels that layer `layer` (from 0) reads; if dense, those of x and of every earlier output."""
        if self.dense:
            return self.input_size + layer * self.hidden_size
        return self.input_size if layer == 0 else self.hidden_size

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        lengths: Tensor | None = None,
        context: Sequence[Tensor] | None = None,
        *,
        split_last: bool = False,
    ):
        """Runs the stack over a window.

        Args:
            x: (T, B, n), or (B, T, n) with batch_first.
            state: what the previous window of these rows, or `start`, returned; zeros if None.
            lengths: (B,) int64 in [0, T], the steps of each row that count; all if None. Output beyond them
                is 0 and nothing there influences anything.
            context: for each layer a (B, context_size) tensor (eq. 7), as `start` returns it.
            split_last: return (ungated, gate) in place of the output: the last layer's state before its
                output gate and that gate, None where there is none. Their product is the output.

        Returns:
            (output (T, B, m) of the last layer, or (B, T, m) with batch_first; state).

        Raises:
            ValueError: a wrong shape, dtype or number of layers; the message names argument, expected and
            got.
        """
        x = self._checked(x, state, lengths, context)
        results = []
        for index, layer in enumerate(self.layers):
            run = self._run_ungated if split_last and index == self.num_layers - 1 else self._run
            output, after = run(
                layer,
                x,
                None if state is None else state.layers[index],
                lengths,
                None if context is None else context[index],
            )
            results.append(after)
            if index < self.num_layers - 1:
                x = self._between(x, output)
        if self.batch_first:
            output = (
                tuple(t if t is None else t.transpose(0, 1) for t in output) if split_last else output.transpose(0, 1)
            )
        return output, State(tuple(results))

    @abstractmethod
    def start(self, encoder_state: State) -> tuple[State | None, tuple[Tensor, ...] | None]:
        """(state, context) with which this stack, as a decoder, begins after an encoder."""

    @abstractmethod
    def _run(self, layer, x, state, lengths, context):
        """(output, state) of one layer."""

    @abstractmethod
    def _run_ungated(self, layer, x, state, lengths, context):
        """((output before its gate, gate or None), state) of one layer."""

    def _between(self, x: Tensor, output: Tensor) -> Tensor:
        """The next layer's input: the output after dropout, behind the layer's own input if dense."""
        output = nn.functional.dropout(output, self.dropout, self.training)
        return torch.cat([x, output], dim=-1) if self.dense else output

    def _checked(self, x, state, lengths, context) -> Tensor:
        if x.dim() != 3 or x.shape[2] != self.input_size:
            axes = "(B, T," if self.batch_first else "(T, B,"
            raise ValueError(f"x: expected {axes} input_size = {self.input_size}), got {tuple(x.shape)}")
        x = x.transpose(0, 1) if self.batch_first else x
        check_lengths(x, lengths)
        for name, layers in (("state", None if state is None else state.layers), ("context", context)):
            if layers is not None and len(layers) != self.num_layers:
                raise ValueError(f"{name}: expected {self.num_layers} layers, got {len(layers)}")
        if state is not None and state.layers[0].c.shape != (x.shape[1], self.hidden_size):
            raise ValueError(
                f"state: expected c (B, m) = {(x.shape[1], self.hidden_size)} in each layer,"
                f" got {tuple(state.layers[0].c.shape)}"
            )
        return x


class QRNN(Stack):
    """Quasi-recurrent layers, used as nn.LSTM is.

    Args:
        input_size, hidden_size, num_layers: n, m and the number of layers.
        kernel_size: filter width k, one for all layers or one for each.
        pooling: "f", "fo" or "ifo" (eq. 3, 4, 5).
        dense: each layer's input is concatenated to its output before the next layer (section 2.1); the
            output is still the last layer's alone.
        dropout: probability of dropout between layers.
        zoneout: probability of eq. 6, without rescaling, in training only.
        bias: additive bias in the convolutions.
        batch_first: (B, T, n) in and out; states keep their layout.
        causal: masked convolutions; if false, unmasked ones, for encoders.
        context_size: width of the encoder states that eq. 7 projects into every gate of every layer; None for
            none.
        backend: as for `qrnn.pool`.

    Raises:
        ValueError: an argument out of range; the message names it, with expected and got.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        kernel_size: int | Sequence[int] = 2,
        pooling: str = "fo",
        dense: bool = False,
        dropout: float = 0.0,
        zoneout: float = 0.0,
        bias: bool = True,
        batch_first: bool = False,
        causal: bool = True,
        context_size: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(input_size, hidden_size, num_layers, dense=dense, dropout=dropout, batch_first=batch_first)
        widths = [kernel_size] * num_layers if isinstance(kernel_size, int) else list(kernel_size)
        if len(widths) != num_layers:
            raise ValueError(f"kernel_size: expected one width or {num_layers} (num_layers), got {len(widths)}")
        self.layers.extend(
            QRNNLayer(
                self.layer_input_size(index),
                hidden_size,
                kernel_size=width,
                pooling=pooling,
                zoneout=zoneout,
                bias=bias,
                causal=causal,
                context_size=context_size,
                backend=backend,
            )
            for index, width in enumerate(widths)
        )

    def start(self, encoder_state: State) -> tuple[State | None, tuple[Tensor, ...] | None]:
        """(state, context) with which this stack, as a decoder, begins after an encoder (eq. 7).

        The state is None, so zeros; the context of layer l is the encoder's last hidden state in layer l.
        """
        return None, tuple(layer.h for layer in encoder_state.layers)

    def _run(self, layer, x, state, lengths, context):
        return layer(x, state, lengths, context)

    def _run_ungated(self, layer, x, state, lengths, context):
        return layer.forward_ungated(x, state, lengths, context)

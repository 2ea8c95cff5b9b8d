"""Stacks of layers with nn.LSTM's conventions (section 2.1): what all families share, and the QRNN.

Axes: T time steps, B batch rows, n input size, m hidden size, k filter width.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from . import weights
from .bidirectional import BidirectionalLayer
from .dropout import Dropout
from .layer import Mode, QRNNLayer, QRNNLayerState, check_positive
from .pooling.ops import check_lengths
from .state import State

Context = Sequence[Tensor | None]
Given = State | tuple[Tensor, Tensor]
"""A state as a stack takes it: its own, or h and c as nn.LSTM has them."""


class Stack(nn.Module, ABC):
    """What all families share: layers in a row, dropout between them, dense connections, (T, B, n) or (B, T,
    n).

    A subclass fills `self.layers` and says how one layer runs (`_run`), what it begins with (`_first_state`) and how a
    decoder begins (`start`).
    """

    bidirectional = False

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        *,
        dense: bool,
        dropout: float,
        bias: bool,
        batch_first: bool,
    ) -> None:
        super().__init__()
        check_positive(input_size=input_size, hidden_size=hidden_size, num_layers=num_layers)
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.dense, self.bias, self.batch_first = dense, bias, batch_first
        self.layers = nn.ModuleList()
        self.between = nn.ModuleList(self.make_dropout(0.0) for _ in range(num_layers - 1))
        self.dropout = dropout

    @property
    def dropout(self) -> float:
        """Probability of dropout between layers; may be set."""
        between: Any = self.between
        return getattr(between[0], "p", self._dropout) if between else self._dropout

    @dropout.setter
    def dropout(self, p: float) -> None:
        if not 0 <= p < 1:
            raise ValueError(f"dropout: expected a probability in [0, 1), got {p}")
        self._dropout = p
        module: Any
        for module in self.between:
            module.p = p

    @staticmethod
    def make_dropout(p: float) -> nn.Module:
        """Dropout of (T, B, n) as the family has it between its layers, for what stands before and after them."""
        return Dropout(p)

    def layer_input_size(self, layer: int) -> int:
        """Channels that layer `layer` (from 0) reads; if dense, those of x and of every earlier output."""
        if self.dense:
            return self.input_size + layer * self.output_size
        return self.input_size if layer == 0 else self.output_size

    @property
    def output_size(self) -> int:
        """Channels of the output and of each layer's h and c: the hidden size, twice that if bidirectional."""
        return self.hidden_size * (1 + self.bidirectional)

    def reset_parameters(self) -> None:
        """Draws all parameters anew from torch's generator."""
        layer: Any
        for layer in self.layers:
            layer.reset_parameters()

    def flatten_parameters(self) -> None:
        """What nn.LSTM has for cuDNN; does nothing where there is no nn.LSTM."""
        for layer in self.layers:
            if isinstance(layer, nn.LSTM):
                layer.flatten_parameters()

    def initial_state(self, h: Tensor, c: Tensor) -> State:
        """The state of rows of which nothing has been read yet, a QRNN's last inputs being zeros.

        Args:
            h, c: (L, B, m), or (L, m) without a batch axis, as `State.h` and `State.c` have them, which is nn.LSTM's
                layout of h_0 and c_0. Of two directions, the halves of the last axis, where nn.LSTM has (2 L, B, m).

        Raises:
            ValueError: another number of layers or axes, or h unlike c in shape.
        """
        for name, tensor in (("h", h), ("c", c)):
            if tensor.dim() not in (2, 3) or len(tensor) != self.num_layers or tensor.shape != h.shape:
                expected = f"({self.num_layers}, B, {self.output_size}), the same for both"
                raise ValueError(f"state: expected {name} (L, B, m) = {expected}, got {tuple(tensor.shape)}")
        return State(tuple(self._first_state(index, h[index], c[index]) for index in range(self.num_layers)))

    def forward(
        self,
        x: Tensor | PackedSequence,
        state: Given | None = None,
        lengths: Tensor | None = None,
        context: Context | None = None,
        *,
        split_last: bool = False,
    ) -> tuple[Any, State]:
        """Runs the stack over a window.

        Args:
            x: (T, B, n), or (B, T, n) with batch_first; (T, n), one row without a batch axis; or a
                PackedSequence, whose rows have their own lengths.
            state: what the previous window of these rows, or `start`, returned; or a tuple (h, c), of which
                `initial_state` makes one; zeros if None.
            lengths: (B,) int64 in [0, T], the steps of each row that count; all if None. Output beyond them
                is 0 and nothing there influences anything.
            context: for each layer a (B, context_size) tensor (eq. 7), None for a layer that takes none, as
                `start` returns it.
            split_last: return (ungated, gate) in place of the output: the last layer's state before its
                output gate and that gate, None where there is none. Their product is the output.

        Returns:
            (output, state). The output is the last layer's, laid out as x with m = `output_size` channels; of
            a PackedSequence one with the same rows in the same order. State and context of a PackedSequence
            are in the order of the rows before packing; without a batch axis in x neither they nor the output
            have one.

        Raises:
            ValueError: a wrong shape, dtype or number of layers; the message names argument, expected and
            got.
        """
        state = self._as_state(state)
        _check_context(context)
        if isinstance(x, PackedSequence):
            if split_last:
                raise ValueError("split_last: expected False with a PackedSequence, got True")
            return self._run_packed(x, state, lengths, context)
        if x.dim() == 2:
            return self._run_unbatched(x, state, lengths, context, split_last)
        if not self.batch_first or x.dim() != 3:
            return self._run_layers(x, state, lengths, context, split_last)
        output, after = self._run_layers(x.transpose(0, 1), state, lengths, context, split_last)
        return _each(output, lambda tensor: tensor.transpose(0, 1)), after

    def step(self, x: Tensor, state: Given | None = None, context: Context | None = None) -> tuple[Tensor, State]:
        """One time step of streaming: what `forward` gives for the whole sequence, step by step.

        The outputs agree with `forward`'s up to the order of summation: to 1e-12 in float64 and 1e-5 in
        float32, for values of about 1 (tested for every width and pooling).

        Args:
            x: (B, n), or (n,) without a batch axis.
            state: what the previous step, or a `forward` over the steps before, returned; or as for `forward`.
            context: as for `forward`.

        Returns:
            (output (B, m) or (m,), state).

        Raises:
            ValueError: as `forward`; and where an output would need later inputs (bidirectional, or unmasked).
        """
        if self.bidirectional:
            raise ValueError("bidirectional: expected False for one step at a time, got True")
        state = self._as_state(state)
        _check_context(context)
        if x.dim() == 1:
            state = None if state is None else _one_row(state)
            context = each_context(context, lambda layer: layer.unsqueeze(0))
            output, after = self.step(x.unsqueeze(0), state, context)
            return output[0], after.without_batch_axis()
        if x.dim() != 2 or x.shape[1] != self.input_size:
            raise ValueError(f"x: expected (B, input_size = {self.input_size}) at a step, got {tuple(x.shape)}")
        self._check_layers(x.shape[0], state, context)
        return self._through_layers(x, state, None, context, "step", "step")

    @abstractmethod
    def start(self, encoder_state: State) -> tuple[State | None, Context | None]:
        """(state, context) with which this stack, as a decoder, begins after an encoder."""

    @abstractmethod
    def _first_state(self, index: int, h: Tensor, c: Tensor) -> Any:
        """The state of layer `index`, h and c (B, m), where nothing has been read yet."""

    @abstractmethod
    def _run(
        self, layer: Any, x: Tensor, state: Any, lengths: Tensor | None, context: Tensor | None, mode: Mode
    ) -> tuple[Any, Any]:
        """(output, state) of one layer; "ungated", (output before its gate, gate or None) in the output's place."""

    def _through_layers(
        self, x: Tensor, state: State | None, lengths: Tensor | None, context: Context | None, mode: Mode, last: Mode
    ) -> tuple[Any, State]:
        """(the last layer's output, state) of x, each layer called in `mode` but the last."""
        output, results = None, []
        for index, layer in enumerate(self.layers):
            is_last = index == self.num_layers - 1
            before = None if state is None else state.layers[index]
            added = None if context is None else context[index]
            output, after = self._run(layer, x, before, lengths, added, last if is_last else mode)
            results.append(after)
            if not is_last:
                x = self._between(index, x, output)
        return output, State(tuple(results))

    def _run_layers(
        self, x: Tensor, state: State | None, lengths: Tensor | None, context: Context | None, split_last: bool
    ) -> tuple[Any, State]:
        """`forward` of x (T, B, n)."""
        if x.dim() != 3 or x.shape[2] != self.input_size:
            axes = "(B, T," if self.batch_first else "(T, B,"
            raise ValueError(f"x: expected {axes} input_size = {self.input_size}), got {tuple(x.shape)}")
        check_lengths(x, lengths)
        self._check_layers(x.shape[1], state, context)
        return self._through_layers(x, state, lengths, context, "window", "ungated" if split_last else "window")

    def _run_unbatched(
        self, x: Tensor, state: State | None, lengths: Tensor | None, context: Context | None, split_last: bool
    ) -> tuple[Any, State]:
        """`forward` of x (T, n)."""
        if x.shape[1] != self.input_size:
            raise ValueError(f"x: expected (T, input_size = {self.input_size}) of one row, got {tuple(x.shape)}")
        if lengths is not None:
            raise ValueError("lengths: expected None for x without a batch axis, got a tensor")
        state = None if state is None else _one_row(state)
        context = each_context(context, lambda layer: layer.unsqueeze(0))
        output, after = self._run_layers(x.unsqueeze(1), state, None, context, split_last)
        return _each(output, lambda tensor: tensor.squeeze(1)), after.without_batch_axis()

    def _run_packed(
        self, x: PackedSequence, state: State | None, lengths: Tensor | None, context: Context | None
    ) -> tuple[PackedSequence, State]:
        """`forward` of a PackedSequence, in the order in which its rows are packed."""
        if lengths is not None:
            raise ValueError("lengths: expected None with a PackedSequence, which has its own, got a tensor")
        rows = x.sorted_indices
        if rows is not None:
            self._check_layers(rows.shape[0], state, context)
            state = None if state is None else state.index_select(rows)
            context = each_context(context, lambda layer: layer.index_select(0, rows))
        padded, steps = pad_packed_sequence(PackedSequence(x.data, x.batch_sizes))
        output, after = self._run_layers(padded, state, steps.to(x.data.device), context, False)
        data = pack_padded_sequence(output, steps).data
        if x.unsorted_indices is not None:
            after = after.index_select(x.unsorted_indices)
        return PackedSequence(data, x.batch_sizes, x.sorted_indices, x.unsorted_indices), after

    def _between(self, index: int, x: Tensor, output: Tensor) -> Tensor:
        """The input after layer `index`: its output after dropout, behind the layer's own input if dense."""
        output = self.between[index](output)
        return torch.cat([x, output], dim=-1) if self.dense else output

    def _as_state(self, state: Given | None) -> State | None:
        if state is None or isinstance(state, State):
            return state
        if isinstance(state, tuple) and len(state) == 2 and all(isinstance(tensor, Tensor) for tensor in state):
            return self.initial_state(*state)
        raise ValueError(f"state: expected a qrnn.State or a tuple of tensors (h, c), got {type(state).__name__}")

    def _check_layers(self, rows: int, state: State | None, context: Context | None) -> None:
        for name, layers in (("state", None if state is None else state.layers), ("context", context)):
            if layers is not None and len(layers) != self.num_layers:
                raise ValueError(f"{name}: expected {self.num_layers} layers, got {len(layers)}")
        expected = (rows, self.output_size)
        for index, layer in enumerate(() if state is None else state.layers):
            for name, got in (("c", layer.c.shape), ("h", layer.h.shape)):
                if got != expected:
                    raise ValueError(
                        f"state: expected {name} (B, m) = {expected} in each layer, got {tuple(got)} in layer {index}"
                    )


def _each(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The output, or the two halves of a split one, changed."""
    if isinstance(output, tuple):
        return tuple(None if half is None else change(half) for half in output)
    return change(output)


def _check_context(context: Any) -> None:
    if isinstance(context, Tensor):  # which is a sequence of rows
        raise ValueError("context: expected a sequence with a tensor for each layer, got a tensor")


def each_context(context: Context | None, change: Callable[[Tensor], Tensor]) -> Context | None:
    """A context with every tensor of it changed."""
    return None if context is None else [None if layer is None else change(layer) for layer in context]


def _one_row(state: State) -> State:
    """A state without a batch axis as that of one row."""
    if state.layers and state.layers[0].c.dim() != 1:
        shape = tuple(state.layers[0].c.shape)
        raise ValueError(f"state: expected c (m,) in each layer, as x has no batch axis, got {shape}")
    return state.with_batch_axis()


class QRNN(Stack):
    """Quasi-recurrent layers, used as nn.LSTM is.

    Parameters, by their names in `state_dict`, for each layer l: `layers.l.weight` (k, n_l, G m), of which
    [k - 1] meets the current step and [0] the oldest; `layers.l.bias` (G m,); with a context
    `layers.l.context_weight` (context_size, G m), V of eq. 7. The G blocks of m columns are z, f, i, o in that
    order, those that the pooling has. n_l is `layer_input_size(l)`. If bidirectional, the names are
    `layers.l.ahead.*` and `layers.l.back.*`.

    Args:
        input_size, hidden_size, num_layers: n, m and the number of layers.
        kernel_size: filter width k, one for all layers or one for each.
        pooling: "f", "fo" or "ifo" (eq. 3, 4, 5).
        dense: each layer's input is concatenated to its output before the next layer (section 2.1); the
            output is still the last layer's alone.
        dropout: probability of dropout between layers.
        zoneout: probability of eq. 6, drawn in training only.
        zoneout_evaluation: "none" or "scaled", as for `QRNNLayer`.
        bidirectional: each layer also reads its rows from their end, with weights of its own. Outputs, h and c
            are then 2 m wide, forwards first; the next layer reads both.
        bias: additive bias in the convolutions.
        batch_first: (B, T, n) in and out; states keep their layout.
        causal: masked convolutions; if false, unmasked ones, for encoders.
        extra_padding: "left" or "right", the side of the odd step of padding of unmasked filters of even width.
        context_size: width of the encoder states that eq. 7 projects into every gate; None for none.
        context_layers: "all", the layers that eq. 7 has it in; or "last", the one with the attention, while the
            others start from the encoder's last c (see `start`), as in the code that the authors published.
        backend, device, dtype: as for `QRNNLayer`.

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
        zoneout_evaluation: str = "none",
        bidirectional: bool = False,
        bias: bool = True,
        batch_first: bool = False,
        causal: bool = True,
        extra_padding: str = "left",
        context_size: int | None = None,
        context_layers: str = "all",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            input_size, hidden_size, num_layers, dense=dense, dropout=dropout, bias=bias, batch_first=batch_first
        )
        if context_layers not in ("all", "last"):
            raise ValueError(f"context_layers: expected all or last, got {context_layers!r}")
        if context_layers == "last" and bidirectional:
            raise ValueError(
                "context_layers: expected all with bidirectional=True, whose state starts no decoder, got last"
            )
        self.bidirectional, self.context_layers = bidirectional, context_layers
        widths = [kernel_size] * num_layers if isinstance(kernel_size, int) else list(kernel_size)
        if len(widths) != num_layers:
            raise ValueError(f"kernel_size: expected one width or {num_layers} (num_layers), got {len(widths)}")

        def layer(index: int) -> QRNNLayer:
            return QRNNLayer(
                self.layer_input_size(index),
                hidden_size,
                kernel_size=widths[index],
                pooling=pooling,
                zoneout=zoneout,
                zoneout_evaluation=zoneout_evaluation,
                bias=bias,
                causal=causal,
                extra_padding=extra_padding,
                context_size=context_size if context_layers == "all" or index == num_layers - 1 else None,
                backend=backend,
                device=device,
                dtype=dtype,
            )

        for index in range(num_layers):
            self.layers.append(BidirectionalLayer(layer(index), layer(index)) if bidirectional else layer(index))

    @property
    def arguments(self) -> dict[str, Any]:
        """What the stack is now: `QRNN(**stack.arguments)` builds one of the same kind with new weights.

        Raises:
            ValueError: layers have been set to different values of an argument that is one for all.
        """
        of_all = ("pooling", "zoneout", "zoneout_evaluation", "causal", "extra_padding", "backend")
        own = ("input_size", "hidden_size", "num_layers", "dense", "dropout", "bidirectional", "bias", "batch_first")
        layers: Any = self.layers
        context_weight = self._single_layers()[-1].context_weight
        return {
            **{name: getattr(self, name) for name in (*own, "context_layers")},
            "kernel_size": [(layer.ahead if self.bidirectional else layer).kernel_size for layer in layers],
            **{name: self._of_all_layers(name) for name in of_all},
            "context_size": None if context_weight is None else context_weight.shape[0],
        }

    def _single_layers(self) -> list[QRNNLayer]:
        """All layers, each direction by itself."""
        return [module for module in self.layers.modules() if isinstance(module, QRNNLayer)]

    def _of_all_layers(self, name: str) -> Any:
        values = list(dict.fromkeys(getattr(layer, name) for layer in self._single_layers()))
        if len(values) > 1:
            raise ValueError(f"{name}: expected one value in all layers, got {', '.join(map(str, values))}")
        return values[0]

    def start(self, encoder_state: State) -> tuple[State | None, Context | None]:
        """(state, context) with which this stack, as a decoder, begins after an encoder (eq. 7).

        The state is None, so zeros; the context of layer l is the encoder's last hidden state in layer l. With
        context_layers="last" only the last layer has it, and each of the others begins in the encoder's last c
        of its own layer, with zeros for the inputs before the first.
        """
        if self.context_layers == "all":
            return None, tuple(layer.h for layer in encoder_state.layers)
        *below, last = (layer.c for layer in encoder_state.layers)
        cells = torch.stack([*below, torch.zeros_like(last)])
        return self.initial_state(torch.zeros_like(cells), cells), (*[None] * len(below), encoder_state.layers[-1].h)

    def _first_state(self, index: int, h: Tensor, c: Tensor) -> QRNNLayerState:
        layer: Any = self.layers[index]
        layer = layer.ahead if self.bidirectional else layer
        steps = layer.kernel_size - 1 if layer.causal else 0
        width = layer.input_size * (1 + self.bidirectional)  # of both directions, which read the same
        return QRNNLayerState(h, c, c.new_zeros((steps, *c.shape[:-1], width)))

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Writes the parameters and the constructor's arguments to one safetensors file, whole or not at all."""
        weights.save(path, self.state_dict(), self.arguments)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **changes: Any) -> Self:
        """The stack that `save_pretrained` wrote to `path`, on the CPU, in the dtype it was saved in.

        Args:
            path: the file.
            changes: constructor's arguments to override, such as backend, dropout, zoneout, batch_first or device.

        Raises:
            ValueError: the file was not written by `save_pretrained`, or its tensors do not fit its arguments.
            OSError: the file cannot be read.
        """
        arguments, tensors = weights.load(path)
        return cls._with_weights({**arguments, **changes}, tensors, path)

    @classmethod
    def from_salesforce(
        cls,
        state_dict: Mapping[str, Tensor],
        input_size: int,
        hidden_size: int,
        *,
        current_first: bool = True,
        **options: Any,
    ) -> Self:
        """A stack with the weights of a checkpoint of salesforce/pytorch-qrnn: `qrnn.weights.from_salesforce`.

        Args:
            state_dict, input_size, hidden_size, current_first: as there.
            options: further constructor's arguments, such as dropout.
        """
        tensors, found = weights.from_salesforce(state_dict, input_size, hidden_size, current_first=current_first)
        arguments = {"input_size": input_size, "hidden_size": hidden_size, **found, **options}
        return cls._with_weights(arguments, tensors, "state_dict")

    @classmethod
    def _with_weights(cls, arguments: Mapping[str, Any], tensors: Mapping[str, Tensor], source: Any) -> Self:
        build = {**arguments, "device": "meta", "dtype": None}  # the weights are at hand and need not be drawn
        stack = cls(**build)
        weights.put(stack, tensors, source)
        return stack.to(device=arguments.get("device"), dtype=arguments.get("dtype"))

    def _run(
        self, layer: Any, x: Tensor, state: Any, lengths: Tensor | None, context: Tensor | None, mode: Mode
    ) -> tuple[Any, Any]:
        return layer(x, state, lengths, context, mode=mode)

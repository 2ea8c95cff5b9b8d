"""What a stack hands from one window of time steps to the next. Axes: B batch rows, m hidden size, L layers."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import _register_namedtuple

Kind = TypeVar("Kind", bound=type)


def known_to_torch(kind: Kind) -> Kind:
    """A named tuple that torch.load takes as it loads weights, and torch.export.save as an input or output."""
    torch.serialization.add_safe_globals([kind])
    _register_namedtuple(kind, serialized_type_name=f"qrnn.{kind.__name__}")
    return kind


@known_to_torch
class State(NamedTuple):
    """What a stack hands to the next window of the same rows: for each layer a tuple of tensors.

    Every tensor's last axis but one is the batch, which is what makes the methods common to all families.
    Each layer's tuple has fields `h` and `c`, (B, m): the output and the memory after each row's last step.
    After an input without a batch axis no tensor has one.
    """

    layers: tuple[Any, ...]

    @property
    def h(self) -> Tensor:
        """(L, B, m) the layers' `h`, as nn.LSTM's h_n; directions lie side by side in the last axis."""
        return torch.stack([layer.h for layer in self.layers])

    @property
    def c(self) -> Tensor:
        """(L, B, m) the layers' `c`, as nn.LSTM's c_n; directions lie side by side in the last axis."""
        return torch.stack([layer.c for layer in self.layers])

    def detach(self) -> "State":
        """The same values, cut off from the graph (truncated backpropagation)."""
        return self._map(Tensor.detach)

    def clone(self) -> "State":
        """The same values in memory of their own."""
        return self._map(Tensor.clone)

    def index_select(self, rows: Tensor) -> "State":
        """The state of rows `rows` (int64, any number, repeats allowed), e.g. to reorder a beam."""
        return self._map(lambda tensor: tensor.index_select(-2, rows))

    def to(self, *args: Any, **kwargs: Any) -> "State":
        """Every tensor's `.to(*args, **kwargs)`."""
        return self._map(lambda tensor: tensor.to(*args, **kwargs))

    def without_inputs(self) -> "State":
        """The same h and c, with zeros in place of the last k - 1 inputs: eq. 2 then reads zero for x[t - 1]."""
        return State(
            tuple(
                layer._replace(tail=torch.zeros_like(layer.tail)) if hasattr(layer, "tail") else layer
                for layer in self.layers
            )
        )

    def ungated(self) -> "State":
        """The state with c in h's place: what the layers would have given out without an output gate."""
        return State(tuple(layer._replace(h=layer.c) for layer in self.layers))

    def with_batch_axis(self) -> "State":
        """A state without a batch axis as that of a batch of one row."""
        return self._map(lambda tensor: tensor.unsqueeze(-2))

    def without_batch_axis(self) -> "State":
        """The state of a batch of one row, without its batch axis."""
        return self._map(lambda tensor: tensor.squeeze(-2))

    def _map(self, change: Callable[[Tensor], Tensor]) -> "State":
        return State(tuple(type(layer)(*map(change, layer)) for layer in self.layers))

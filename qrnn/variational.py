"""LSTMs with dropout masks held over time (Gal and Ghahramani, NIPS 2016) and zoneout (Krueger et al., 2016).

Axes: T time steps, B batch rows, n input size, m hidden size.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .lstm import LSTM, LSTMLayerState
from .pooling.reference import steps_beyond
from .recurrence import by_steps, with_gradient


class HeldDropout(nn.Module):
    """Dropout with one mask for each row, drawn at each call and the same at all of the call's time steps.

    What is kept is divided by 1 - p; in evaluation nothing is dropped. See `sampled_masks` for masks in evaluation.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p, self.holds = p, False
        self._held: Tensor | None = None

    @property
    def active(self) -> bool:
        """Whether a call drops anything."""
        return self.training and self.p > 0

    def forward(self, x: Tensor) -> Tensor:
        """x (T, B, n) or (B, n) with the same channels dropped at all steps of a row."""
        mask = self.mask(x)
        return x if mask is None else x * mask

    def mask(self, like: Tensor) -> Tensor | None:
        """(B, n) factors, 0 or 1 / (1 - p), for `like` (..., B, n); None where nothing is dropped."""
        if not self.active:
            return None
        shape = like.shape[-2:]
        if self._held is not None:
            if self._held.shape != shape:
                raise ValueError(f"x: expected (B, n) = {tuple(self._held.shape)} as the held mask, got {tuple(shape)}")
            return self._held
        mask = F.dropout(like.new_ones(shape), self.p)
        if self.holds:
            self._held = mask
        return mask

    def extra_repr(self) -> str:
        return f"p={self.p}"


@contextlib.contextmanager
def sampled_masks(model: nn.Module) -> Iterator[None]:
    """Within it, each `HeldDropout` of the model drops in evaluation too, by a mask drawn at its first call.

    All later calls have the same mask, so that a row is one sample of the weights' posterior for as long as its
    state is carried: the MC dropout of Gal and Ghahramani (2016) as the code that they published has it. Zoneout and
    all other modules stay in the mode they are in.
    """
    parts = [part for part in model.modules() if isinstance(part, HeldDropout)]
    modes = [part.training for part in parts]
    for part in parts:
        part.training, part.holds = True, True
    try:
        yield
    finally:
        for part, mode in zip(parts, modes, strict=True):
            part.training, part.holds, part._held = mode, False, None


class VariationalLayer(nn.LSTM):
    """nn.LSTM of one layer and one direction whose h is masked on its way into the gates, and which may zone out.

    With i, f, g, o of torch's LSTM and h' = mask * h[t-1] in place of h[t-1] in all four (the mask is "tied": Gal's
    published code draws one for each gate):

        c~[t] = f * c[t-1] + i * g,        h~[t] = o * tanh(c~[t])
        c[t] = c[t-1] where zoned out, else c~[t];        h[t] = h[t-1] where zoned out, else h~[t]

    Zoneout (Krueger et al., 2016) draws for c and for h, at each step, row and channel; in evaluation it takes the
    expectation, p * old + (1 - p) * new.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias=bias, device=device, dtype=dtype)
        self.recurrent = HeldDropout(0.0)
        self.zoneout = 0.0

    @property
    def fused(self) -> bool:
        """Whether nothing but nn.LSTM is asked for now, so that its own kernels can run."""
        return not self.recurrent.active and not self.zoneout

    def steps(self, x: Tensor, h: Tensor, c: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(output (T, B, m), last h, last c (B, m)) of x (T, B, n) from h and c (B, m), one step after another.

        The input's products are one for all steps. Beyond a row's length (B,) h and c stay and the output is 0.
        """
        beyond = None if lengths is None else steps_beyond(lengths, x.shape[0])
        x = x if beyond is None else x.masked_fill(beyond, 0.0)
        from_input, from_hidden, *biases = self.all_weights[0]
        inputs = F.linear(x, from_input, biases[0] + biases[1] if biases else None)
        given = inputs, h, c, from_hidden, self.recurrent.mask(h), self._stays(x, h, beyond)
        if self.training and not torch.is_autocast_enabled(x.device.type):  # the written gradient has one precision
            output, c = with_gradient(*given)
        else:
            output, c = by_steps(*given, share=0.0 if self.training else self.zoneout)
        return output if beyond is None else output.masked_fill(beyond, 0.0), output[-1].clone(), c

    def _stays(self, x: Tensor, h: Tensor, beyond: Tensor | None) -> Tensor | None:
        """(T, 2, B, m) bool, of c and of h, true where the old value stays: zoned out, or beyond the row's length."""
        shape = (x.shape[0], 2, *h.shape)
        zoned = torch.rand(shape, device=h.device) < self.zoneout if self.training and self.zoneout else None
        if beyond is None:
            return zoned
        beyond = beyond.unsqueeze(1)
        return beyond.expand(shape) if zoned is None else zoned | beyond


class VariationalLSTM(LSTM):
    """An LSTM stack whose dropout masks are drawn once a window and row, on h in the recurrence too.

    Parameters are those of `qrnn.LSTM`, by the same names. A window is one call of `forward`; `step` draws new masks
    at every step. Where no noise acts (in evaluation without zoneout), nn.LSTM's kernels run.

    Args:
        input_size, hidden_size, num_layers, dense, bias, batch_first, context_size, device, dtype: as for `qrnn.LSTM`.
        dropout: probability of dropout between layers, by held masks. `make_dropout` gives the same for the first
            layer's input and the last layer's output.
        recurrent_dropout: probability of dropout on h[t-1], one held mask for the four gates.
        zoneout: probability that c, and that h, keeps its old value (see `VariationalLayer`).

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
        recurrent_dropout: float = 0.0,
        zoneout: float = 0.0,
        bias: bool = True,
        batch_first: bool = False,
        context_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, value in (("recurrent_dropout", recurrent_dropout), ("zoneout", zoneout)):
            if not 0 <= value < 1:
                raise ValueError(f"{name}: expected a probability in [0, 1), got {value}")
        super().__init__(
            input_size, hidden_size, num_layers, dense=dense, dropout=dropout, bias=bias, batch_first=batch_first,
            context_size=context_size, device=device, dtype=dtype,
        )  # fmt: skip
        for layer in self.modules():
            if isinstance(layer, VariationalLayer):
                layer.recurrent.p, layer.zoneout = recurrent_dropout, zoneout

    @staticmethod
    def make_dropout(p: float) -> nn.Module:
        return HeldDropout(p)

    def _make_layer(self, input_size: int, device: torch.device | str | None, dtype: torch.dtype | None) -> nn.LSTM:
        return VariationalLayer(input_size, self.hidden_size, bias=self.bias, device=device, dtype=dtype)

    def _window(self, layer: Any, x: Tensor, state: Any, lengths: Tensor | None) -> tuple[Tensor, LSTMLayerState]:
        if layer.fused or x.shape[0] == 0:
            return super()._window(layer, x, state, lengths)
        zeros = x.new_zeros((x.shape[1], self.hidden_size))
        before = LSTMLayerState(zeros, zeros) if state is None else state
        output, h, c = layer.steps(x, before.h, before.c, lengths)
        return output, LSTMLayerState(h, c)

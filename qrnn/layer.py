"""One quasi-recurrent layer: a convolution over time, then the pooling (section 2, eq. 1 to 7).

Axes: T time steps, B batch rows, n input size, m hidden size, k filter width.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .conv import check_extra_padding, conv_over_time, next_tail, product_dtype
from .pooling.ops import BACKENDS, check_initial, check_lengths, pool_packed
from .pooling.reference import state_dtype, steps_beyond
from .state import known_to_torch

POOLINGS = {"f": "zf", "fo": "zfo", "ifo": "zfio"}  # parts of each pooling, in the order of the weights' columns
Mode = Literal["window", "ungated", "step"]
"""How a layer is called: for its output over a window; for state and output gate apart; for one time step."""


@known_to_torch
class QRNNLayerState(NamedTuple):
    """What a layer hands to the next window of the same rows."""

    h: Tensor
    """(B, m) the output at each row's last step."""
    c: Tensor
    """(B, m) the pooling's state after each row's last step; h for f-pooling."""
    tail: Tensor
    """(k - 1, B, n) each row's last k - 1 inputs; empty (0, B, n) where the convolution is unmasked."""


class QRNNLayer(nn.Module):
    """Convolution over time, then f-, fo- or ifo-pooling.

    Parameters: `weight` (k, n, G * m), `weight[k - 1]` meeting the current step; `bias` (G * m,); with a
    context, `context_weight` (context_size, G * m), V of eq. 7. Columns lie in the order z, f, i, o, those
    that the pooling has. They start uniform within +-1/sqrt(fan in), as torch's own convolution does.

    Args:
        input_size, hidden_size: n and m.
        kernel_size: k, at least 1.
        pooling: "f" (eq. 3), "fo" (eq. 4) or "ifo" (eq. 5).
        zoneout: probability p of eq. 6, drawn in training only.
        zoneout_evaluation: what evaluation makes of zoneout, of which the paper says only that the dropout's
            output is not rescaled: "none", the gate as it is, or "scaled", the gate's expectation under eq. 6,
            1 - (1 - p)(1 - f), as Krueger et al. (2016) and the authors' later library have it.
        bias: whether to learn an additive bias; eq. 1 has none.
        causal: masked convolution, which sees no later step; if false, unmasked (for encoders), which carries
            no tail.
        extra_padding: as for `conv.conv_over_time`; of an unmasked convolution only.
        context_size: width of the vector that eq. 7 adds to every gate through V; None for none.
        backend: as for `qrnn.pool`; with "reference" the convolution is of torch's plain operations too.
        device, dtype: of the parameters, as for torch's modules.

    Raises:
        ValueError: an argument out of range; the message names it, with expected and got.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        kernel_size: int = 2,
        pooling: str = "fo",
        zoneout: float = 0.0,
        zoneout_evaluation: str = "none",
        bias: bool = True,
        causal: bool = True,
        extra_padding: str = "left",
        context_size: int | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(input_size=input_size, hidden_size=hidden_size, kernel_size=kernel_size)
        if context_size is not None:
            check_positive(context_size=context_size)
        if pooling not in POOLINGS:
            raise ValueError(f"pooling: expected one of {', '.join(POOLINGS)}, got {pooling!r}")
        if not 0 <= zoneout < 1:
            raise ValueError(f"zoneout: expected a probability in [0, 1), got {zoneout}")
        if zoneout_evaluation not in ("none", "scaled"):
            raise ValueError(f"zoneout_evaluation: expected none or scaled, got {zoneout_evaluation!r}")
        check_extra_padding(extra_padding, causal)
        if backend not in ("auto", *BACKENDS):
            raise ValueError(f"backend: expected auto or one of {', '.join(BACKENDS)}, got {backend!r}")
        self.input_size, self.hidden_size, self.kernel_size = input_size, hidden_size, kernel_size
        self.pooling, self.zoneout, self.causal, self.backend = pooling, zoneout, causal, backend
        self.zoneout_evaluation, self.extra_padding = zoneout_evaluation, extra_padding
        columns = len(POOLINGS[pooling]) * hidden_size

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, columns, device=device, dtype=dtype))

        self.weight = parameter(kernel_size, input_size)
        self.bias = parameter() if bias else None
        self.context_weight = None if context_size is None else parameter(context_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all parameters anew from torch's generator."""
        bound = (self.kernel_size * self.input_size) ** -0.5
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                nn.init.uniform_(parameter, -bound, bound)
        if self.context_weight is not None:
            bound = self.context_weight.shape[0] ** -0.5
            nn.init.uniform_(self.context_weight, -bound, bound)

    def forward(
        self,
        x: Tensor,
        state: QRNNLayerState | None = None,
        lengths: Tensor | None = None,
        context: Tensor | None = None,
        *,
        mode: Mode = "window",
    ) -> tuple[Any, QRNNLayerState]:
        """Runs the layer over a window.

        Args:
            x: (T, B, n).
            state: what the previous window of these rows returned; zeros if None.
            lengths: (B,) int64 in [0, T], the steps of each row that count; all if None.
            context: (B, context_size), added to every step's pre-activations through V (eq. 7).
            mode: "ungated" and "step" are for `forward_ungated` and `step`, which call the module too, so that its
                hooks (pruning, sharding, weight norm) act on every way of running it.

        Returns:
            (h (T, B, m), 0 beyond a row's length; state).
        """
        if mode == "window":
            return self._window(x, state, lengths, context)
        if mode == "ungated":
            return self._ungated(x, state, lengths, context)
        if mode != "step":
            raise ValueError(f"mode: expected window, ungated or step, got {mode!r}")
        if lengths is not None:
            raise ValueError("lengths: expected None for one step at a time, got a tensor")
        if self._steps_apart():
            return self._step(x, state, context)
        output, after = self._window(x.unsqueeze(0), state, None, context)
        return output[0], after

    def _window(
        self, x: Tensor, state: QRNNLayerState | None, lengths: Tensor | None, context: Tensor | None
    ) -> tuple[Tensor, QRNNLayerState]:
        gates = self._gates(x, state, lengths, context)
        h, c = self._pool(gates, self.pooling, state, lengths)
        last = last_step(h, lengths, None if state is None else state.h)
        return h, self._state(x, state, lengths, last, c)

    def forward_ungated(
        self,
        x: Tensor,
        state: QRNNLayerState | None = None,
        lengths: Tensor | None = None,
        context: Tensor | None = None,
    ) -> tuple[tuple[Tensor, Tensor | None], QRNNLayerState]:
        """As `forward`, but ((c (T, B, m), o (T, B, m)), state): the state at every step and the output gate
        apart.

        The attentional decoder (eq. 8) puts its attention between the two. o is None for f-pooling, which has
        no gate.
        """
        return self(x, state, lengths, context, mode="ungated")

    def _ungated(
        self, x: Tensor, state: QRNNLayerState | None, lengths: Tensor | None, context: Tensor | None
    ) -> tuple[tuple[Tensor, Tensor | None], QRNNLayerState]:
        before = None if state is None else state.h
        gates = self._gates(x, state, lengths, context)
        states, c = self._pool(gates, self.pooling.replace("o", ""), state, lengths)
        if "o" not in self.pooling:
            return (states, None), self._state(x, state, lengths, last_step(states, lengths, before), c)
        o = torch.sigmoid(gates[..., -self.hidden_size :])
        whole = lengths is None and len(x) > 0  # then only the last step is gated, not all of them
        last = o[-1] * states[-1] if whole else last_step(o * states, lengths, before)
        return (states, o), self._state(x, state, lengths, last, c)

    def step(
        self, x: Tensor, state: QRNNLayerState | None = None, context: Tensor | None = None
    ) -> tuple[Tensor, QRNNLayerState]:
        """One time step of streaming: (h (B, m), state) of x (B, n).

        Gives what `forward` gives for the whole sequence, up to the order of summation: the k inputs meet
        their weights in one matrix product, and the pooling is a handful of torch operations. A backend that
        was asked for by name, and zoneout in training, go through `forward`.

        Raises:
            ValueError: the layer is unmasked, so that an output would need later inputs.
        """
        return self(x, state, None, context, mode="step")

    def _steps_apart(self) -> bool:
        """Whether a step has operations of its own, and is not a window of one step."""
        if not self.causal:
            raise ValueError("causal: expected True for one step at a time, got False: the filter sees later steps")
        return self.backend == "auto" and not (self.training and self.zoneout > 0)

    def _step(self, x: Tensor, state: QRNNLayerState | None, context: Tensor | None) -> tuple[Tensor, QRNNLayerState]:
        if x.dim() != 2 or x.shape[1] != self.input_size:
            raise ValueError(f"x: expected (B, input_size = {self.input_size}) at a step, got {tuple(x.shape)}")
        product_dtype(x, self.weight)  # names a dtype that does not fit
        window = x.unsqueeze(0)
        if self.kernel_size > 1:
            tail = x.new_zeros((self.kernel_size - 1, *x.shape)) if state is None else state.tail.to(x.dtype)
            window = torch.cat([tail, window])  # (k, B, n)
        flat = window.transpose(0, 1).reshape(x.shape[0], -1)
        gates = nn.functional.linear(flat, self.weight.flatten(0, 1).t(), self.bias)
        gates = self._scaled(self._with_context(gates, context))
        h, c = self._pool_step(gates, None if state is None else state.c)
        return h, QRNNLayerState(h, c, window[1:])

    def extra_repr(self) -> str:
        return (
            f"{self.input_size}, {self.hidden_size}, kernel_size={self.kernel_size},"
            f" pooling={self.pooling!r},"
            f" zoneout={self.zoneout}, zoneout_evaluation={self.zoneout_evaluation!r}, bias={self.bias is not None},"
            f" causal={self.causal}, extra_padding={self.extra_padding!r}, backend={self.backend!r}"
        )

    def _pool_step(self, gates: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """(h, c), each (B, m), of one step's pre-activations (B, G * m) and the state before it (eq. 3, 4, 5)."""
        check_initial(gates[:, : self.hidden_size].unsqueeze(0), before)
        dtype = gates.dtype
        gates = gates.to(state_dtype(dtype))
        z, others = torch.tanh(gates[:, : self.hidden_size]), torch.sigmoid(gates[:, self.hidden_size :])
        f, *rest = others.chunk(len(POOLINGS[self.pooling]) - 1, dim=-1)
        before = torch.zeros_like(f) if before is None else before.to(f.dtype)
        # lerp(z, before, f) is z + f (before - z) = f before + (1 - f) z
        c = torch.addcmul(f * before, rest[0], z) if "i" in self.pooling else torch.lerp(z, before, f)
        return (rest[-1] * c if "o" in self.pooling else c).to(dtype), c

    def _with_context(self, gates: Tensor, context: Tensor | None) -> Tensor:
        """Pre-activations (..., G * m) with V h added (eq. 7)."""
        if context is None and self.context_weight is None:
            return gates
        if context is None or self.context_weight is None:
            raise ValueError(
                f"context: expected {'None' if self.context_weight is None else '(B, context_size)'}"
                f" as the layer was built, got {'None' if context is None else tuple(context.shape)}"
            )
        expected = (gates.shape[-2], self.context_weight.shape[0])
        if context.shape != expected:
            raise ValueError(f"context: expected (B, context_size) = {expected}, got {tuple(context.shape)}")
        return gates + context @ self.context_weight

    def _scaled(self, gates: Tensor) -> Tensor:
        """Pre-activations (..., G * m); where `zoneout_evaluation` asks for it, of the forget gate's expectation.

        That is p + (1 - p) sigmoid(a), which is the sigmoid of log(e^a + p) - log(1 - p).
        """
        if self.training or self.zoneout == 0 or self.zoneout_evaluation == "none":
            return gates
        z, f, *rest = gates.split(self.hidden_size, dim=-1)
        odds = torch.logaddexp(f, torch.full_like(f, math.log(self.zoneout)))
        return torch.cat([z, odds - math.log1p(-self.zoneout), *rest], dim=-1)

    def _gates(self, x: Tensor, state: QRNNLayerState | None, lengths: Tensor | None, context: Tensor | None) -> Tensor:
        """Pre-activations of all gates, (T, B, G * m) (eq. 1, 7)."""
        if x.dim() != 3 or x.shape[2] != self.input_size:
            raise ValueError(f"x: expected (T, B, input_size = {self.input_size}), got {tuple(x.shape)}")
        check_lengths(x, lengths)
        if lengths is not None:  # an unmasked filter would look into the padding, and a NaN there is in every gradient
            x = x.masked_fill(steps_beyond(lengths, x.shape[0]), 0.0)
        tail = state.tail if state is not None and self.causal else None
        gates = conv_over_time(
            x, self.weight, self.bias, tail=tail, causal=self.causal, extra_padding=self.extra_padding,
            plain=self.backend == "reference",
        )  # fmt: skip
        return self._scaled(self._with_context(gates, context))

    def _pool(
        self, gates: Tensor, pooling: str, state: QRNNLayerState | None, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        columns = {"f": 2, "if": 3, "fo": 3, "ifo": 4}[pooling] * self.hidden_size
        return pool_packed(
            gates[..., :columns],
            pooling,
            initial=None if state is None else state.c,
            zoneout=self.zoneout,
            training=self.training,
            lengths=lengths,
            backend=self.backend,
        )

    def _state(
        self, x: Tensor, state: QRNNLayerState | None, lengths: Tensor | None, h: Tensor, c: Tensor
    ) -> QRNNLayerState:
        if not self.causal:
            return QRNNLayerState(h, c, x.new_empty((0, *x.shape[1:])))
        return QRNNLayerState(h, c, next_tail(x, None if state is None else state.tail, self.kernel_size, lengths))


@contextlib.contextmanager
def scaled_zoneout(model: nn.Module) -> Iterator[None]:
    """Within it, each `QRNNLayer` of the model evaluates with `zoneout_evaluation="scaled"`, whatever it has itself."""
    layers = [layer for layer in model.modules() if isinstance(layer, QRNNLayer)]
    own = [layer.zoneout_evaluation for layer in layers]
    for layer in layers:
        layer.zoneout_evaluation = "scaled"
    try:
        yield
    finally:
        for layer, evaluation in zip(layers, own, strict=True):
            layer.zoneout_evaluation = evaluation


def reverse_steps(x: Tensor, lengths: Tensor | None) -> Tensor:
    """x (T, B, ...) with the first lengths[b] steps of each row b reversed; what lies beyond stays in place."""
    if lengths is None:
        return x.flip(0)
    steps = torch.arange(x.shape[0], device=x.device).unsqueeze(-1)  # (T, 1)
    source = torch.where(steps < lengths, lengths - 1 - steps, steps)  # (T, B)
    return x.gather(0, source.view(*source.shape, *[1] * (x.dim() - 2)).expand_as(x))


def last_step(h: Tensor, lengths: Tensor | None, before: Tensor | None) -> Tensor:
    """h (T, B, m) at each row's last step, (B, m); a row of no steps keeps `before`, or zeros."""
    if h.shape[0] == 0:
        return h.new_zeros(h.shape[1:]) if before is None else before
    if lengths is None:
        return h[-1].clone()  # a view would keep the whole window's output alive
    picked = h.gather(0, (lengths - 1).clamp(min=0).view(1, -1, 1).expand(1, -1, h.shape[2])).squeeze(0)
    before = torch.zeros_like(picked) if before is None else before.to(picked.dtype)
    return torch.where((lengths > 0).unsqueeze(-1), picked, before)


def check_positive(**sizes: int) -> None:
    """Raises ValueError unless every size is an integer of at least 1."""
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}: expected an integer of at least 1, got {size!r}")

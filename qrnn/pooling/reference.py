"""The pooling's definition: a plain torch loop over time, differentiable by torch. Every backend is held
against it.

Axes: T time steps, B batch rows, C channels.
"""

import torch
from torch import Tensor


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a recurrence over `dtype` keeps its state: float32 for the half-precision types."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def steps_beyond(lengths: Tensor, steps: int) -> Tensor:
    """(T, B, 1) bool: true at the steps beyond a row's length."""
    return (torch.arange(steps, device=lengths.device).unsqueeze(-1) >= lengths).unsqueeze(-1)


def pool(
    z: Tensor,
    f: Tensor,
    o: Tensor | None = None,
    i: Tensor | None = None,
    *,
    initial: Tensor | None = None,
    zoned: Tensor | None = None,
    lengths: Tensor | None = None,
    activated: bool = False,
) -> tuple[Tensor, Tensor]:
    """f-, fo- or ifo-pooling (eq. 3, 4, 5) of gates (T, B, C), with `zoned` the channels that zoneout keeps
    (eq. 6).

    Args and results are those of `qrnn.pool`, except that the zoneout mask (T, B, C) bool is given.
    """
    work = state_dtype(z.dtype)
    if lengths is not None:  # what lies beyond a row's length has no part, be it NaN
        beyond = steps_beyond(lengths, z.shape[0])
        z, f = z.masked_fill(beyond, 0.0), f.masked_fill(beyond, 0.0)
        o, i = (None if gate is None else gate.masked_fill(beyond, 0.0) for gate in (o, i))
    z, f = z.to(work), f.to(work)
    o, i = (None if gate is None else gate.to(work) for gate in (o, i))
    if not activated:
        z, f = torch.tanh(z), torch.sigmoid(f)
        o, i = (None if gate is None else torch.sigmoid(gate) for gate in (o, i))
    if zoned is not None:
        f = f.masked_fill(zoned, 1.0)  # eq. 6: dropout on 1 - f, not rescaled
    c = z.new_zeros(z.shape[1:]) if initial is None else initial.to(work)
    i = 1 - f if i is None else i
    outputs = []
    for t, (z_t, f_t, i_t, o_t) in enumerate(zip(z, f, i, z if o is None else o, strict=True)):
        after = f_t * c + i_t * z_t
        h = after if o is None else o_t * after
        if lengths is not None:
            running = (t < lengths).unsqueeze(-1)
            after = torch.where(running, after, c)
            h = torch.where(running, h, torch.zeros_like(h))
        c = after
        outputs.append(h)
    return (torch.stack(outputs) if outputs else torch.zeros_like(z)), c

"""The pooling on the CPU: numba kernels, forward and backward, with the activations fused in.

Axes: T time steps, B batch rows, C channels. The recurrence runs serially over time; a work item is one batch
row and one block of channels, so that the inner loops are plain vector loops over adjacent channels, and the
items of a thread step through time together, so that memory is read in the order it lies in. Rows of
pre-activations without zoneout take one fused loop; the others activate each gate into scratch memory that stays
in the first-level cache. Gates are recomputed in backward, so that memory sees every element once:
forward reads z, f, o and writes h and c, backward reads z, f, o, c, dh and writes dz, df, do.

The kernels are serial and release the GIL; a small thread pool of this module runs them side by side. There
is then no second OpenMP runtime beside torch's, a forked child simply builds its own pool, and one setting
governs both: `torch.set_num_threads`.
"""

import ctypes
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numba import carray, njit, types
from numba.core.compiler import Compiler
from numba.extending import intrinsic, overload

DTYPES = (torch.float32, torch.float64)

# A plan is one int64 array: addresses, strides in elements, sizes and flags. It keeps a launch at a few
# microseconds where passing each tensor as an array would cost one or two microseconds apiece.
_TENSORS = (
    "z",
    "f",
    "o",
    "i",
    "initial",
    "zoned",
    "lengths",
    "h",
    "last",
    "c",
    "dh",
    "dlast",
    "dz",
    "df",
    "do",
    "di",
    "dinitial",
)
_ADDRESS = {name: 3 * position for position, name in enumerate(_TENSORS)}
(_Z, _F, _O, _I, _INITIAL, _ZONED, _LENGTHS, _H, _LAST, _C, _DH, _DLAST, _DZ, _DF, _DO, _DI, _DINITIAL) = (
    _ADDRESS[name] for name in _TENSORS
)
_SIZES = 3 * len(_TENSORS)
_STEPS, _CHANNELS, _BLOCK, _GROUP, _ACTIVATED = range(_SIZES, _SIZES + 5)

_WIDEST_BLOCK = 1024  # channels: four scratch rows and a state row of float32 fill 20 KiB of first-level cache
_NARROWEST_BLOCK = 32  # channels: below this the vector loops are mostly their own beginnings and ends
_GROUP_CHANNELS = 32768  # channels that step through time together: 128 KiB of float32 in second-level cache
_SERIAL_ELEMENTS = 16384  # T * B * C below which waking another thread costs more than it brings

_fused: Any = {
    "nogil": True,
    "cache": True,
    "error_model": "numpy",
    "fastmath": {"contract", "nsz"},
    "boundscheck": False,
}


@intrinsic
def _pointer(typingctx, address, witness):
    """The int64 address as a pointer to elements of the witness's type."""
    pointer = types.CPointer(witness.dtype if isinstance(witness, types.Array) else witness)

    def build(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(pointer))

    return pointer(types.int64, witness), build


# exp(r) - 1 for |r| <= ln(2) / 2 by its Taylor series; the first term left out is below the type's rounding
# error.


@njit(**_fused)
def _expm1_series32(r):
    p = np.float32(1 / 5040)
    p = p * r + np.float32(1 / 720)
    p = p * r + np.float32(1 / 120)
    p = p * r + np.float32(1 / 24)
    p = p * r + np.float32(1 / 6)
    p = p * r + np.float32(1 / 2)
    return p * r * r + r


@njit(**_fused)
def _expm1_series64(r):
    p = 1 / 6227020800
    p = p * r + 1 / 479001600
    p = p * r + 1 / 39916800
    p = p * r + 1 / 3628800
    p = p * r + 1 / 362880
    p = p * r + 1 / 40320
    p = p * r + 1 / 5040
    p = p * r + 1 / 720
    p = p * r + 1 / 120
    p = p * r + 1 / 24
    p = p * r + 1 / 6
    p = p * r + 1 / 2
    return p * r * r + r


# x = n ln(2) + r. Adding 1.5 * 2^(mantissa bits) leaves round(x / ln 2) = n in the low bits, from which 2^n
# is built by a shift: no float-to-integer conversion, whose result is undefined for NaN. Comparisons are
# written so that NaN passes.


@njit(**_fused)
def _split32(x):
    """(2^n, exp(r) - 1) with exp(x) = 2^n exp(r), for |x| <= 87."""
    shifted = x * np.float32(1.4426950408889634) + np.float32(12582912.0)
    n = shifted - np.float32(12582912.0)
    r = x - n * np.float32(0.693359375)
    r = r + n * np.float32(2.1219444005469057e-04)
    bits = (np.float32(shifted).view(np.int32) << np.int32(23)) + np.int32(0x3F800000)
    return np.int32(bits).view(np.float32), _expm1_series32(r)


@njit(**_fused)
def _split64(x):
    """(2^n, exp(r) - 1) with exp(x) = 2^n exp(r), for |x| <= 700."""
    shifted = x * 1.4426950408889634 + 6755399441055744.0
    n = shifted - 6755399441055744.0
    r = x - n * 0.693145751953125
    r = r - n * 1.4286068203094172e-06
    bits = (np.float64(shifted).view(np.int64) << np.int64(52)) + np.int64(0x3FF0000000000000)
    return np.int64(bits).view(np.float64), _expm1_series64(r)


@njit(**_fused)
def _sigmoid32(x):
    y = -x
    y = np.float32(87) if y > np.float32(87) else y
    y = np.float32(-87) if y < np.float32(-87) else y
    scale, series = _split32(y)
    return np.float32(1) / (np.float32(1) + (scale + scale * series))


@njit(**_fused)
def _sigmoid64(x):
    y = -x
    y = 700.0 if y > 700.0 else y
    y = -700.0 if y < -700.0 else y
    scale, series = _split64(y)
    return 1.0 / (1.0 + (scale + scale * series))


@njit(**_fused)
def _tanh32(x):
    y = np.float32(2) * x
    y = np.float32(40) if y > np.float32(40) else y
    y = np.float32(-40) if y < np.float32(-40) else y
    scale, series = _split32(y)
    grown = (scale - np.float32(1)) + scale * series
    return grown / (grown + np.float32(2))


@njit(**_fused)
def _tanh64(x):
    y = 2.0 * x
    y = 50.0 if y > 50.0 else y
    y = -50.0 if y < -50.0 else y
    scale, series = _split64(y)
    grown = (scale - 1.0) + scale * series
    return grown / (grown + 2.0)


def _sigmoid(x):
    """The logistic function of a compiled float32 or float64 scalar."""


def _tanh(x):
    """The hyperbolic tangent of a compiled float32 or float64 scalar."""


@overload(_sigmoid, inline="always")
def _sigmoid_by_type(x):
    return (lambda x: _sigmoid32(x)) if x == types.float32 else (lambda x: _sigmoid64(x))


@overload(_tanh, inline="always")
def _tanh_by_type(x):
    return (lambda x: _tanh32(x)) if x == types.float32 else (lambda x: _tanh64(x))


@njit(**_fused)
def _row(plan, tensor, t, b, first, width, witness):
    """Elements [first, first + width) of row (t, b) of a tensor of the plan, in the witness's dtype."""
    offset = t * plan[tensor + 1] + b * plan[tensor + 2] + first
    return carray(_pointer(plan[tensor] + offset * witness.itemsize, witness), (width,))


@njit(**_fused)
def _valid_steps(plan, b):
    """Steps of row b that count. Clamped: an unchecked length must not reach foreign memory."""
    if plan[_LENGTHS] == 0:
        return plan[_STEPS]
    length = carray(_pointer(plan[_LENGTHS] + 8 * b, plan[0]), (1,))[0]
    return min(max(length, 0), plan[_STEPS])


@njit(**_fused)
def _gate_row(plan, tensor, t, b, first, out):
    """out = the gate's row, activated by a sigmoid unless it comes activated."""
    source = _row(plan, tensor, t, b, first, out.size, out)
    if plan[_ACTIVATED]:
        out[:] = source
    else:
        for k in range(out.size):
            out[k] = _sigmoid(source[k])


@njit(**_fused)
def _candidate_row(plan, t, b, first, out):
    """out = the candidate's row, activated by a tanh unless it comes activated."""
    source = _row(plan, _Z, t, b, first, out.size, out)
    if plan[_ACTIVATED]:
        out[:] = source
    else:
        for k in range(out.size):
            out[k] = _tanh(source[k])


@njit(**_fused)
def _forget_row(plan, t, b, first, out):
    """out = the forget gate's row, 1 where a channel is zoned out (eq. 6)."""
    _gate_row(plan, _F, t, b, first, out)
    if plan[_ZONED]:
        offset = t * plan[_ZONED + 1] + b * plan[_ZONED + 2] + first
        zoned = carray(_pointer(plan[_ZONED] + offset, np.uint8(0)), (out.size,))
        for k in range(out.size):
            out[k] = 1 if zoned[k] else out[k]


# The common rows, pre-activations without zoneout, take one fused loop each: every element is read once and
# stays in registers. Their arrays never overlap; without that promise (noalias) the loops are not vectorised.
# A gradient that decays over hundreds of steps ends in denormal numbers, which make matrix products of the
# gates' gradients ten times slower; below 1e-30 (float32) it is nothing beside any other part of a sum, so 0.


class _NoAlias(Compiler):
    """numba's compiler with the promise that array arguments do not overlap, which `njit` has no option for."""

    def define_pipelines(self):
        self.state.flags.noalias = True
        return super().define_pipelines()


@njit(**_fused)
def _smallest(witness):
    return witness.dtype.type(1e-30 if witness.itemsize == 4 else 1e-290)


@njit(pipeline_class=_NoAlias, **_fused)
def _f_forward(z, f, state, h):
    one = state.dtype.type(1)
    for k in range(state.size):
        forget = _sigmoid(f[k])
        new = forget * state[k] + (one - forget) * _tanh(z[k])
        state[k] = new
        h[k] = new


@njit(pipeline_class=_NoAlias, **_fused)
def _fo_forward(z, f, o, state, c, h):
    one = state.dtype.type(1)
    for k in range(state.size):
        forget = _sigmoid(f[k])
        new = forget * state[k] + (one - forget) * _tanh(z[k])
        state[k] = new
        c[k] = new
        h[k] = _sigmoid(o[k]) * new


@njit(pipeline_class=_NoAlias, **_fused)
def _ifo_forward(z, f, o, i, state, c, h):
    for k in range(state.size):
        new = _sigmoid(f[k]) * state[k] + _sigmoid(i[k]) * _tanh(z[k])
        state[k] = new
        c[k] = new
        h[k] = _sigmoid(o[k]) * new


@njit(pipeline_class=_NoAlias, **_fused)
def _f_backward(z, f, before, dh, flow, dz, df):
    one, zero, least = flow.dtype.type(1), flow.dtype.type(0), _smallest(flow)
    for k in range(flow.size):
        forget, candidate = _sigmoid(f[k]), _tanh(z[k])
        total = flow[k] + dh[k]
        toward = total * (one - forget)
        df[k] = toward * forget * (before[k] - candidate)
        dz[k] = toward * (one - candidate * candidate)
        total = total * forget
        flow[k] = zero if abs(total) < least else total


@njit(pipeline_class=_NoAlias, **_fused)
def _fo_backward(z, f, o, before, c, dh, flow, dz, df, do):
    one, zero, least = flow.dtype.type(1), flow.dtype.type(0), _smallest(flow)
    for k in range(flow.size):
        forget, candidate, gate = _sigmoid(f[k]), _tanh(z[k]), _sigmoid(o[k])
        slope = dh[k] * gate
        do[k] = slope * c[k] * (one - gate)
        total = flow[k] + slope
        toward = total * (one - forget)
        df[k] = toward * forget * (before[k] - candidate)
        dz[k] = toward * (one - candidate * candidate)
        total = total * forget
        flow[k] = zero if abs(total) < least else total


@njit(pipeline_class=_NoAlias, **_fused)
def _ifo_backward(z, f, o, i, before, c, dh, flow, dz, df, do, di):
    one, zero, least = flow.dtype.type(1), flow.dtype.type(0), _smallest(flow)
    for k in range(flow.size):
        forget, candidate, gate, gain = _sigmoid(f[k]), _tanh(z[k]), _sigmoid(o[k]), _sigmoid(i[k])
        slope = dh[k] * gate
        do[k] = slope * c[k] * (one - gate)
        total = flow[k] + slope
        df[k] = total * before[k] * forget * (one - forget)
        dz[k] = total * gain * (one - candidate * candidate)
        di[k] = total * candidate * gain * (one - gain)
        total = total * forget
        flow[k] = zero if abs(total) < least else total


@njit(**_fused)
def _initial_row(plan, b, first, out):
    if plan[_INITIAL]:
        out[:] = _row(plan, _INITIAL, 0, b, first, out.size, out)
    else:
        out[:] = 0


@njit(**_fused)
def _has_fused_row(plan):
    return not plan[_ACTIVATED] and not plan[_ZONED] and (plan[_O] or not plan[_I])


@njit(**_fused)
def _fused_forward_row(plan, t, b, first, state, unkept):
    width = state.size
    z = _row(plan, _Z, t, b, first, width, state)
    f = _row(plan, _F, t, b, first, width, state)
    h = _row(plan, _H, t, b, first, width, state)
    if plan[_O] == 0:
        _f_forward(z, f, state, h)
        return
    o = _row(plan, _O, t, b, first, width, state)
    c = _row(plan, _C, t, b, first, width, state) if plan[_C] else unkept
    if plan[_I]:
        _ifo_forward(z, f, o, _row(plan, _I, t, b, first, width, state), state, c, h)
    else:
        _fo_forward(z, f, o, state, c, h)


@njit(**_fused)
def _fused_backward_row(plan, t, b, first, flow, start):
    width = flow.size
    z = _row(plan, _Z, t, b, first, width, flow)
    f = _row(plan, _F, t, b, first, width, flow)
    dh = _row(plan, _DH, t, b, first, width, flow)
    dz = _row(plan, _DZ, t, b, first, width, flow)
    df = _row(plan, _DF, t, b, first, width, flow)
    if t > 0:
        before = _row(plan, _C, t - 1, b, first, width, flow)
    else:
        _initial_row(plan, b, first, start)
        before = start
    if plan[_O] == 0:
        _f_backward(z, f, before, dh, flow, dz, df)
        return
    o = _row(plan, _O, t, b, first, width, flow)
    c = _row(plan, _C, t, b, first, width, flow)
    do = _row(plan, _DO, t, b, first, width, flow)
    if plan[_I]:
        i = _row(plan, _I, t, b, first, width, flow)
        _ifo_backward(z, f, o, i, before, c, dh, flow, dz, df, do, _row(plan, _DI, t, b, first, width, flow))
    else:
        _fo_backward(z, f, o, before, c, dh, flow, dz, df, do)


@njit(**_fused)
def _forward_row(plan, t, b, first, state, forget, candidate, gate):
    """One step of one row: the state moves on, h and c are written."""
    width = state.size
    if _has_fused_row(plan):
        _fused_forward_row(plan, t, b, first, state, forget)
        return
    one = state.dtype.type(1)
    _forget_row(plan, t, b, first, forget)
    _candidate_row(plan, t, b, first, candidate)
    if plan[_I]:
        _gate_row(plan, _I, t, b, first, gate)
        for k in range(width):
            state[k] = forget[k] * state[k] + gate[k] * candidate[k]
    else:
        for k in range(width):
            state[k] = forget[k] * state[k] + (one - forget[k]) * candidate[k]
    if plan[_C]:
        _row(plan, _C, t, b, first, width, state)[:] = state
    h = _row(plan, _H, t, b, first, width, state)
    if plan[_O]:
        _gate_row(plan, _O, t, b, first, gate)
        for k in range(width):
            h[k] = gate[k] * state[k]
    else:
        h[:] = state


@njit(**_fused)
def _forward_group(plan, start, stop, state, scratch):
    """Forward of the work items [start, stop), all of them at one step before any at the next."""
    block = plan[_BLOCK]
    blocks = (plan[_CHANNELS] + block - 1) // block
    for t in range(-1, plan[_STEPS]):
        for item in range(start, stop):
            b, first = item // blocks, (item % blocks) * block
            width = min(block, plan[_CHANNELS] - first)
            row = state[item - start, :width]
            if t < 0:
                _initial_row(plan, b, first, row)
            elif t < _valid_steps(plan, b):
                _forward_row(plan, t, b, first, row, scratch[0, :width], scratch[1, :width], scratch[2, :width])
            else:
                _row(plan, _H, t, b, first, width, state)[:] = 0
            if t == plan[_STEPS] - 1:
                _row(plan, _LAST, 0, b, first, width, state)[:] = row


@njit(**_fused)
def _output_gradient(plan, t, b, first, flow, gate):
    """Adds the output's gradient to the state's (flow) and writes the output gate's."""
    width, one = flow.size, flow.dtype.type(1)
    dh = _row(plan, _DH, t, b, first, width, flow)
    if plan[_O] == 0:
        for k in range(width):
            flow[k] += dh[k]
        return
    _gate_row(plan, _O, t, b, first, gate)
    c = _row(plan, _C, t, b, first, width, flow)
    do = _row(plan, _DO, t, b, first, width, flow)
    if plan[_ACTIVATED]:
        for k in range(width):
            do[k] = dh[k] * c[k]
    else:
        for k in range(width):
            do[k] = dh[k] * c[k] * gate[k] * (one - gate[k])
    for k in range(width):
        flow[k] += dh[k] * gate[k]


@njit(**_fused)
def _coupled_gradient(plan, t, b, first, flow, forget, candidate, before):
    """Gradients of z and f where the input gate is 1 - f."""
    width, one = flow.size, flow.dtype.type(1)
    dz = _row(plan, _DZ, t, b, first, width, flow)
    df = _row(plan, _DF, t, b, first, width, flow)
    if plan[_ACTIVATED]:
        for k in range(width):
            df[k] = flow[k] * (before[k] - candidate[k])
            dz[k] = flow[k] * (one - forget[k])
    else:
        for k in range(width):
            toward = flow[k] * (one - forget[k])
            df[k] = toward * forget[k] * (before[k] - candidate[k])
            dz[k] = toward * (one - candidate[k] * candidate[k])


@njit(**_fused)
def _separate_gradient(plan, t, b, first, flow, forget, candidate, before, gate):
    """Gradients of z, f and i where the input gate is a gate of its own."""
    width, one = flow.size, flow.dtype.type(1)
    dz = _row(plan, _DZ, t, b, first, width, flow)
    df = _row(plan, _DF, t, b, first, width, flow)
    di = _row(plan, _DI, t, b, first, width, flow)
    _gate_row(plan, _I, t, b, first, gate)
    if plan[_ACTIVATED]:
        for k in range(width):
            df[k] = flow[k] * before[k]
            dz[k] = flow[k] * gate[k]
        for k in range(width):
            di[k] = flow[k] * candidate[k]
    else:
        for k in range(width):
            df[k] = flow[k] * before[k] * forget[k] * (one - forget[k])
            dz[k] = flow[k] * gate[k] * (one - candidate[k] * candidate[k])
        for k in range(width):
            di[k] = flow[k] * candidate[k] * gate[k] * (one - gate[k])


@njit(**_fused)
def _no_gradient_where_zoned(plan, t, b, first, width, witness):
    offset = t * plan[_ZONED + 1] + b * plan[_ZONED + 2] + first
    zoned = carray(_pointer(plan[_ZONED] + offset, np.uint8(0)), (width,))
    df = _row(plan, _DF, t, b, first, width, witness)
    for k in range(width):
        df[k] = 0 if zoned[k] else df[k]


@njit(**_fused)
def _clear_gradients(plan, t, b, first, width, witness):
    _row(plan, _DZ, t, b, first, width, witness)[:] = 0
    _row(plan, _DF, t, b, first, width, witness)[:] = 0
    if plan[_O]:
        _row(plan, _DO, t, b, first, width, witness)[:] = 0
    if plan[_I]:
        _row(plan, _DI, t, b, first, width, witness)[:] = 0


@njit(**_fused)
def _backward_row(plan, t, b, first, flow, forget, candidate, gate, before):
    """One step back of one row: the state's gradient (flow) moves on, the gates' gradients are written."""
    width = flow.size
    if _has_fused_row(plan):
        _fused_backward_row(plan, t, b, first, flow, before)
        return
    _output_gradient(plan, t, b, first, flow, gate)
    _forget_row(plan, t, b, first, forget)
    _candidate_row(plan, t, b, first, candidate)
    if t > 0:
        before[:] = _row(plan, _C, t - 1, b, first, width, flow)
    else:
        _initial_row(plan, b, first, before)
    if plan[_I]:
        _separate_gradient(plan, t, b, first, flow, forget, candidate, before, gate)
    else:
        _coupled_gradient(plan, t, b, first, flow, forget, candidate, before)
    if plan[_ZONED] and plan[_ACTIVATED]:
        # A pre-activation's gradient vanishes by itself there: its factor f (1 - f) is 0.
        _no_gradient_where_zoned(plan, t, b, first, width, flow)
    least, zero = _smallest(flow), flow.dtype.type(0)
    for k in range(width):
        total = flow[k] * forget[k]
        flow[k] = zero if abs(total) < least else total


@njit(**_fused)
def _backward_group(plan, start, stop, flow, scratch):
    """Backward of the work items [start, stop), all of them at one step before any at the one before."""
    block = plan[_BLOCK]
    blocks = (plan[_CHANNELS] + block - 1) // block
    steps = plan[_STEPS]
    for back in range(-1, steps):
        t = steps - 1 - back
        for item in range(start, stop):
            b, first = item // blocks, (item % blocks) * block
            width = min(block, plan[_CHANNELS] - first)
            row = flow[item - start, :width]
            if back < 0:
                row[:] = _row(plan, _DLAST, 0, b, first, width, flow)
            elif t < _valid_steps(plan, b):
                _backward_row(
                    plan,
                    t,
                    b,
                    first,
                    row,
                    scratch[0, :width],
                    scratch[1, :width],
                    scratch[2, :width],
                    scratch[3, :width],
                )
            else:
                _clear_gradients(plan, t, b, first, width, flow)
            if back == steps - 1 and plan[_DINITIAL]:
                _row(plan, _DINITIAL, 0, b, first, width, flow)[:] = row


@njit(**_fused)
def _forward_range(plan, start, stop, witness):
    """Forward of the work items [start, stop); item = batch row * blocks + channel block."""
    state = np.empty((plan[_GROUP], plan[_BLOCK]), witness.dtype)
    scratch = np.empty((3, plan[_BLOCK]), witness.dtype)
    for group in range(start, stop, plan[_GROUP]):
        _forward_group(plan, group, min(group + plan[_GROUP], stop), state, scratch)


@njit(**_fused)
def _backward_range(plan, start, stop, witness):
    """Backward of the work items [start, stop); item = batch row * blocks + channel block."""
    flow = np.empty((plan[_GROUP], plan[_BLOCK]), witness.dtype)
    scratch = np.empty((4, plan[_BLOCK]), witness.dtype)
    for group in range(start, stop, plan[_GROUP]):
        _backward_group(plan, group, min(group + plan[_GROUP], stop), flow, scratch)


_WITNESS = {torch.float32: np.zeros(1, np.float32), torch.float64: np.zeros(1, np.float64)}
_helpers: ThreadPoolExecutor | None = None
_helper_count = 0


def _forget_helpers() -> None:
    """A forked child inherits the pool's bookkeeping but none of its threads."""
    global _helpers, _helper_count
    _helpers, _helper_count = None, 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_helpers)


def _pool_of(count: int) -> ThreadPoolExecutor:
    global _helpers, _helper_count
    if _helpers is None or _helper_count < count:
        _helpers, _helper_count = ThreadPoolExecutor(count, thread_name_prefix="qrnn-pooling"), count
    return _helpers


_HUGE = 1 << 21  # bytes of a huge page
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
_MADV_HUGEPAGE = 14


def empty(shape, dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
    """`torch.empty` on the CPU in huge pages where the system grants them.

    A large tensor is fresh memory at every call, and faulting it in by pages of 4 KiB takes several times as
    long as filling it. The advice changes no content; a system that refuses it is as slow as before.
    """
    tensor = torch.empty(shape, dtype=dtype, device=device)
    size = tensor.numel() * tensor.element_size()
    if _libc is not None and size >= 2 * _HUGE:
        begin = -(-tensor.data_ptr() // _HUGE) * _HUGE
        length = (tensor.data_ptr() + size - begin) // _HUGE * _HUGE
        _libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), _MADV_HUGEPAGE)
    return tensor


def _block_width(rows: int, channels: int, threads: int) -> int:
    """Channels per work item: wide for long runs of adjacent memory, but items enough for every thread."""
    width = -(-channels // -(-channels // _WIDEST_BLOCK))
    while rows * -(-channels // width) < threads and width > _NARROWEST_BLOCK:
        width = (width + 1) // 2
    return width


def _launch(kernel, plan: np.ndarray, steps: int, rows: int, channels: int, dtype: torch.dtype) -> None:
    if rows == 0 or channels == 0:
        return
    threads = torch.get_num_threads() if steps * rows * channels >= _SERIAL_ELEMENTS else 1
    block = _block_width(rows, channels, threads)
    plan[_BLOCK] = block
    # In (T, B, C) the rows of a step are neighbours in memory and move through time together; in (B, T, C)
    # the steps of a row are, and it goes alone.
    plan[_GROUP] = max(1, _GROUP_CHANNELS // block) if plan[_Z + 1] >= plan[_Z + 2] else 1
    items = rows * -(-channels // block)
    threads = min(threads, items)
    if threads == 1:
        kernel(plan, 0, items, _WITNESS[dtype])
        return
    bounds = [items * share // threads for share in range(threads + 1)]
    waiting = [
        _pool_of(threads - 1).submit(kernel, plan, bounds[share], bounds[share + 1], _WITNESS[dtype])
        for share in range(1, threads)
    ]
    kernel(plan, 0, bounds[1], _WITNESS[dtype])
    for share in waiting:
        share.result()


def _put(plan: np.ndarray, position: int, tensor: torch.Tensor | None) -> None:
    """Enters a (T, B, C) or (B, C) tensor whose channels are adjacent."""
    if tensor is not None:
        strides = tensor.stride()
        plan[position : position + 3] = (
            tensor.data_ptr(),
            strides[0] if tensor.dim() == 3 else 0,
            strides[-2],
        )


def _adjacent(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor, copied if its channels are not adjacent in memory."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def _plan(gates, initial, zoned, lengths, activated: bool) -> np.ndarray:
    steps, _, channels = gates[0].shape
    plan = np.zeros(_ACTIVATED + 1, np.int64)
    for position, tensor in zip((_Z, _F, _O, _I, _INITIAL, _ZONED), (*gates, initial, zoned), strict=True):
        _put(plan, position, tensor)
    if lengths is not None:
        plan[_LENGTHS] = lengths.data_ptr()
    plan[_STEPS], plan[_CHANNELS], plan[_ACTIVATED] = steps, channels, activated
    return plan


def forward(gates, initial, zoned, lengths, activated: bool, keep_state: bool):
    """The pooling of `gates` = (z, f, o or None, i or None), each (T, B, C) float32 or float64 on the CPU.

    Returns (h (T, B, C), last (B, C), c): c holds the states that backward needs, (T, B, C), valid within
    each row's length; it is h itself where there is no output gate, and empty where `keep_state` is false.
    """
    gates = [_adjacent(gate) for gate in gates]
    initial, z, output_gate = _adjacent(initial), gates[0], gates[2]
    lengths = None if lengths is None else lengths.contiguous()
    steps, rows, channels = z.shape
    h = empty((steps, rows, channels), z.dtype)
    last = z.new_empty((rows, channels))
    c = empty((steps, rows, channels) if keep_state and output_gate is not None else (0,), z.dtype)
    plan = _plan(gates, initial, zoned, lengths, activated)
    _put(plan, _H, h)
    _put(plan, _LAST, last)
    _put(plan, _C, c if c.dim() == 3 else None)
    _launch(_forward_range, plan, steps, rows, channels, z.dtype)
    return h, last, c


def backward(grad_h, grad_last, gates, initial, zoned, lengths, c, activated: bool, out, grad_initial) -> None:
    """Writes the gates' gradients into `out` (as `gates`, channels adjacent) and the initial state's."""
    gates = [_adjacent(gate) for gate in gates]
    grad_h, grad_last, initial, c = _adjacent(grad_h), _adjacent(grad_last), _adjacent(initial), _adjacent(c)
    lengths = None if lengths is None else lengths.contiguous()
    steps, rows, channels = gates[0].shape
    plan = _plan(gates, initial, zoned, lengths, activated)
    for position, tensor in zip(
        (_C, _DH, _DLAST, _DZ, _DF, _DO, _DI, _DINITIAL),
        (c, grad_h, grad_last, *out, grad_initial),
        strict=True,
    ):
        _put(plan, position, tensor)
    _launch(_backward_range, plan, steps, rows, channels, gates[0].dtype)

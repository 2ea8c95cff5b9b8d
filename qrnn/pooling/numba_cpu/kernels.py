"""The CPU's pooling kernels, forward and backward, with the activations fused in.

Axes: T time steps, B batch rows, C channels. The recurrence runs serially over time; a work item is one batch
row and one block of channels, so that the inner loops are plain vector loops over adjacent channels, and the
items of a thread step through time together, so that memory is read in the order it lies in. One loop reads every
element of a row once and keeps it in registers; while it runs, the row that comes next is prefetched. Gates are
recomputed in backward, so that memory sees every element once: forward reads z, f, o and writes h and c, backward
reads z, f, o, c, dh and writes dz, df, do.

Each mode is a specialisation of one kernel: what a mode has not is None in its signature, and numba drops the
branches that would use it before it infers types.

All that is compiled is in this file, because numba's cache on disk looks for changes in a kernel's own file alone.
"""

import contextlib
import warnings
from functools import partial

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core.caching import FunctionCache
from numba.core.compiler import Compiler
from numba.extending import intrinsic, overload

# A plan is one int64 array: addresses, strides in elements, sizes and flags. It keeps a launch at a few
# microseconds where passing each tensor as an array would cost one or two microseconds apiece.
_TENSORS = (
    "z", "f", "o", "i", "initial", "zoned", "lengths", "h", "last", "c",
    "dh", "dlast", "dz", "df", "do", "di", "dinitial",
)  # fmt: skip
ADDRESS = {name: 3 * position for position, name in enumerate(_TENSORS)}
"""Where a plan has a tensor's address (0 for none), and after it the strides of a time step and of a row."""
(_Z, _F, _O, _I, _INITIAL, _ZONED, _LENGTHS, _H, _LAST, _C, _DH, _DLAST, _DZ, _DF, _DO, _DI, _DINITIAL) = (
    ADDRESS[name] for name in _TENSORS
)
_SIZES = 3 * len(_TENSORS)
STEPS, CHANNELS, BLOCK, GROUP, PLAN_SIZE = range(_SIZES, _SIZES + 5)
"""Where it has T, C, the channels of a work item and the work items that step through time together; its length."""


class _Cache(FunctionCache):
    """numba's cache on disk of a function's compiled code, which may be full."""

    def save_overload(self, sig, data):
        try:
            super().save_overload(sig, data)
        except OSError as error:
            warnings.warn(f"qrnn: kernels are compiled anew in each process, {self.cache_path}: {error}", stacklevel=2)


def _compiled(function, **options):
    """numba's function of one that is written in its part of Python, kept on disk where numba finds a folder."""
    dispatcher = njit(nogil=True, error_model="numpy", fastmath={"contract", "nsz"}, boundscheck=False, **options)(
        function
    )
    with contextlib.suppress(RuntimeError):  # neither the package's folder can be written to nor one of the user's
        dispatcher._cache = _Cache(function)
    return dispatcher


@intrinsic
def _pointer(typingctx, address, witness):
    """The int64 address as a pointer to elements of the witness's type."""
    pointer = types.CPointer(witness.dtype if isinstance(witness, types.Array) else witness)

    def build(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(pointer))

    return pointer(types.int64, witness), build


# exp(r) - 1 for |r| <= ln(2) / 2 by its Taylor series; the first term left out is below the type's rounding
# error.


@_compiled
def _expm1_series32(r):
    p = np.float32(1 / 5040)
    p = p * r + np.float32(1 / 720)
    p = p * r + np.float32(1 / 120)
    p = p * r + np.float32(1 / 24)
    p = p * r + np.float32(1 / 6)
    p = p * r + np.float32(1 / 2)
    return p * r * r + r


@_compiled
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


@_compiled
def _split32(x):
    """(2^n, exp(r) - 1) with exp(x) = 2^n exp(r), for |x| <= 87."""
    shifted = x * np.float32(1.4426950408889634) + np.float32(12582912.0)
    n = shifted - np.float32(12582912.0)
    r = x - n * np.float32(0.693359375)
    r = r + n * np.float32(2.1219444005469057e-04)
    bits = (np.float32(shifted).view(np.int32) << np.int32(23)) + np.int32(0x3F800000)
    return np.int32(bits).view(np.float32), _expm1_series32(r)


@_compiled
def _split64(x):
    """(2^n, exp(r) - 1) with exp(x) = 2^n exp(r), for |x| <= 700."""
    shifted = x * 1.4426950408889634 + 6755399441055744.0
    n = shifted - 6755399441055744.0
    r = x - n * 0.693145751953125
    r = r - n * 1.4286068203094172e-06
    bits = (np.float64(shifted).view(np.int64) << np.int64(52)) + np.int64(0x3FF0000000000000)
    return np.int64(bits).view(np.float64), _expm1_series64(r)


@_compiled
def _sigmoid32(x):
    y = -x
    y = np.float32(87) if y > np.float32(87) else y
    y = np.float32(-87) if y < np.float32(-87) else y
    scale, series = _split32(y)
    return np.float32(1) / (np.float32(1) + (scale + scale * series))


@_compiled
def _sigmoid64(x):
    y = -x
    y = 700.0 if y > 700.0 else y
    y = -700.0 if y < -700.0 else y
    scale, series = _split64(y)
    return 1.0 / (1.0 + (scale + scale * series))


@_compiled
def _tanh32(x):
    y = np.float32(2) * x
    y = np.float32(40) if y > np.float32(40) else y
    y = np.float32(-40) if y < np.float32(-40) else y
    scale, series = _split32(y)
    grown = (scale - np.float32(1)) + scale * series
    return grown / (grown + np.float32(2))


@_compiled
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


# Rows of a group: where each work item lies, and how many of its steps count.
_ROW, _FIRST, _WIDTH, _VALID = range(4)
_COLUMNS = 4
_ANYWHERE = 1 << 40  # elements: the arrays have no end, their loops do
_LINE = 64  # bytes of a cache line
_PREFETCHED = 64  # channels between two rounds of prefetching: four cache lines of float32 a tensor
_ZONE_WITNESS = np.zeros(1, np.uint8)  # of the type of zoneout's mask


class _NoAlias(Compiler):
    """numba's compiler with the promise that array arguments do not overlap, which `njit` has no option for.

    Without it the loops over channels are not vectorised.
    """

    def define_pipelines(self):
        self.state.flags.noalias = True
        return super().define_pipelines()


@intrinsic
def _prefetch(typingctx, address):
    """Asks for the cache line at an int64 address; any address may be asked for."""

    def build(context, builder, signature, arguments):
        byte_pointer, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte_pointer, word, word, word])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", [byte_pointer], kind)
        for_reading, into_every_level, of_data = word(0), word(3), word(1)
        place = builder.inttoptr(arguments[0], byte_pointer)
        builder.call(prefetch, [place, for_reading, into_every_level, of_data])
        return context.get_dummy_value()

    return types.void(types.int64), build


@_compiled
def _array(plan, tensor, witness):
    """A tensor of the plan as one flat array of the witness's type, as long as memory goes."""
    return carray(_pointer(plan[tensor], witness), (_ANYWHERE,))


def _array_if(wanted, plan, tensor, witness):
    """As `_array`, but None where `wanted` is None."""


@overload(_array_if)
def _array_if_by_type(wanted, plan, tensor, witness):
    # Not one function with a branch: its result would be an optional array, which is looked at for None at every
    # element, and with two of them no loop is vectorised.
    if isinstance(wanted, types.NoneType):
        return lambda wanted, plan, tensor, witness: None
    return lambda wanted, plan, tensor, witness: _array(plan, tensor, witness)


@_compiled
def _offset(plan, tensor, t, rows, n):
    """Elements from a tensor's address to work item n at step t."""
    return t * plan[tensor + 1] + rows[n, _ROW] * plan[tensor + 2] + rows[n, _FIRST]


@_compiled
def _place(plan, tensor, t, rows, n):
    """`_offset` as an index of `_array`: unsigned, so that numba has no negative index to look out for."""
    return np.uintp(_offset(plan, tensor, t, rows, n))


@_compiled
def _ask_for(plan, tensor, t, rows, n, low, size):
    """Prefetches `_PREFETCHED` channels from `low` on of work item n at step t; `size` is an element's, in bytes."""
    begin = plan[tensor] + (_offset(plan, tensor, t, rows, n) + low) * size
    for line in range(0, _PREFETCHED * size, _LINE):
        _prefetch(begin + line)


@_compiled
def _gate(x, activated):
    return _sigmoid(x) if activated is None else x


@_compiled
def _candidate(x, activated):
    return _tanh(x) if activated is None else x


@_compiled
def _smallest(witness):
    """A gradient that decays over hundreds of steps ends in denormal numbers, which make matrix products of the
    gates' gradients ten times slower. Below this it is nothing beside any other part of a sum, so 0."""
    return witness.dtype.type(1e-30 if witness.itemsize == 4 else 1e-290)


@partial(_compiled, pipeline_class=_NoAlias)
def _forward_steps(plan, rows, z, f, o, i, zoned, activated, state, c, h):
    """All steps of a group of rows: the states move on, h and c are written.

    z, f, o, i, zoned, h, c: as of `_array`; state: (work items, block). `c` is a scratch row where the plan has no
    address for it.
    """
    one, zero, size = state.dtype.type(1), state.dtype.type(0), state.itemsize
    count = rows.shape[0]
    for t in range(plan[STEPS]):
        for n in range(count):
            width, at_h = rows[n, _WIDTH], _place(plan, _H, t, rows, n)
            if t >= rows[n, _VALID]:
                for k in range(np.uintp(0), np.uintp(width)):
                    h[at_h + k] = zero
                continue
            at_z, at_f = _place(plan, _Z, t, rows, n), _place(plan, _F, t, rows, n)
            at_o, at_i = _place(plan, _O, t, rows, n), _place(plan, _I, t, rows, n)
            at_zoned, at_state = _place(plan, _ZONED, t, rows, n), np.uintp(n * plan[BLOCK])
            at_c = _place(plan, _C, t, rows, n) if plan[_C] else np.uintp(0)
            later, following = (t, n + 1) if n + 1 < count else (t + 1, 0)
            for low in range(0, width, _PREFETCHED):
                _ask_for(plan, _Z, later, rows, following, low, size)
                _ask_for(plan, _F, later, rows, following, low, size)
                if o is not None:
                    _ask_for(plan, _O, later, rows, following, low, size)
                if i is not None:
                    _ask_for(plan, _I, later, rows, following, low, size)
                for k in range(np.uintp(low), np.uintp(min(low + _PREFETCHED, width))):
                    forget = _gate(f[at_f + k], activated)
                    if zoned is not None:
                        forget = one if zoned[at_zoned + k] else forget
                    candidate = _candidate(z[at_z + k], activated)
                    gain = one - forget if i is None else _gate(i[at_i + k], activated)
                    new = forget * state[at_state + k] + gain * candidate
                    state[at_state + k] = new
                    if o is None:
                        h[at_h + k] = new
                    else:
                        c[at_c + k] = new
                        h[at_h + k] = _gate(o[at_o + k], activated) * new


@partial(_compiled, pipeline_class=_NoAlias)
def _backward_steps(plan, rows, first, stop, z, f, o, i, zoned, activated, before, c, dh, flow, dz, df, do, di):
    """Steps [first, stop) of a group of rows, back: the states' gradients (flow) move on, the gates' are written.

    before: the states before the steps, as of `_array` at the step before; at step 0 (work items, block).
    """
    one, zero, size, least = flow.dtype.type(1), flow.dtype.type(0), flow.itemsize, _smallest(flow)
    count = rows.shape[0]
    for back in range(stop - first):
        t = stop - 1 - back
        for n in range(count):
            width = rows[n, _WIDTH]
            at_dz, at_df = _place(plan, _DZ, t, rows, n), _place(plan, _DF, t, rows, n)
            at_do, at_di = _place(plan, _DO, t, rows, n), _place(plan, _DI, t, rows, n)
            if t >= rows[n, _VALID]:
                for k in range(np.uintp(0), np.uintp(width)):
                    dz[at_dz + k] = zero
                    df[at_df + k] = zero
                    if o is not None:
                        do[at_do + k] = zero
                    if i is not None:
                        di[at_di + k] = zero
                continue
            at_z, at_f = _place(plan, _Z, t, rows, n), _place(plan, _F, t, rows, n)
            at_o, at_i = _place(plan, _O, t, rows, n), _place(plan, _I, t, rows, n)
            at_zoned, at_flow = _place(plan, _ZONED, t, rows, n), np.uintp(n * plan[BLOCK])
            at_c, at_dh = _place(plan, _C, t, rows, n), _place(plan, _DH, t, rows, n)
            at_before = _place(plan, _C, t - 1, rows, n) if t > 0 else at_flow
            earlier, following = (t, n + 1) if n + 1 < count else (t - 1, 0)
            for low in range(0, width, _PREFETCHED):
                _ask_for(plan, _Z, earlier, rows, following, low, size)
                _ask_for(plan, _F, earlier, rows, following, low, size)
                _ask_for(plan, _DH, earlier, rows, following, low, size)
                _ask_for(plan, _C, earlier - 1, rows, following, low, size)
                if o is not None:
                    _ask_for(plan, _O, earlier, rows, following, low, size)
                if i is not None:
                    _ask_for(plan, _I, earlier, rows, following, low, size)
                for k in range(np.uintp(low), np.uintp(min(low + _PREFETCHED, width))):
                    forget = _gate(f[at_f + k], activated)
                    if zoned is not None:
                        forget = one if zoned[at_zoned + k] else forget
                    candidate = _candidate(z[at_z + k], activated)
                    total = dh[at_dh + k]
                    if o is not None:
                        gate = _gate(o[at_o + k], activated)
                        slope = total * c[at_c + k]
                        do[at_do + k] = slope * gate * (one - gate) if activated is None else slope
                        total = total * gate
                    total = total + flow[at_flow + k]
                    if i is None:
                        gain = one - forget
                        slope = total * (before[at_before + k] - candidate)
                    else:
                        gain = _gate(i[at_i + k], activated)
                        slope = total * candidate
                        di[at_di + k] = slope * gain * (one - gain) if activated is None else slope
                        slope = total * before[at_before + k]
                    if activated is None:
                        df[at_df + k] = slope * forget * (one - forget)
                        dz[at_dz + k] = total * gain * (one - candidate * candidate)
                    else:
                        df[at_df + k] = slope if zoned is None else zero if zoned[at_zoned + k] else slope
                        dz[at_dz + k] = total * gain
                    total = total * forget
                    flow[at_flow + k] = zero if abs(total) < least else total


@_compiled
def _rows_of(plan, start, stop):
    """(items, 4) int64: where the work items [start, stop) lie; item = batch row * blocks + channel block.

    Lengths are clamped: an unchecked one must not reach foreign memory.
    """
    blocks = (plan[CHANNELS] + plan[BLOCK] - 1) // plan[BLOCK]
    rows = np.empty((stop - start, _COLUMNS), np.int64)
    for n in range(stop - start):
        b, first = (start + n) // blocks, ((start + n) % blocks) * plan[BLOCK]
        valid = plan[STEPS]
        if plan[_LENGTHS]:
            valid = min(max(carray(_pointer(plan[_LENGTHS] + 8 * b, plan[0]), (1,))[0], 0), valid)
        rows[n, _ROW], rows[n, _FIRST], rows[n, _VALID] = b, first, valid
        rows[n, _WIDTH] = min(plan[BLOCK], plan[CHANNELS] - first)
    return rows


@_compiled
def _take(plan, tensor, rows, into):
    """into (items, block) = the rows of a (B, C) tensor; zeros where the plan has none."""
    into[:] = 0
    if plan[tensor]:
        source = _array(plan, tensor, into)
        for n in range(rows.shape[0]):
            for k in range(rows[n, _WIDTH]):
                into[n * plan[BLOCK] + k] = source[_place(plan, tensor, 0, rows, n) + np.uintp(k)]


@_compiled
def _give(plan, tensor, rows, values):
    """The rows of a (B, C) tensor = values (items, block); nothing where the plan has none."""
    if plan[tensor]:
        target = _array(plan, tensor, values)
        for n in range(rows.shape[0]):
            for k in range(rows[n, _WIDTH]):
                target[_place(plan, tensor, 0, rows, n) + np.uintp(k)] = values[n * plan[BLOCK] + k]


@_compiled
def forward_range(plan, start, stop, witness, has_output, has_input, has_zoneout, activated):
    """Forward of the work items [start, stop). The last four are None, or True for what the mode has."""
    z, f, h = _array(plan, _Z, witness), _array(plan, _F, witness), _array(plan, _H, witness)
    o, i = _array_if(has_output, plan, _O, witness), _array_if(has_input, plan, _I, witness)
    zoned = _array_if(has_zoneout, plan, _ZONED, _ZONE_WITNESS)
    c = _array(plan, _C, witness) if plan[_C] else np.empty(plan[BLOCK], witness.dtype)
    for begin in range(start, stop, plan[GROUP]):
        rows = _rows_of(plan, begin, min(begin + plan[GROUP], stop))
        state = np.empty(rows.shape[0] * plan[BLOCK], witness.dtype)
        _take(plan, _INITIAL, rows, state)
        _forward_steps(plan, rows, z, f, o, i, zoned, activated, state, c, h)
        _give(plan, _LAST, rows, state)


@_compiled
def backward_range(plan, start, stop, witness, has_output, has_input, has_zoneout, activated):
    """Backward of the work items [start, stop); arguments as of `forward_range`."""
    z, f, c, dh = (_array(plan, _Z, witness), _array(plan, _F, witness), _array(plan, _C, witness),
                   _array(plan, _DH, witness))  # fmt: skip
    dz, df = _array(plan, _DZ, witness), _array(plan, _DF, witness)
    o, i = _array_if(has_output, plan, _O, witness), _array_if(has_input, plan, _I, witness)
    do, di = _array_if(has_output, plan, _DO, witness), _array_if(has_input, plan, _DI, witness)
    zoned = _array_if(has_zoneout, plan, _ZONED, _ZONE_WITNESS)
    for begin in range(start, stop, plan[GROUP]):
        rows = _rows_of(plan, begin, min(begin + plan[GROUP], stop))
        flow = np.empty(rows.shape[0] * plan[BLOCK], witness.dtype)
        initial = np.empty_like(flow)
        _take(plan, _DLAST, rows, flow)
        _take(plan, _INITIAL, rows, initial)
        steps = plan[STEPS]
        _backward_steps(plan, rows, 1, steps, z, f, o, i, zoned, activated, c, c, dh, flow, dz, df, do, di)
        _backward_steps(
            plan, rows, 0, min(1, steps), z, f, o, i, zoned, activated, initial, c, dh, flow, dz, df, do, di
        )
        _give(plan, _DINITIAL, rows, flow)

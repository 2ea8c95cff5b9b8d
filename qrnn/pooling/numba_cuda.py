"""The pooling on CUDA devices: numba.cuda kernels, forward and backward, with the activations fused in.

Axes: T time steps, B batch rows, C channels. A block is `lanes` columns, (b, c) pairs that lie side by side in
memory, by `chunks` pieces of time. Each thread loads `steps` time steps of its column before it computes, so
that many loads are under way at once. With one chunk the kernel walks serially over time. With several, a
tile of chunks * steps time steps is scanned at once: the recurrence is linear, so each chunk reduces to a map
c -> product * c + total; the maps meet in shared memory, and each thread replays its steps from registers, so
that both kernels read every element once. Backward recomputes the gates and runs the same way towards the
past: forward reads z, f, o and writes h and c; backward reads z, f, o, c, dh and writes dz, df, do.

A kernel is compiled per `Case`: what is absent costs neither arguments to load nor branches.

The simulator (NUMBA_ENABLE_CUDASIM=1) runs the same kernels on numpy arrays instead of pointers.
"""

import math
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import config, cuda, types
from torch import Tensor

from .reference import state_dtype

if config.ENABLE_CUDASIM:
    from numba.cuda.cudadrv.devicearray import FakeCUDAArray

    def _device(function: Callable) -> Callable:
        return function

else:
    from numba.cuda import libdevice

    _device = cuda.jit(device=True)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Shape(NamedTuple):
    """How a block is cut: columns side by side, pieces of time side by side, time steps in a thread's registers."""

    lanes: int
    chunks: int
    steps: int


class Rule(NamedTuple):
    """Columns B * C up to `columns` and at least `steps` time steps take the chunked kernel, others the serial one."""

    columns: int
    steps: int


# Estimated, NOT MEASURED on a device. A device that moves 4 TB/s at a latency of about 0.7 us has 3 MB under way
# (Little's law); a serial thread has up to 8 steps of 2 or 3 loads of 4 bytes under way and computes half of the
# time, so fewer than about 2^16 columns cannot fill it. Below 32 steps there is no second round of loads to save.
# To measure: `python -m pipeline speed --kernels` on a device lists both kernels beside each other.
RULE = Rule(columns=65536, steps=32)

_WIDE = {"serial": Shape(128, 1, 4), "few": Shape(32, 1, 4), "chunked": Shape(32, 16, 4)}
SHAPES = {
    torch.float32: {"serial": Shape(128, 1, 8), "few": Shape(32, 1, 8), "chunked": Shape(32, 16, 8)},
    torch.float64: _WIDE,
}
"""Block shapes by state dtype. Estimated like the rule: a float64 takes two registers, so half the steps."""
_FEW_COLUMNS = 32768  # below this, blocks of 128 columns leave multiprocessors without any

forced_kernel: str | None = None
"""A key of `SHAPES` that overrules `RULE`: for tests and for the benchmark that measures the rule."""


class Case(NamedTuple):
    """What a kernel is compiled for."""

    dtype: torch.dtype
    has_output: bool
    has_input: bool
    has_initial: bool
    has_zoned: bool
    has_lengths: bool
    activated: bool
    keep_state: bool
    shape: Shape


def choose(columns: int, steps: int) -> str:
    """The kernel for B * C columns and T steps: "serial", "few" (serial, small blocks) or "chunked"."""
    if forced_kernel is not None:
        return forced_kernel
    if columns <= RULE.columns and steps >= RULE.steps:
        return "chunked"
    return "few" if columns < _FEW_COLUMNS else "serial"


def unavailable() -> str | None:
    """Why the kernels cannot run on this machine's device; None if they can."""
    if cuda.is_available():
        return None
    return "numba.cuda finds no driver, no libnvvm (CUDA_HOME names the toolkit's folder) or no device that it can use"


# Scalars. Divisions are approximate to 2 units in the last place in float32: exact ones take a slow path.


class _Arithmetic(NamedTuple):
    real: Any
    load: Callable
    store: Callable
    sigmoid: Callable
    tanh: Callable


@cache
def _arithmetic(dtype: torch.dtype) -> _Arithmetic:
    """State type, and the device functions that read, write and activate elements of a storage dtype."""
    real = types.float64 if dtype == torch.float64 else types.float32
    one = real(1)
    divide = _divide(dtype)

    @_device
    def sigmoid(x):
        return divide(one, one + real(math.exp(-x)))

    @_device
    def tanh(x):
        return real(math.tanh(x))

    return _Arithmetic(real, *_memory(dtype, real), sigmoid, tanh)


def _divide(dtype: torch.dtype) -> Callable:
    if dtype == torch.float64 or config.ENABLE_CUDASIM:

        @_device
        def divide(x, y):
            return x / y

    else:

        @_device
        def divide(x, y):
            return libdevice.fast_fdividef(x, y)

    return divide


def _memory(dtype: torch.dtype, real: Any) -> tuple[Callable, Callable]:
    """(load, store) of one element."""
    if dtype == torch.bfloat16:
        return _bfloat16_memory()
    kept = types.float16 if dtype == torch.float16 else real

    @_device
    def load(pointer, at):
        return real(pointer[at])

    @_device
    def store(pointer, at, value):
        pointer[at] = kept(value)

    return load, store


def _bfloat16_memory() -> tuple[Callable, Callable]:
    """bfloat16 is the upper half of a float32's bits. Stores round to nearest, ties to even; NaN stays NaN."""
    if config.ENABLE_CUDASIM:

        def as_float(bits):
            return np.uint32(bits).view(np.float32)

        def as_bits(value):
            return int(np.float32(value).view(np.uint32))

    else:

        @_device
        def as_float(bits):
            return libdevice.int_as_float(types.int32(bits))

        @_device
        def as_bits(value):
            return types.uint32(libdevice.float_as_int(value))

    @_device
    def load(pointer, at):
        return as_float(types.uint32(pointer[at]) << types.uint32(16))

    @_device
    def store(pointer, at, value):
        bits = types.uint32(as_bits(value))
        tie = (bits >> types.uint32(16)) & types.uint32(1)
        rounded = (bits + types.uint32(0x7FFF) + tie) >> types.uint32(16)
        pointer[at] = types.uint16(rounded) if value == value else types.uint16(0x7FC0)

    return load, store


def forward_kernel(case: Case) -> Callable:
    """The forward kernel of a case, a plain function over pointers, to be compiled."""
    real, load, store, sigmoid, tanh = _arithmetic(case.dtype)
    LANES, CHUNKS, STEPS = case.shape
    HAS_OUTPUT, HAS_INPUT, HAS_INITIAL = case.has_output, case.has_input, case.has_initial
    HAS_ZONED, HAS_LENGTHS, ACTIVATED, KEEP = case.has_zoned, case.has_lengths, case.activated, case.keep_state
    zero, one = real(0), real(1)

    def forward(
        z, f, o, i, initial, zoned, lengths, h, last, c, steps, rows, channels, gate_step, gate_row
    ):  # gates (T, B, C) by strides; zoned, h, c (T, B, C); initial, last (B, C); lengths (B,)
        lane, chunk = cuda.threadIdx.x, cuda.threadIdx.y
        plane = rows * channels
        inside = cuda.blockIdx.x * LANES + lane < plane
        column = min(cuda.blockIdx.x * LANES + lane, plane - 1)
        row = column // channels
        gate_at = row * gate_row + column - row * channels
        limit = steps
        if HAS_LENGTHS:
            limit = min(max(lengths[row], 0), steps)
        state = zero
        if HAS_INITIAL:
            state = initial[column]
        forget = cuda.local.array(STEPS, real)
        fresh = cuda.local.array(STEPS, real)
        output = cuda.local.array(STEPS, real)
        gain = cuda.local.array(STEPS, real)
        keeps = cuda.local.array(STEPS, types.uint8)
        if CHUNKS > 1:
            products = cuda.shared.array((CHUNKS, LANES), real)
            totals = cuda.shared.array((CHUNKS, LANES), real)
        for tile in range(0, steps, CHUNKS * STEPS):
            first = tile + chunk * STEPS
            for k in range(STEPS):
                # Past the end the last step is read again and not used: no branch stands between the loads.
                t = min(first + k, steps - 1)
                fresh[k] = load(z, gate_at + t * gate_step)
                forget[k] = load(f, gate_at + t * gate_step)
                if HAS_INPUT:
                    gain[k] = load(i, gate_at + t * gate_step)
                if HAS_OUTPUT:
                    output[k] = load(o, gate_at + t * gate_step)
                if HAS_ZONED:
                    keeps[k] = zoned[t * plane + column]
            for k in range(STEPS):
                if not ACTIVATED:
                    fresh[k] = tanh(fresh[k])
                    forget[k] = sigmoid(forget[k])
                    if HAS_INPUT:
                        gain[k] = sigmoid(gain[k])
                    if HAS_OUTPUT:
                        output[k] = sigmoid(output[k])
                if HAS_ZONED:
                    forget[k] = one if keeps[k] else forget[k]
                fresh[k] = (gain[k] if HAS_INPUT else one - forget[k]) * fresh[k]
                runs = first + k < limit
                forget[k] = forget[k] if runs else one
                fresh[k] = fresh[k] if runs else zero
            running = state
            if CHUNKS > 1:
                product, total = one, zero
                for k in range(STEPS):
                    total = forget[k] * total + fresh[k]
                    product *= forget[k]
                products[chunk, lane] = product
                totals[chunk, lane] = total
                cuda.syncthreads()
                for j in range(CHUNKS):
                    if j == chunk:
                        running = state
                    state = products[j, lane] * state + totals[j, lane]
                cuda.syncthreads()
            for k in range(STEPS):
                running = forget[k] * running + fresh[k]
                t = first + k
                if inside and t < steps:
                    if KEEP:
                        c[t * plane + column] = running
                    value = output[k] * running if HAS_OUTPUT else running
                    store(h, t * plane + column, value if t < limit else zero)
            if CHUNKS == 1:
                state = running
        if inside and chunk == 0:
            last[column] = state

    return forward


def backward_kernel(case: Case) -> Callable:
    """The backward kernel of a case, a plain function over pointers, to be compiled."""
    real, load, store, sigmoid, tanh = _arithmetic(case.dtype)
    LANES, CHUNKS, STEPS = case.shape
    HAS_OUTPUT, HAS_INPUT, HAS_INITIAL = case.has_output, case.has_input, case.has_initial
    HAS_ZONED, HAS_LENGTHS, ACTIVATED = case.has_zoned, case.has_lengths, case.activated
    # f-pooling's states are its outputs, which are stored in the gates' dtype.
    load_state = load if not HAS_OUTPUT else _arithmetic(state_dtype(case.dtype)).load
    zero, one = real(0), real(1)

    def backward(
        z,
        f,
        o,
        i,
        initial,
        zoned,
        lengths,
        c,
        dh,
        dlast,
        dz,
        df,
        do,
        di,
        dinitial,
        steps,
        rows,
        channels,
        gate_step,
        gate_row,
        dh_step,
        dh_row,
        out_step,
        out_row,
    ):  # gates, dh, dz, df, do, di (T, B, C) by strides; zoned, c (T, B, C); initial, dlast, dinitial (B, C)
        lane, chunk = cuda.threadIdx.x, cuda.threadIdx.y
        plane = rows * channels
        inside = cuda.blockIdx.x * LANES + lane < plane
        column = min(cuda.blockIdx.x * LANES + lane, plane - 1)
        row = column // channels
        channel = column - row * channels
        gate_at = row * gate_row + channel
        dh_at = row * dh_row + channel
        limit = steps
        if HAS_LENGTHS:
            limit = min(max(lengths[row], 0), steps)
        begin = zero
        if HAS_INITIAL:
            begin = initial[column]
        flow = dlast[column]
        forget = cuda.local.array(STEPS, real)
        candidate = cuda.local.array(STEPS, real)
        output = cuda.local.array(STEPS, real)
        gain = cuda.local.array(STEPS, real)
        before = cuda.local.array(STEPS, real)
        push = cuda.local.array(STEPS, real)
        keeps = cuda.local.array(STEPS, types.uint8)
        if CHUNKS > 1:
            products = cuda.shared.array((CHUNKS, LANES), real)
            totals = cuda.shared.array((CHUNKS, LANES), real)
        tiles = (steps + CHUNKS * STEPS - 1) // (CHUNKS * STEPS)
        for back in range(tiles):
            first = (tiles - 1 - back) * CHUNKS * STEPS + chunk * STEPS
            for k in range(STEPS):
                t = min(first + k, steps - 1)
                candidate[k] = load(z, gate_at + t * gate_step)
                forget[k] = load(f, gate_at + t * gate_step)
                if HAS_INPUT:
                    gain[k] = load(i, gate_at + t * gate_step)
                if HAS_OUTPUT:
                    output[k] = load(o, gate_at + t * gate_step)
                if HAS_ZONED:
                    keeps[k] = zoned[t * plane + column]
                push[k] = load(dh, dh_at + t * dh_step)
                before[k] = load_state(c, max(t - 1, 0) * plane + column)
            for k in range(STEPS):
                before[k] = before[k] if first + k > 0 else begin
                if not ACTIVATED:
                    candidate[k] = tanh(candidate[k])
                    forget[k] = sigmoid(forget[k])
                    if HAS_INPUT:
                        gain[k] = sigmoid(gain[k])
                    if HAS_OUTPUT:
                        output[k] = sigmoid(output[k])
                if HAS_ZONED:
                    forget[k] = one if keeps[k] else forget[k]
                if HAS_OUTPUT:
                    t = first + k
                    fresh = (gain[k] if HAS_INPUT else one - forget[k]) * candidate[k]
                    slope = push[k] * (forget[k] * before[k] + fresh)
                    if not ACTIVATED:
                        slope *= output[k] * (one - output[k])
                    if inside and t < steps:
                        store(do, row * out_row + channel + t * out_step, slope if t < limit else zero)
                    push[k] *= output[k]
                runs = first + k < limit
                forget[k] = forget[k] if runs else one
                push[k] = push[k] if runs else zero
            running = flow
            if CHUNKS > 1:
                product, total = one, zero
                for k in range(STEPS):
                    total = forget[STEPS - 1 - k] * (total + push[STEPS - 1 - k])
                    product *= forget[STEPS - 1 - k]
                products[chunk, lane] = product
                totals[chunk, lane] = total
                cuda.syncthreads()
                for j in range(CHUNKS):
                    if CHUNKS - 1 - j == chunk:
                        running = flow
                    flow = products[CHUNKS - 1 - j, lane] * flow + totals[CHUNKS - 1 - j, lane]
                cuda.syncthreads()
            for r in range(STEPS):
                k = STEPS - 1 - r
                t = first + k
                running += push[k]
                if HAS_INPUT:
                    slope_f = running * before[k]
                    slope_z = running * gain[k]
                    slope_i = running * candidate[k]
                    if not ACTIVATED:
                        slope_i *= gain[k] * (one - gain[k])
                else:
                    slope_f = running * (before[k] - candidate[k])
                    slope_z = running * (one - forget[k])
                if ACTIVATED:
                    if HAS_ZONED:
                        slope_f = zero if keeps[k] else slope_f
                else:
                    slope_f *= forget[k] * (one - forget[k])
                    slope_z *= one - candidate[k] * candidate[k]
                if inside and t < steps:
                    at = row * out_row + channel + t * out_step
                    runs = t < limit
                    store(dz, at, slope_z if runs else zero)
                    store(df, at, slope_f if runs else zero)
                    if HAS_INPUT:
                        store(di, at, slope_i if runs else zero)
                running *= forget[k]
            if CHUNKS == 1:
                flow = running
        if HAS_INITIAL and inside and chunk == 0:
            dinitial[column] = flow

    return backward


def forward_signature(dtype: torch.dtype) -> Any:
    gate, real, byte, whole = _pointers(dtype)
    return types.void(gate, gate, gate, gate, real, byte, whole, gate, real, real, *(types.int64,) * 5)


def backward_signature(case: Case) -> Any:
    gate, real, byte, whole = _pointers(case.dtype)
    kept = real if case.has_output else gate
    return types.void(
        gate, gate, gate, gate, real, byte, whole, kept, gate, real, gate, gate, gate, gate, real, *(types.int64,) * 9
    )


def _pointers(dtype: torch.dtype) -> tuple[Any, Any, Any, Any]:
    """Pointers to gates, states, bytes and lengths."""
    stored = {
        torch.float32: types.float32,
        torch.float64: types.float64,
        torch.bfloat16: types.uint16,
        torch.float16: types.float16,
    }[dtype]
    real = types.float64 if dtype == torch.float64 else types.float32
    gate, state, byte, whole = (types.CPointer(kind) for kind in (stored, real, types.uint8, types.int64))
    return gate, state, byte, whole


# Launching

empty = torch.empty


def forward(gates, initial, zoned, lengths, activated: bool, keep_state: bool):
    """The pooling of `gates` = (z, f, o or None, i or None), each (T, B, C), of one of DTYPES.

    Returns (h (T, B, C) as the gates, last (B, C), c): c holds the states that backward needs, (T, B, C); it is
    h itself where there is no output gate, and empty where `keep_state` is false. States are float32 for
    half-precision gates.
    """
    gates = _alike(gates)
    z = gates[0]
    steps, rows, channels = z.shape
    state = state_dtype(z.dtype)
    keep_state = keep_state and gates[2] is not None
    h = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    last = torch.empty(z.shape[1:], dtype=state, device=z.device)
    c = torch.empty(z.shape if keep_state else (0,), dtype=state, device=z.device)
    if steps == 0:
        last.zero_() if initial is None else last.copy_(initial)
    if h.numel() == 0:
        return h, last, c
    initial, zoned, lengths = (None if t is None else t.contiguous() for t in (initial, zoned, lengths))
    case = _case(gates, initial, zoned, lengths, activated, keep_state)
    pointers = (*gates, initial, zoned, lengths, h, last, c if keep_state else None)
    _launch("forward", case, z, pointers, (steps, rows, channels, z.stride(0), z.stride(1)))
    return h, last, c


def backward(grad_h, grad_last, gates, initial, zoned, lengths, c, activated: bool, out, grad_initial) -> None:
    """Writes the gates' gradients into `out` (as `gates`, all of one stride) and the initial state's."""
    gates = _alike(gates)
    z, dz = gates[0], out[0]
    steps, rows, channels = z.shape
    if steps == 0 and grad_initial is not None:
        grad_initial.copy_(grad_last)
    if z.numel() == 0:
        return
    grad_h = grad_h if grad_h.stride(2) == 1 else grad_h.contiguous()
    grad_h, grad_last = grad_h.to(z.dtype), grad_last.contiguous()
    initial, zoned, lengths = (None if t is None else t.contiguous() for t in (initial, zoned, lengths))
    case = _case(gates, initial, zoned, lengths, activated, False)
    pointers = (*gates, initial, zoned, lengths, c.contiguous(), grad_h, grad_last, *out, grad_initial)
    strides = (*z.stride()[:2], *grad_h.stride()[:2], *dz.stride()[:2])
    _launch("backward", case, z, pointers, (steps, rows, channels, *strides))


def _alike(gates) -> list[Tensor | None]:
    """The gates, copied unless their channels are adjacent and their strides the same."""
    strides = gates[0].stride()
    if strides[2] == 1 and all(gate is None or gate.stride() == strides for gate in gates):
        return list(gates)
    return [None if gate is None else gate.contiguous() for gate in gates]


def _case(gates, initial, zoned, lengths, activated: bool, keep_state: bool) -> Case:
    z, _, o, i = gates
    steps, rows, channels = z.shape
    shape = SHAPES[state_dtype(z.dtype)][choose(rows * channels, steps)]
    given = (tensor is not None for tensor in (o, i, initial, zoned, lengths))
    return Case(z.dtype, *given, activated, keep_state, shape)


def _launch(name: str, case: Case, z: Tensor, pointers, sizes) -> None:
    """Puts the kernel on torch's current stream of z's device. Nothing waits for it."""
    blocks = -(-z.shape[1] * z.shape[2] // case.shape.lanes)
    if config.ENABLE_CUDASIM:
        arguments = [_flat(tensor) for tensor in pointers]
        cuda.jit(_FACTORIES[name](case))[blocks, case.shape[:2]](*arguments, *sizes)
        return
    index = z.device.index
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in pointers]
    if torch.cuda.device_count() == 1:
        _launcher(name, case, blocks, index, torch._C._cuda_getCurrentRawStream(index))(*addresses, *sizes)
        return
    with torch.cuda.device(index), cuda.gpus[index]:  # numba keeps a current device of its own in each thread
        _launcher(name, case, blocks, index, torch._C._cuda_getCurrentRawStream(index))(*addresses, *sizes)


# The caches below hold what is made of a raw stream handle, never which stream is current: that is asked anew at
# every launch. A pool of streams is reused by torch, so there are few handles.


@cache
def _compiled(name: str, case: Case, index: int) -> Any:
    """The compiled kernel on device `index`. Compiling takes about a second, so a call of the same case (dtype, mode,
    kernel by the rule, with or without gradients) comes before a graph is captured."""
    signature = forward_signature(case.dtype) if name == "forward" else backward_signature(case)
    threads = case.shape.lanes * case.shape.chunks
    return cuda.jit(signature, launch_bounds=threads)(_FACTORIES[name](case))


@cache
def _launcher(name: str, case: Case, blocks: int, index: int, handle: int) -> Any:
    kernel, stream = _compiled(name, case, index), _stream(index, handle)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few columns make few blocks, which numba warns of and the rule knows
        return kernel[blocks, case.shape[:2], stream]


@cache
def _stream(index: int, handle: int) -> Any:
    return cuda.external_stream(handle)


_FACTORIES = {"forward": forward_kernel, "backward": backward_kernel}


def _flat(tensor: Tensor | None) -> Any:
    """The tensor's memory from its first element on, as the simulator's stand-in for a pointer.

    Not a copy, which the simulator would write back whole, over what a packed gradient's other parts hold.
    """
    if tensor is None:
        return FakeCUDAArray(np.zeros(1, np.float32))
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    memory = tensor.as_strided((span,), (1,))
    if tensor.dtype in (torch.bfloat16, torch.bool):
        memory = memory.view(torch.uint16 if tensor.dtype == torch.bfloat16 else torch.uint8)
    return FakeCUDAArray(memory.numpy())

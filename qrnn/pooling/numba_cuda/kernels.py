"""The kernels, forward and backward, as functions over pointers, to be compiled for a `Case`.

Axes: T time steps, B batch rows, C channels. A block is `lanes` columns, (b, c) pairs that lie side by side in
memory, by `chunks` pieces of time. Each thread loads `steps` time steps of its column before it computes, so
that many loads are under way at once. A tile is what a block loads at once: chunks * steps time steps. With one chunk
the kernel walks serially over time. With several, a tile is scanned at once: the recurrence is linear, so each
chunk reduces to a map c -> product * c + total; the maps meet in shared memory, and each thread replays its steps
from registers, so that both kernels read every element once. Backward recomputes the gates and runs the same way
towards the past: forward reads z, f, o and writes h and c; backward reads z, f, o, c, dh and writes dz, df, do.

A kernel walks over whole tiles, which look for no end, and a ragged one, the last. What a case lacks costs neither
arguments to load nor branches. Places in tensors are reckoned in 32 bits where these suffice: on devices sums and
products of 64 bits take several instructions, and were most of what the kernels did.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from numba import cuda, types

from ..reference import state_dtype
from .scalars import arithmetic, device


class Shape(NamedTuple):
    """How a block is cut: columns side by side, pieces of time side by side, time steps in a thread's registers."""

    lanes: int
    chunks: int
    steps: int


class Case(NamedTuple):
    """What a kernel is compiled for. `wide`: an element's place may lie beyond 2^31, so places take 64 bits."""

    dtype: torch.dtype
    has_output: bool
    has_input: bool
    has_initial: bool
    has_zoned: bool
    has_lengths: bool
    activated: bool
    keep_state: bool
    wide: bool
    shape: Shape

    @property
    def place(self) -> Any:
        """The type of an element's place in its tensor. numba adds in 64 bits, so every sum is cut back to it."""
        return types.int64 if self.wide else types.int32


def forward_kernel(case: Case) -> Callable:
    """The forward kernel of a case."""
    place, real = case.place, arithmetic(case.dtype).real
    whole, ragged, column_of = _forward_tile(case, False), _forward_tile(case, True), _column(case)
    TILE, HAS_INITIAL, HAS_LENGTHS = case.shape.chunks * case.shape.steps, case.has_initial, case.has_lengths
    zero = real(0)

    def forward(
        z, f, o, i, initial, zoned, lengths, h, last, c, steps, rows, channels, gate_step, gate_row
    ):  # gates (T, B, C) by strides; zoned, h, c (T, B, C); initial, last (B, C); lengths (B,)
        column, row, channel, inside = column_of(rows, channels)
        plane = place(rows * channels)
        gate = place(row * gate_row + channel)
        limit = steps
        if HAS_LENGTHS:
            limit = place(min(max(lengths[row], 0), steps))
        state = zero
        if HAS_INITIAL:
            state = initial[column]
        end = place(steps // TILE * TILE)
        for tile in range(0, end, TILE):
            state = whole(
                z, f, o, i, zoned, h, c, state, tile, steps, limit, gate, gate_step, column, plane, inside
            )  # fmt: skip
        if end < steps:
            state = ragged(
                z, f, o, i, zoned, h, c, state, end, steps, limit, gate, gate_step, column, plane, inside
            )  # fmt: skip
        if inside and cuda.threadIdx.y == 0:
            last[column] = state

    return forward


def _forward_tile(case: Case, ragged: bool) -> Callable:
    """Pools the tile that begins at step `tile`; gives the state after it. Ragged: its end may lie beyond T."""
    real, _, store, *_ = arithmetic(case.dtype)
    place = case.place
    _, CHUNKS, STEPS = case.shape
    (read, activate), scan = _gates(case), _scan(case)
    HAS_LENGTHS, KEEP, RAGGED = case.has_lengths, case.keep_state, ragged
    zero, one = real(0), real(1)

    @device
    def pool(z, f, o, i, zoned, h, c, state, tile, steps, limit, gate, gate_step, column, plane, inside):
        chunk = cuda.threadIdx.y
        first = place(tile + chunk * STEPS)
        forget = cuda.local.array(STEPS, real)
        fresh = cuda.local.array(STEPS, real)
        output = cuda.local.array(STEPS, real)
        gain = cuda.local.array(STEPS, real)
        keeps = cuda.local.array(STEPS, types.uint8)
        for k in range(STEPS):
            t = place(first + k)
            if RAGGED:  # beyond the end the last step is read again and not used: no branch stands between the loads
                t = place(min(t, steps - 1))
            fresh[k], forget[k], output[k], gain[k], keeps[k] = read(
                z, f, o, i, zoned, place(gate + t * gate_step), place(t * plane + column)
            )
        for k in range(STEPS):
            fresh[k], forget[k], output[k], gain[k] = activate(fresh[k], forget[k], output[k], gain[k], keeps[k])
            fresh[k] = gain[k] * fresh[k]
            if RAGGED or HAS_LENGTHS:
                runs = first + k < limit
                forget[k] = forget[k] if runs else one
                fresh[k] = fresh[k] if runs else zero
        running = state
        if CHUNKS > 1:
            product, total = one, zero
            for k in range(STEPS):
                total = forget[k] * total + fresh[k]
                product *= forget[k]
            running, state = scan(chunk, product, total, state)
        if inside:
            for k in range(STEPS):
                running = forget[k] * running + fresh[k]
                t = place(first + k)
                if not RAGGED or t < steps:
                    at = place(t * plane + column)
                    if KEEP:
                        c[at] = running
                    store(h, at, output[k] * running if not HAS_LENGTHS or t < limit else zero)
        return state if CHUNKS > 1 else running

    return pool


def backward_kernel(case: Case) -> Callable:
    """The backward kernel of a case."""
    place, real = case.place, arithmetic(case.dtype).real
    whole, ragged, column_of = _backward_tile(case, False), _backward_tile(case, True), _column(case)
    TILE, HAS_INITIAL, HAS_LENGTHS = case.shape.chunks * case.shape.steps, case.has_initial, case.has_lengths
    zero = real(0)

    def backward(
        z, f, o, i, initial, zoned, lengths, c, dh, dlast, dz, df, do, di, dinitial, steps, rows, channels,
        gate_step, gate_row, dh_step, dh_row, out_step, out_row,
    ):  # fmt: skip
        # gates, dh, dz, df, do, di (T, B, C) by strides; zoned, c (T, B, C); initial, dlast, dinitial (B, C)
        column, row, channel, inside = column_of(rows, channels)
        plane = place(rows * channels)
        gate, at_dh = place(row * gate_row + channel), place(row * dh_row + channel)
        out = place(row * out_row + channel)
        limit = steps
        if HAS_LENGTHS:
            limit = place(min(max(lengths[row], 0), steps))
        begin = zero
        if HAS_INITIAL:
            begin = initial[column]
        flow = dlast[column]
        end = place(steps // TILE * TILE)
        if end < steps:
            flow = ragged(
                z, f, o, i, zoned, c, dh, dz, df, do, di, begin, flow, end, steps, limit,
                gate, gate_step, at_dh, dh_step, out, out_step, column, plane, inside,
            )  # fmt: skip
        for back in range(TILE, end + TILE, TILE):
            flow = whole(
                z, f, o, i, zoned, c, dh, dz, df, do, di, begin, flow, place(end - back), steps, limit,
                gate, gate_step, at_dh, dh_step, out, out_step, column, plane, inside,
            )  # fmt: skip
        if HAS_INITIAL and inside and cuda.threadIdx.y == 0:
            dinitial[column] = flow

    return backward


def _backward_tile(case: Case, ragged: bool) -> Callable:
    """The gradients of the tile that begins at step `tile`; gives what flows on to the state before it."""
    real, load, store, *_ = arithmetic(case.dtype)
    # f-pooling's states are its outputs, which are stored in the gates' dtype.
    load_state = load if not case.has_output else arithmetic(state_dtype(case.dtype)).load
    place = case.place
    _, CHUNKS, STEPS = case.shape
    (read, activate), scan = _gates(case), _scan(case)
    HAS_OUTPUT, HAS_INPUT = case.has_output, case.has_input
    HAS_ZONED, HAS_LENGTHS, ACTIVATED = case.has_zoned, case.has_lengths, case.activated
    RAGGED = ragged
    zero, one = real(0), real(1)

    @device
    def differentiate(
        z, f, o, i, zoned, c, dh, dz, df, do, di, begin, flow, tile, steps, limit,
        gate, gate_step, at_dh, dh_step, out, out_step, column, plane, inside,
    ):  # fmt: skip
        chunk = cuda.threadIdx.y
        first = place(tile + chunk * STEPS)
        forget = cuda.local.array(STEPS, real)
        candidate = cuda.local.array(STEPS, real)
        output = cuda.local.array(STEPS, real)
        gain = cuda.local.array(STEPS, real)
        before = cuda.local.array(STEPS, real)
        push = cuda.local.array(STEPS, real)
        keeps = cuda.local.array(STEPS, types.uint8)
        for k in range(STEPS):
            t = place(first + k)
            if RAGGED:
                t = place(min(t, steps - 1))
            candidate[k], forget[k], output[k], gain[k], keeps[k] = read(
                z, f, o, i, zoned, place(gate + t * gate_step), place(t * plane + column)
            )
            push[k] = load(dh, place(at_dh + t * dh_step))
            earlier = t - 1 if k > 0 or first > 0 else 0
            if RAGGED:  # beyond the end of a single step the last is the first, which has none before it
                earlier = max(earlier, 0)
            before[k] = load_state(c, place(earlier * plane + column))
        before[0] = before[0] if first > 0 else begin
        for k in range(STEPS):
            candidate[k], forget[k], output[k], gain[k] = activate(
                candidate[k], forget[k], output[k], gain[k], keeps[k]
            )
            if HAS_OUTPUT:
                slope = push[k] * (forget[k] * before[k] + gain[k] * candidate[k])
                push[k] *= output[k]
                output[k] = slope if ACTIVATED else slope * output[k] * (one - output[k])  # from here on do
            if RAGGED or HAS_LENGTHS:
                runs = first + k < limit
                forget[k] = forget[k] if runs else one
                push[k] = push[k] if runs else zero
        running = flow
        if CHUNKS > 1:
            product, total = one, zero
            for r in range(STEPS):
                k = STEPS - 1 - r
                total = forget[k] * (total + push[k])
                product *= forget[k]
            running, flow = scan(CHUNKS - 1 - chunk, product, total, flow)
        if inside:
            for r in range(STEPS):
                k = STEPS - 1 - r
                running += push[k]
                slope_z = running * gain[k]
                if HAS_INPUT:
                    slope_f = running * before[k]
                    slope_i = running * candidate[k]
                    if not ACTIVATED:
                        slope_i *= gain[k] * (one - gain[k])
                else:
                    slope_f = running * (before[k] - candidate[k])
                if ACTIVATED:
                    if HAS_ZONED:
                        slope_f = zero if keeps[k] else slope_f
                else:
                    slope_f *= forget[k] * (one - forget[k])
                    slope_z *= one - candidate[k] * candidate[k]
                t = place(first + k)
                if not RAGGED or t < steps:
                    at = place(out + t * out_step)
                    runs = not HAS_LENGTHS or t < limit
                    store(dz, at, slope_z if runs else zero)
                    store(df, at, slope_f if runs else zero)
                    if HAS_INPUT:
                        store(di, at, slope_i if runs else zero)
                    if HAS_OUTPUT:
                        store(do, at, output[k] if runs else zero)
                running *= forget[k]
        return flow if CHUNKS > 1 else running

    return differentiate


def _gates(case: Case) -> tuple[Callable, Callable]:
    """(read, activate) of one step's candidate, forget gate, output gate, input gate; what a case lacks is 1."""
    real, load, _, sigmoid, tanh = arithmetic(case.dtype)
    HAS_OUTPUT, HAS_INPUT, HAS_ZONED, ACTIVATED = case.has_output, case.has_input, case.has_zoned, case.activated
    one, drawn = real(1), types.uint8(0)

    @device
    def read(z, f, o, i, zoned, at, at_zoned):
        """The four as they are stored, and whether zoneout keeps the state."""
        output = load(o, at) if HAS_OUTPUT else one
        gain = load(i, at) if HAS_INPUT else one
        return load(z, at), load(f, at), output, gain, zoned[at_zoned] if HAS_ZONED else drawn

    @device
    def activate(candidate, forget, output, gain, keeps):
        """The four as the recurrence takes them; without an input gate, 1 - f in its place."""
        if not ACTIVATED:
            candidate, forget = tanh(candidate), sigmoid(forget)
            if HAS_OUTPUT:
                output = sigmoid(output)
            if HAS_INPUT:
                gain = sigmoid(gain)
        if HAS_ZONED:
            forget = one if keeps else forget
        return candidate, forget, output, gain if HAS_INPUT else one - forget

    return read, activate


def _scan(case: Case) -> Callable:
    """The maps x -> product * x + total of a column's chunks, composed in the order of `rank`."""
    LANES, CHUNKS, _ = case.shape
    real = arithmetic(case.dtype).real

    @device
    def scan(rank, product, total, begin):
        """(value before this thread's chunk, value after all of them), of the value `begin` before the first.

        One warp composes all; the value after them, and the one to begin with, are the first chunk's threads' alone.
        """
        lane = cuda.threadIdx.x
        products = cuda.shared.array((CHUNKS, LANES), real)
        values = cuda.shared.array((CHUNKS, LANES), real)  # totals, then the value before each chunk
        products[rank, lane] = product
        values[rank, lane] = total
        cuda.syncthreads()
        if cuda.threadIdx.y == 0:
            for j in range(CHUNKS):
                mine = values[j, lane]
                values[j, lane] = begin
                begin = products[j, lane] * begin + mine
        cuda.syncthreads()
        return values[rank, lane], begin

    return scan


def _column(case: Case) -> Callable:
    """Which column a thread works on, its row and channel, and whether it is one: the last block may have threads too
    many, which compute the last column without writing it."""
    place, LANES = case.place, case.shape.lanes
    positive = types.uint64 if case.wide else types.uint32

    @device
    def column_of(rows, channels):
        plane = place(rows * channels)
        mine = place(cuda.blockIdx.x * LANES + cuda.threadIdx.x)
        column = place(min(mine, plane - 1))
        row = place(positive(column) // positive(channels))
        return column, row, place(column - row * channels), mine < plane

    return column_of


def forward_signature(case: Case) -> Any:
    gate, real, byte, whole = _pointers(case.dtype)
    return types.void(gate, gate, gate, gate, real, byte, whole, gate, real, real, *(case.place,) * 5)


def backward_signature(case: Case) -> Any:
    gate, real, byte, whole = _pointers(case.dtype)
    kept = real if case.has_output else gate
    return types.void(
        gate, gate, gate, gate, real, byte, whole, kept, gate, real, gate, gate, gate, gate, real, *(case.place,) * 9
    )


def _pointers(dtype: torch.dtype) -> tuple[Any, Any, Any, Any]:
    """Pointers to gates, states, bytes and lengths."""
    stored = {
        torch.float32: types.float32,
        torch.float64: types.float64,
        torch.bfloat16: types.uint16,
        torch.float16: types.float16,
    }[dtype]
    kinds = (stored, arithmetic(dtype).real, types.uint8, types.int64)
    gate, state, byte, whole = map(types.CPointer, kinds)
    return gate, state, byte, whole

"""The pooling on CUDA devices by numba.cuda: which kernel runs, and how it is launched.

`kernels` has the kernels, `scalars` what they do to one element. A kernel is compiled per `Case`.

The simulator (NUMBA_ENABLE_CUDASIM=1) runs the same kernels on numpy arrays instead of pointers.
"""

from functools import cache, lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import config, cuda
from torch import Tensor

from ..reference import state_dtype
from .kernels import Case, Shape, backward_kernel, backward_signature, forward_kernel, forward_signature

if config.ENABLE_CUDASIM:
    from numba.cuda.cudadrv.devicearray import FakeCUDAArray

if not hasattr(np, "row_stack"):  # NumPy 2.5 took the name away, and numba-cuda 0.30 compiles nothing without it
    np.row_stack = np.vstack

BFLOAT16_CAPABILITY = (8, 0)  # the first with an instruction that rounds to it
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


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
"""Block shapes by state dtype. Estimated like the rule: a float64 takes two registers, so half the steps, and places of
64 bits do too."""
_FEW_COLUMNS = 32768  # below this, blocks of 128 columns leave multiprocessors without any

FAR = 2**31 - 2**20
"""Tensors that span this many elements take kernels with places of 64 bits. The margin is for the last tile and block,
which reckon places beyond the end before they are cut off."""

forced_kernel: str | None = None
"""A key of `SHAPES` that overrules `RULE`: for tests and for the benchmark that measures the rule."""


def choose(columns: int, steps: int) -> str:
    """The kernel for B * C columns and T steps: "serial", "few" (serial, small blocks) or "chunked"."""
    if forced_kernel is not None:
        return forced_kernel
    if columns <= RULE.columns and steps >= RULE.steps:
        return "chunked"
    return "few" if columns < _FEW_COLUMNS else "serial"


def unavailable() -> str | None:
    """Why the kernels cannot run on this machine's device; None if they can."""
    try:
        if cuda.is_available():
            # numba's own numba.cuda comes in its place where numba-cuda's .pth file, which the interpreter reads in its
            # site-packages alone, was not read: with PYTHONPATH, or `pip install --target`.
            own = not config.ENABLE_CUDASIM and cuda.implementation != "NVIDIA"
            return "numba.cuda is numba's own, not numba-cuda's: install that into site-packages" if own else None
    except Exception as error:  # a part of the toolkit that is not found is an error of another kind in each version
        return f"numba.cuda: {str(error).splitlines()[0]} (CUDA_HOME names the toolkit's folder)"
    return "numba.cuda finds no driver, no libnvvm (CUDA_HOME names the toolkit's folder) or no device that it can use"


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
    h = torch.empty_like(z, memory_format=torch.contiguous_format)
    last = z.new_empty(z.shape[1:], dtype=state)
    c = torch.empty_like(h, dtype=state) if keep_state else z.new_empty(0, dtype=state)
    if steps == 0:
        last.zero_() if initial is None else last.copy_(initial)
    if h.numel() == 0:
        return h, last, c
    initial, zoned, lengths = (None if t is None else t.contiguous() for t in (initial, zoned, lengths))
    sizes = (steps, rows, channels, z.stride(0), z.stride(1))
    case = _case(gates, initial, zoned, lengths, activated, keep_state, sizes)
    pointers = (*gates, initial, zoned, lengths, h, last, c if keep_state else None)
    _launch("forward", case, z, pointers, sizes)
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
    sizes = (steps, rows, channels, *z.stride()[:2], *grad_h.stride()[:2], *dz.stride()[:2])
    case = _case(gates, initial, zoned, lengths, activated, False, sizes)
    pointers = (*gates, initial, zoned, lengths, c.contiguous(), grad_h, grad_last, *out, grad_initial)
    _launch("backward", case, z, pointers, sizes)


def _alike(gates) -> list[Tensor | None]:
    """The gates, copied unless their channels are adjacent and their strides the same."""
    strides = gates[0].stride()
    if strides[2] == 1 and all(gate is None or gate.stride() == strides for gate in gates):
        return list(gates)
    return [None if gate is None else gate.contiguous() for gate in gates]


def _case(gates, initial, zoned, lengths, activated: bool, keep_state: bool, sizes: tuple[int, ...]) -> Case:
    """The case of a call; `sizes` as the kernel takes them: T, B, C, then (step, row) strides of its tensors."""
    z, _, o, i = gates
    steps, rows, channels, *strides = sizes
    given = (tensor is not None for tensor in (o, i, initial, zoned, lengths))
    spans = (steps * step + rows * row for step, row in zip(strides[::2], strides[1::2], strict=True))
    wide = max(steps * rows * channels, *spans) >= FAR
    shape = SHAPES[torch.float64 if wide else state_dtype(z.dtype)][choose(rows * channels, steps)]
    return Case(z.dtype, *given, activated, keep_state, wide, _cut(shape, steps))


def _cut(shape: Shape, steps: int) -> Shape:
    """The shape less the chunks that T steps leave empty; a power of two of them, so that there are few kernels."""
    filled = -(-steps // shape.steps)
    return shape._replace(chunks=min(shape.chunks, 1 << (filled - 1).bit_length()))


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
        _put(name, case, blocks, index, addresses, sizes)
        return
    with torch.cuda.device(index):
        _put(name, case, blocks, index, addresses, sizes)


def _put(name: str, case: Case, blocks: int, index: int, addresses, sizes) -> None:
    """Launches by cuda.core, which takes a tenth of the host time that numba's own launching takes.

    The device's primary context, which torch works in too, is current in the thread from then on.
    cuda.core hands whole numbers over as 8 bytes, of which the driver takes as many as the parameter has: the lower 4
    of an int32.
    """
    _device(index).set_current()  # a thread of autograd's may have no context yet
    _launcher(name, case, blocks, index, torch._C._cuda_getCurrentRawStream(index))(*addresses, *sizes)


# The caches below hold what is made of a raw stream handle, never which stream is current: that is asked anew at
# every launch. A pool of streams is reused by torch, so there are few handles.


@cache
def _device(index: int) -> Any:
    from cuda.core import Device  # of the extra `cuda`, as numba-cuda is

    return Device(index)


@lru_cache(1024)
def _launcher(name: str, case: Case, blocks: int, index: int, handle: int) -> Any:
    """A function of a kernel's arguments that launches it."""
    from cuda.core import LaunchConfig, Stream, launch

    (overload,) = _compiled(name, case, index).overloads.values()
    layout = LaunchConfig(grid=blocks, block=case.shape[:2])
    return partial(launch, Stream.from_handle(handle), layout, overload.library.get_cufunc().kernel)


@cache
def _compiled(name: str, case: Case, index: int) -> Any:
    """The compiled kernel on device `index`. Compiling takes about a second, so a call of the same shape, dtype and
    mode, with gradients if these are wanted, comes before a graph is captured."""
    capability = torch.cuda.get_device_capability(index)
    if case.dtype == torch.bfloat16 and capability < BFLOAT16_CAPABILITY:
        raise RuntimeError(
            f"pool: bfloat16 expected a device of compute capability {BFLOAT16_CAPABILITY} or later, got {capability};"
            " use float16 or float32"
        )
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "pool: a kernel would be compiled while a CUDA graph is captured; call once before with the same shape,"
            " dtype and mode, and with gradients if they are captured"
        )
    signature = forward_signature(case) if name == "forward" else backward_signature(case)
    threads = case.shape.lanes * case.shape.chunks
    # Without link-time optimisation, as the test compiles them that looks for spills: machine code is alike.
    return cuda.jit(signature, launch_bounds=threads, lto=False)(_FACTORIES[name](case))


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

"""The pooling on the CPU by numba: how its `kernels` are launched.

The kernels are serial and release the GIL; a small thread pool of this module runs them side by side. There
is then no second OpenMP runtime beside torch's, a forked child simply builds its own pool, and one setting
governs both: `torch.set_num_threads`.
"""

import ctypes
import os
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from .kernels import ADDRESS, BLOCK, CHANNELS, GROUP, PLAN_SIZE, STEPS, backward_range, forward_range

DTYPES = (torch.float32, torch.float64)

_WIDEST_BLOCK = 1024  # channels: a state row of float32 and those read beside it stay in first-level cache
_NARROWEST_BLOCK = 32  # channels: below this the vector loops are mostly their own beginnings and ends
_GROUP_CHANNELS = 32768  # channels that step through time together: 128 KiB of float32 in second-level cache
_SERIAL_ELEMENTS = 2**18  # T * B * C below which waking another thread costs more (0.1 ms, measured) than it brings

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


def _launch(kernel, plan: np.ndarray, mode, held: tuple, shape: torch.Size, dtype: torch.dtype) -> None:
    """Runs a kernel over all rows and channels. `held` are the tensors whose addresses the plan has."""
    steps, rows, channels = shape
    if rows == 0 or channels == 0:
        return
    threads = torch.get_num_threads() if steps * rows * channels >= _SERIAL_ELEMENTS else 1
    block = _block_width(rows, channels, threads)
    plan[BLOCK] = block
    # In (T, B, C) the rows of a step are neighbours in memory and move through time together; in (B, T, C)
    # the steps of a row are, and it goes alone.
    plan[GROUP] = max(1, _GROUP_CHANNELS // block) if plan[ADDRESS["z"] + 1] >= plan[ADDRESS["z"] + 2] else 1
    items = rows * -(-channels // block)
    threads = min(threads, items)
    if threads == 1:
        kernel(plan, 0, items, _WITNESS[dtype], *mode)
        return
    bounds = [items * share // threads for share in range(threads + 1)]
    waiting = [
        _hand_over(threads - 1, held, kernel, plan, bounds[share], bounds[share + 1], _WITNESS[dtype], *mode)
        for share in range(1, threads)
    ]
    kernel(plan, 0, bounds[1], _WITNESS[dtype], *mode)
    for share in waiting:
        if share is not None:
            share.result()


def _hand_over(helpers: int, held: tuple, kernel, *arguments) -> Future | None:
    """Has a helper thread run a kernel; where no thread is to be had (any more, as the interpreter ends), runs it here.

    The helper holds the tensors: the caller may be interrupted (Ctrl-C) and drop its own while the helper writes.
    """
    once, shares = threading.Lock(), [(kernel, arguments, held)]
    try:
        return _pool_of(helpers).submit(_run, once, shares)
    except RuntimeError:  # a share that was queued before its thread could not start is there for the other threads
        _run(once, shares)
        return None


def _run(once: threading.Lock, shares: list) -> None:
    """Runs the share and removes it, tensors and all: who comes second waits for the first, and finds nothing."""
    with once:
        while shares:
            kernel, arguments, _held = shares.pop()
            kernel(*arguments)


def _put(plan: np.ndarray, name: str, tensor: torch.Tensor | None) -> None:
    """Enters a (T, B, C) or (B, C) tensor whose channels are adjacent."""
    if tensor is not None:
        position, strides = ADDRESS[name], tensor.stride()
        plan[position : position + 3] = (
            tensor.data_ptr(),
            strides[0] if tensor.dim() == 3 else 0,
            strides[-2],
        )


def _adjacent(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor, copied if its channels are not adjacent in memory."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def _mode(gates, zoned, activated: bool) -> tuple[bool | None, ...]:
    """What a kernel is specialised for: output gate, input gate, zoneout, activated gates; True or None each."""
    there = (gates[2] is not None, gates[3] is not None, zoned is not None, activated)
    return tuple(one or None for one in there)


def _plan(gates, initial, zoned, lengths) -> np.ndarray:
    steps, _, channels = gates[0].shape
    plan = np.zeros(PLAN_SIZE, np.int64)
    for name, tensor in zip(("z", "f", "o", "i", "initial", "zoned"), (*gates, initial, zoned), strict=True):
        _put(plan, name, tensor)
    if lengths is not None:
        plan[ADDRESS["lengths"]] = lengths.data_ptr()
    plan[STEPS], plan[CHANNELS] = steps, channels
    return plan


def forward(gates, initial, zoned, lengths, activated: bool, keep_state: bool):
    """The pooling of `gates` = (z, f, o or None, i or None), each (T, B, C) float32 or float64 on the CPU.

    Returns (h (T, B, C), last (B, C), c): c holds the states that backward needs, (T, B, C), valid within
    each row's length; it is empty where there is no output gate (h is the same) and where `keep_state` is false.
    """
    gates = [_adjacent(gate) for gate in gates]
    initial, zoned, z, output_gate = _adjacent(initial), _adjacent(zoned), gates[0], gates[2]
    lengths = None if lengths is None else lengths.contiguous()
    steps, rows, channels = z.shape
    h = empty((steps, rows, channels), z.dtype)
    last = z.new_empty((rows, channels))
    c = empty((steps, rows, channels) if keep_state and output_gate is not None else (0,), z.dtype)
    plan = _plan(gates, initial, zoned, lengths)
    _put(plan, "h", h)
    _put(plan, "last", last)
    _put(plan, "c", c if c.dim() == 3 else None)
    held = (*gates, initial, zoned, lengths, h, last, c)
    _launch(forward_range, plan, _mode(gates, zoned, activated), held, z.shape, z.dtype)
    return h, last, c


def backward(grad_h, grad_last, gates, initial, zoned, lengths, c, activated: bool, out, grad_initial) -> None:
    """Writes the gates' gradients into `out` (as `gates`, channels adjacent) and the initial state's."""
    gates = [_adjacent(gate) for gate in gates]
    grad_h, grad_last, c = _adjacent(grad_h), _adjacent(grad_last), _adjacent(c)
    initial, zoned = _adjacent(initial), _adjacent(zoned)
    lengths = None if lengths is None else lengths.contiguous()
    plan = _plan(gates, initial, zoned, lengths)
    names = ("c", "dh", "dlast", "dz", "df", "do", "di", "dinitial")
    for name, tensor in zip(names, (c, grad_h, grad_last, *out, grad_initial), strict=True):
        _put(plan, name, tensor)
    held = (*gates, initial, zoned, lengths, c, grad_h, grad_last, *out, grad_initial)
    _launch(backward_range, plan, _mode(gates, zoned, activated), held, gates[0].shape, gates[0].dtype)

"""`qrnn.pool`: argument checks, choice of backend, and the registration of the fused kernels with torch.

Axes: T time steps, B batch rows, C channels. The kernels are registered twice over one implementation: as
`qrnn::pool`, whose gates are separate tensors, and as `qrnn::pool_packed`, whose gates (z, f, i, o in that
order, those that exist) lie side by side in one (T, B, G * C) tensor as a layer's convolution leaves them.
The packed form gives back one gradient tensor, where the separate form would cost a copy of every gradient.
"""

import warnings
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..dropout import chosen
from . import reference

BACKENDS = ("reference", "numba", "numba_cuda")
_FUSED = {"cpu": "numba", "cuda": "numba_cuda"}  # device type: its fused backend
_MODULES = {"cpu": "numba_cpu", "cuda": "numba_cuda"}  # device type: the module with that backend's kernels
_TAKES_HALF = {"numba_cuda"}  # backends whose kernels read and write half precision themselves
_HALF = (torch.bfloat16, torch.float16)
_FLOAT = (torch.float32, torch.float64)

Gates = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def backends() -> list[str]:
    """The names that `backend=` takes and that can run on this machine, the reference first.

    "reference" runs on every device, "numba" on CPU tensors, "numba_cuda" on CUDA tensors.
    """
    return [name for name in BACKENDS if obstacle(name) is None]


def obstacle(backend: str) -> str | None:
    """Why a backend cannot run on this machine; None if it can."""
    if backend == "reference":
        return None
    if find_spec("numba") is None:
        return "numba is not installed"
    return _cuda_obstacle() if backend == "numba_cuda" else _cpu_obstacle()


# What torch.compiler.assume_constant_result sets, which would import torch's compiler here: the answer is found once,
# while a graph is traced, and how it is found (drivers, imports) is not traced.
obstacle._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _cpu_obstacle() -> str | None:
    try:
        if import_module("numba.core.config").DISABLE_JIT:
            return "NUMBA_DISABLE_JIT is set"
        import_module(".numba_cpu", __package__)
    except (ImportError, OSError) as error:  # a numba that does not fit its numpy or llvmlite
        return f"numba is not loaded: {error}"
    return None


@cache
def _cuda_obstacle() -> str | None:
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if find_spec("numba_cuda") is None:
        return "numba-cuda is not installed; pip install 'qrnn[cuda]'"
    try:
        return import_module(".numba_cuda", __package__).unavailable()
    except Exception as error:  # a numba-cuda that does not fit its cuda-core or numpy: an error of any kind
        return f"numba-cuda is not loaded: {type(error).__name__}: {error}"


def pool(
    z: Tensor,
    f: Tensor,
    o: Tensor | None = None,
    i: Tensor | None = None,
    *,
    initial: Tensor | None = None,
    zoneout: float = 0.0,
    training: bool = True,
    lengths: Tensor | None = None,
    activated: bool = False,
    batch_first: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The recurrent pooling of a quasi-recurrent layer (section 2, eq. 3 to 6).

    Without o and i: f-pooling, h_t = f_t h_{t-1} + (1 - f_t) z_t. With o: fo-pooling, c_t = f_t c_{t-1} + (1
    - f_t) z_t and h_t = o_t c_t. With o and i: ifo-pooling, c_t = f_t c_{t-1} + i_t z_t and h_t = o_t c_t.
    The forget gate f weighs the OLD state. With i alone the state of ifo-pooling is given out without its
    output gate.

    Args:
        z, f, o, i: candidate and gates, (T, B, C), or (B, T, C) with `batch_first`; one dtype of float32,
            float64, bfloat16, float16, and one device. They are pre-activations (z goes through tanh, the
            gates through sigmoid) unless `activated`.
        initial: (B, C) the state before the first step, in the gates' dtype or the state's; zeros if None.
        zoneout: in [0, 1): the probability with which a forget gate is set to 1, drawn for each element anew,
            f := 1 - dropout(1 - f) without rescaling (eq. 6). Drawn from torch's generator of the device in
            steps of 2^-16. Only f changes: with ifo-pooling the input gate still adds its part, as eq. 6
            reads.
        training: zoneout does nothing where this is false.
        lengths: (B,) int64, each in [0, T], on the gates' device: a row's steps that count. Beyond them its
            state freezes, its output is 0, and so are the gradients of its gates. Values are checked on the
            CPU only, where looking costs no synchronisation; elsewhere they act as if clamped to [0, T].
        activated: z, f, o, i are used as they are.
        batch_first: the first two axes of z, f, o, i and h are (B, T).
        backend: "auto", or one of `qrnn.backends()`. "auto" is "numba" for CPU tensors, "numba_cuda" for CUDA
            tensors, and "reference" on other devices. Where the fused one cannot run, "auto" takes the
            reference and warns (under torch.compile without a word).

    Returns:
        (h, last): h as z in shape and dtype; last (B, C) the state after each row's last step, c (h for
        f-pooling). The state is float32 for half-precision gates and of the gates' dtype otherwise, and so is
        `last`.

    Raises:
        ValueError: a wrong shape, dtype, device or value; the message names argument, expected and got.
        RuntimeError: the requested backend cannot run here, or a second derivative or a torch.func transform is
            asked of a fused kernel (backend="reference" has both).
    """
    _check_gates(z, f, o, i)
    _check_zoneout(zoneout)
    if batch_first:
        z, f = z.transpose(0, 1), f.transpose(0, 1)
        o, i = (None if gate is None else gate.transpose(0, 1) for gate in (o, i))
    check_initial(z, initial)
    check_lengths(z, lengths)
    zoned = chosen(z.shape, zoneout, z.device) if training else None
    backend = _resolve(backend, z.device)
    if backend == "reference":
        h, last = reference.pool(z, f, o, i, initial=initial, zoned=zoned, lengths=lengths, activated=activated)
    else:
        work = _work_dtype(backend, z.dtype)
        cast = [_cast(gate, work) for gate in (z, f, o, i)]
        start = _cast(initial, reference.state_dtype(work))
        h, last, _ = torch.ops.qrnn.pool(*cast, start, zoned, lengths, activated, False)
    h = _cast(h, z.dtype)
    return (h.transpose(0, 1) if batch_first else h), last


def pool_packed(
    gates: Tensor,
    pooling: str,
    *,
    initial: Tensor | None = None,
    zoneout: float = 0.0,
    training: bool = True,
    lengths: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`pool` of pre-activations that lie side by side: gates (T, B, G * C), parts in the order z, f, i, o.

    Args:
        pooling: which parts there are: "f" (z, f), "fo" (z, f, o), "if" (z, f, i), "ifo" (z, f, i, o).
        The others as for `pool`.

    Returns:
        (h (T, B, C), last (B, C)) as `pool`.
    """
    has_output, has_input = "o" in pooling, "i" in pooling
    parts = _parts(gates, has_output, has_input)
    check_initial(parts[0], initial)
    check_lengths(parts[0], lengths)
    zoned = chosen(parts[0].shape, zoneout, gates.device) if training else None
    backend = _resolve(backend, gates.device)
    if backend == "reference":
        h, last = reference.pool(*parts, initial=initial, zoned=zoned, lengths=lengths)
        return h.to(gates.dtype), last
    cast = _cast(gates, _work_dtype(backend, gates.dtype))
    start = _cast(initial, reference.state_dtype(gates.dtype))
    h, last, _ = torch.ops.qrnn.pool_packed(cast, start, zoned, lengths, has_output, has_input, False)
    return _cast(h, gates.dtype), last


def _parts(gates: Tensor, has_output: bool, has_input: bool) -> Gates:
    """The views z, f, o, i of packed gates; None for those that do not exist."""
    z, f, *rest = gates.chunk(2 + has_output + has_input, dim=-1)
    return z, f, rest[-1] if has_output else None, rest[0] if has_input else None


def _work_dtype(backend: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the backend's kernels take gates of `dtype`."""
    return dtype if backend in _TAKES_HALF else reference.state_dtype(dtype)


def _cast(tensor: Any, dtype: torch.dtype) -> Any:
    """A tensor, or None, in `dtype`. `Tensor.to` takes nearly a microsecond to find that there is nothing to do."""
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


# Argument checks


def _check_gates(z: Tensor, f: Tensor, o: Tensor | None, i: Tensor | None) -> None:
    if z.dim() != 3:
        raise ValueError(f"z: expected 3 axes, (T, B, C) or (B, T, C), got shape {tuple(z.shape)}")
    if z.dtype not in _FLOAT + _HALF:
        raise ValueError(f"z: expected float32, float64, bfloat16 or float16, got {z.dtype}")
    for name, gate in (("f", f), ("o", o), ("i", i)):
        if gate is None:
            continue
        if gate.shape != z.shape:
            raise ValueError(f"{name}: expected z's shape {tuple(z.shape)}, got {tuple(gate.shape)}")
        if gate.dtype != z.dtype:
            raise ValueError(f"{name}: expected z's dtype {z.dtype}, got {gate.dtype}")
        if gate.device != z.device:
            raise ValueError(f"{name}: expected z's device {z.device}, got {gate.device}")


def _check_zoneout(zoneout: float) -> None:
    if not 0 <= zoneout < 1:
        raise ValueError(f"zoneout: expected a probability in [0, 1), got {zoneout}")


def check_initial(z: Tensor, initial: Tensor | None) -> None:
    """Raises ValueError unless initial (B, C) fits z (T, B, C)."""
    if initial is None:
        return
    if initial.shape != z.shape[1:]:
        raise ValueError(f"initial: expected shape (B, C) = {tuple(z.shape[1:])}, got {tuple(initial.shape)}")
    allowed = {z.dtype, reference.state_dtype(z.dtype)}
    if initial.dtype not in allowed:
        raise ValueError(f"initial: expected dtype {' or '.join(sorted(map(str, allowed)))}, got {initial.dtype}")
    if initial.device != z.device:
        raise ValueError(f"initial: expected z's device {z.device}, got {initial.device}")


def check_lengths(z: Tensor, lengths: Tensor | None) -> None:
    """Raises ValueError unless lengths (B,) fit z (T, B, ...); values are looked at on the CPU only."""
    if lengths is None:
        return
    if not isinstance(lengths, Tensor):
        raise ValueError(f"lengths: expected an int64 tensor of shape (B,), got {type(lengths).__name__}")
    if lengths.dtype != torch.int64 or lengths.shape != z.shape[1:2]:
        raise ValueError(
            f"lengths: expected int64 of shape (B,) = ({z.shape[1]},), got {lengths.dtype} of {tuple(lengths.shape)}"
        )
    if lengths.device != z.device:
        raise ValueError(f"lengths: expected z's device {z.device}, got {lengths.device}")
    if lengths.device.type != "cpu" or lengths.numel() == 0 or torch.compiler.is_compiling():
        return
    low, high = int(lengths.min()), int(lengths.max())
    if low < 0 or high > z.shape[0]:
        raise ValueError(f"lengths: expected values in [0, T] = [0, {z.shape[0]}], got {low if low < 0 else high}")


def _resolve(backend: str, device: torch.device) -> str:
    """The backend that runs; a requested one runs or raises."""
    chosen = _chosen(backend, device)
    if chosen != "reference" and not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"pool: expected no torch.func transform around a fused kernel, got one around {chosen!r};"
            " use backend='reference'"
        )
    return chosen


def _chosen(backend: str, device: torch.device) -> str:
    if backend == "auto":
        return _automatic(device)
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected auto or one of {', '.join(BACKENDS)}, got {backend!r}")
    reason = obstacle(backend)
    if reason is not None:
        raise RuntimeError(
            f"backend: {backend!r} was requested but cannot run here ({reason}); available: {', '.join(backends())}"
        )
    if backend != "reference" and _FUSED.get(device.type) != backend:
        kind = "CPU" if backend == "numba" else "CUDA"
        raise RuntimeError(f"backend: {backend!r} runs on {kind} tensors, got tensors on {device}")
    return backend


def _automatic(device: torch.device) -> str:
    backend = _FUSED.get(device.type, "reference")
    reason = obstacle(backend)
    if reason is None:
        return backend
    if not torch.compiler.is_compiling():
        warnings.warn(
            f"pool: {backend!r} cannot run here ({reason}); backend='auto' takes the slow 'reference'", stacklevel=5
        )
    return "reference"


# Registration with torch. define + impl costs about half the call overhead of torch.library.custom_op. Whether states
# are kept for backward, `keep_state`, is decided where a call is differentiated, `_with_autograd`: a graph that was
# exported without gradients may be trained.

_library = torch.library.Library("qrnn", "DEF")
_OPTIONS = "Tensor? initial, Tensor? zoned, Tensor? lengths"
_library.define(
    f"pool(Tensor z, Tensor f, Tensor? o, Tensor? i, {_OPTIONS}, bool activated, bool keep_state)"
    " -> (Tensor, Tensor, Tensor)"
)
_library.define(
    f"pool_backward(Tensor grad_h, Tensor grad_last, Tensor z, Tensor f, Tensor? o, Tensor? i, {_OPTIONS},"
    " Tensor c, bool activated) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    f"pool_packed(Tensor gates, {_OPTIONS}, bool has_output, bool has_input, bool keep_state)"
    " -> (Tensor, Tensor, Tensor)"
)
_library.define(
    f"pool_packed_backward(Tensor grad_h, Tensor grad_last, Tensor gates, {_OPTIONS}, Tensor c,"
    " bool has_output, bool has_input) -> (Tensor, Tensor)"
)


def _contiguous(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


@cache
def _kernels(device: torch.device) -> ModuleType:
    """The module with the fused kernels of a device; imported when first used, and looked up at every call."""
    return import_module(f".{_MODULES[device.type]}", __package__)


def _fresh(tensor: Tensor) -> Tensor:
    return _kernels(tensor.device).empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def _pool(z, f, o, i, initial, zoned, lengths, activated, keep_state):
    return _kernels(z.device).forward((z, f, o, i), initial, zoned, lengths, activated, keep_state)


def _pool_backward(grad_h, grad_last, z, f, o, i, initial, zoned, lengths, c, activated):
    out = [None if gate is None else _fresh(gate) for gate in (z, f, o, i)]
    grad_initial = None if initial is None else _fresh(initial)
    _kernels(z.device).backward(
        grad_h, grad_last, (z, f, o, i), initial, zoned, lengths, c, activated, out, grad_initial
    )
    return tuple(z.new_empty(0) if gradient is None else gradient for gradient in (*out, grad_initial))


def _pool_packed(gates, initial, zoned, lengths, has_output, has_input, keep_state):
    parts = _parts(gates, has_output, has_input)
    return _kernels(gates.device).forward(parts, initial, zoned, lengths, False, keep_state)


def _pool_packed_backward(grad_h, grad_last, gates, initial, zoned, lengths, c, has_output, has_input):
    grad_gates = _fresh(gates)
    grad_initial = None if initial is None else _fresh(initial)
    parts, grad_parts = _parts(gates, has_output, has_input), _parts(grad_gates, has_output, has_input)
    _kernels(gates.device).backward(
        grad_h, grad_last, parts, initial, zoned, lengths, c, False, grad_parts, grad_initial
    )
    return grad_gates, gates.new_empty(0) if grad_initial is None else grad_initial


def _fake_results(z: Tensor, has_output: bool, keep_state: bool):
    shape, dtype = z.shape if keep_state and has_output else (0,), reference.state_dtype(z.dtype)
    return z.new_empty(z.shape), z.new_empty(z.shape[1:], dtype=dtype), z.new_empty(shape, dtype=dtype)


def _pool_fake(z, f, o, i, initial, zoned, lengths, activated, keep_state):
    return _fake_results(z, o is not None, keep_state)


def _pool_packed_fake(gates, initial, zoned, lengths, has_output, has_input, keep_state):
    return _fake_results(_parts(gates, has_output, has_input)[0], has_output, keep_state)


def _pool_backward_fake(grad_h, grad_last, z, f, o, i, initial, zoned, lengths, c, activated):
    return tuple(z.new_empty(0) if tensor is None else _contiguous(tensor) for tensor in (z, f, o, i, initial))


def _pool_packed_backward_fake(grad_h, grad_last, gates, initial, zoned, lengths, c, has_output, has_input):
    return _contiguous(gates), gates.new_empty(0) if initial is None else _contiguous(initial)


for _name, _kernel, _fake in (
    ("pool", _pool, _pool_fake),
    ("pool_backward", _pool_backward, _pool_backward_fake),
    ("pool_packed", _pool_packed, _pool_packed_fake),
    ("pool_packed_backward", _pool_packed_backward, _pool_packed_backward_fake),
):
    _library.impl(_name, _kernel, "CPU")
    _library.impl(_name, _kernel, "CUDA")
    torch.library.register_fake(f"qrnn::{_name}", _fake, lib=_library)


def _given(grad_h: Tensor | None, grad_last: Tensor | None, z: Tensor) -> tuple[Tensor, Tensor]:
    """The upstream gradients, zeros in place of None. torch would fill a whole tensor for h, and one for c too."""
    if grad_h is None:
        grad_h = z.new_zeros((1, 1, z.shape[2])).expand(z.shape)
    if grad_last is None:
        grad_last = z.new_zeros(z.shape[1:], dtype=reference.state_dtype(z.dtype))
    return grad_h, grad_last


def _save_pool(ctx, inputs, output):
    z, f, o, i, initial, zoned, lengths, ctx.activated, _ = inputs
    h, _, c = output
    ctx.save_for_backward(z, f, o, i, initial, zoned, lengths, h if o is None else c)
    ctx.mark_non_differentiable(c)
    ctx.set_materialize_grads(False)


def _differentiate_pool(ctx, grad_h, grad_last, _):
    z, f, o, i, initial, zoned, lengths, c = ctx.saved_tensors
    upstream = _given(grad_h, grad_last, z)
    gradients = torch.ops.qrnn.pool_backward(*upstream, z, f, o, i, initial, zoned, lengths, c, ctx.activated)
    given = (z, f, o, i, initial)
    return (
        *(None if t is None else g for t, g in zip(given, gradients, strict=True)),
        None,
        None,
        None,
        None,
    )


def _save_packed(ctx, inputs, output):
    gates, initial, zoned, lengths, ctx.has_output, ctx.has_input, _ = inputs
    h, _, c = output
    ctx.save_for_backward(gates, initial, zoned, lengths, c if ctx.has_output else h)
    ctx.mark_non_differentiable(c)
    ctx.set_materialize_grads(False)


def _differentiate_packed(ctx, grad_h, grad_last, _):
    gates, initial, zoned, lengths, c = ctx.saved_tensors
    upstream = _given(grad_h, grad_last, _parts(gates, ctx.has_output, ctx.has_input)[0])
    grad_gates, grad_initial = torch.ops.qrnn.pool_packed_backward(
        *upstream, gates, initial, zoned, lengths, c, ctx.has_output, ctx.has_input
    )
    return grad_gates, None if initial is None else grad_initial, None, None, None, None, None


# What torch.library.register_autograd does too, but for filling in the defaults of a schema's arguments at each call,
# 12 to 20 us of host time: as much as all the rest of a call without gradients.


def _with_autograd(function, operator, *inputs):
    wanted = torch.is_grad_enabled() and any(isinstance(one, Tensor) and one.requires_grad for one in inputs)
    if wanted or forward_ad._current_level >= 0:  # forward mode, which is refused there where an input has a tangent
        return function.apply(*inputs[:-1], True)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*inputs)


def _below_autograd(operator, save, ctx, *inputs):
    with torch._C._AutoDispatchBelowAutograd():
        output = operator(*inputs)
    save(ctx, inputs, output)
    return output


def _no_second_derivative(ctx, *_):
    raise RuntimeError(
        "pool: a fused kernel has first derivatives only, got a request for the second; use backend='reference'"
    )


class _Pool(torch.autograd.Function):
    forward = staticmethod(partial(_below_autograd, torch.ops.qrnn.pool, _save_pool))
    backward = staticmethod(_differentiate_pool)


class _PoolPacked(torch.autograd.Function):
    forward = staticmethod(partial(_below_autograd, torch.ops.qrnn.pool_packed, _save_packed))
    backward = staticmethod(_differentiate_packed)


_library.impl("pool", partial(_with_autograd, _Pool, torch.ops.qrnn.pool), "Autograd")
_library.impl("pool_packed", partial(_with_autograd, _PoolPacked, torch.ops.qrnn.pool_packed), "Autograd")
torch.library.register_autograd("qrnn::pool_backward", _no_second_derivative, lib=_library)
torch.library.register_autograd("qrnn::pool_packed_backward", _no_second_derivative, lib=_library)

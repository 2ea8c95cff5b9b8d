"""Device functions on one element: how it is read, written and activated, by the dtype it is stored in."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import config, cuda, types

if config.ENABLE_CUDASIM:

    def device(function: Callable) -> Callable:
        """The simulator calls Python functions as they are."""
        return function

else:
    from llvmlite import ir
    from numba.cuda import libdevice
    from numba.cuda.extending import intrinsic

    device = cuda.jit(device=True, forceinline=True)


class Arithmetic(NamedTuple):
    """The type in which a dtype is computed, and the functions that read, write and activate its elements."""

    real: Any
    load: Callable
    store: Callable
    sigmoid: Callable
    tanh: Callable


@cache
def arithmetic(dtype: torch.dtype) -> Arithmetic:
    """float64 is computed in float64, every other dtype in float32."""
    real = types.float64 if dtype == torch.float64 else types.float32

    @device
    def tanh(x):
        return real(math.tanh(x))

    return Arithmetic(real, *_memory(dtype, real), _sigmoid(dtype), tanh)


def _sigmoid(dtype: torch.dtype) -> Callable:
    """1 / (1 + exp(-x)). In float32 four instructions, and an error of 2^-22 at most."""
    if dtype == torch.float64 or config.ENABLE_CUDASIM:
        one = types.float64(1)

        @device
        def sigmoid(x):
            return one / (one + math.exp(-x))

    else:
        one, log2_e = types.float32(1), types.float32(math.log2(math.e))

        @device
        def sigmoid(x):
            return _reciprocal(one + _exp2(-x * log2_e))

    return sigmoid


if not config.ENABLE_CUDASIM:

    def _instruction(name: str, result: Any = types.float32) -> Callable:
        """A device function of one float32 by an instruction of PTX that numba has no name for."""
        register = {types.float32: "f", types.uint16: "h"}[result]

        @intrinsic
        def call(context, x):
            def generate(context, builder, signature, arguments):
                function = ir.FunctionType(context.get_value_type(result), [ir.FloatType()])
                return builder.call(ir.InlineAsm(function, f"{name} $0, $1;", f"={register},f"), arguments)

            return result(types.float32), generate

        return call

    _exp2 = _instruction("ex2.approx.ftz.f32")
    _reciprocal = _instruction("rcp.approx.ftz.f32")


def _memory(dtype: torch.dtype, real: Any) -> tuple[Callable, Callable]:
    """(load, store) of one element."""
    if dtype == torch.bfloat16:
        return _bfloat16_memory()
    kept = types.float16 if dtype == torch.float16 else real

    @device
    def load(pointer, at):
        return real(pointer[at])

    @device
    def store(pointer, at, value):
        pointer[at] = kept(value)

    return load, store


def _bfloat16_memory() -> tuple[Callable, Callable]:
    """bfloat16 is the upper half of a float32's bits. Stores round to nearest, ties to even; NaN stays NaN."""
    if config.ENABLE_CUDASIM:

        def as_float(bits):
            return (np.uint32(bits) << np.uint32(16)).view(np.float32)

        def as_bits(value):
            bits = int(np.float32(value).view(np.uint32))
            return 0x7FFF if value != value else (bits + 0x7FFF + (bits >> 16 & 1)) >> 16

    else:

        @device
        def as_float(bits):
            return libdevice.int_as_float(types.int32(types.uint32(bits) << types.uint32(16)))

        as_bits = _instruction("cvt.rn.bf16.f32", types.uint16)

    @device
    def load(pointer, at):
        return as_float(pointer[at])

    @device
    def store(pointer, at, value):
        pointer[at] = as_bits(value)

    return load, store

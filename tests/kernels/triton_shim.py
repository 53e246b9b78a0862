"""Correct bfloat16 for Triton's interpreter, for tests only.

The interpreter keeps bfloat16 as raw uint16 and does integer arithmetic on it, silently, and it truncates float32 to
bfloat16 where a GPU rounds to nearest even. `install` teaches it to widen bfloat16 to float32 before every operation
and to round the result, as the hardware does. Call it before the first kernel runs.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


_Handle = interpreter.TensorHandle
_builder = interpreter.InterpreterBuilder


def _is_bf16(handle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def widen(handle):
    if not _is_bf16(handle):
        return handle
    return _Handle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def narrow(handle):
    """Round float32 to bfloat16, half to even; NaN stays NaN."""
    values = np.ascontiguousarray(handle.data, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return _Handle(np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16), tl.bfloat16)


def _widening(method):
    """An operation on bfloat16 tensors is one on float32 tensors, rounded; comparisons give no float to round."""

    def wrapped(self, *arguments):
        handles = [argument for argument in arguments if isinstance(argument, _Handle)]
        if not any(_is_bf16(handle) for handle in handles):
            return method(self, *arguments)
        result = method(self, *(widen(a) if isinstance(a, _Handle) else a for a in arguments))
        return narrow(result) if result.data.dtype == np.float32 else result

    return wrapped


def _casting(method):
    def wrapped(self, source, target, *rounding):
        if tl.bfloat16 not in (source.dtype.scalar, target.scalar):
            return method(self, source, target, *rounding)
        source = widen(source)
        if target.scalar != tl.bfloat16:
            return _Handle(source.data.astype(interpreter._get_np_dtype(target)), target.scalar)
        return narrow(_Handle(source.data.astype(np.float32), tl.float32))

    return wrapped


def _dot(method):
    def wrapped(self, a, b, accumulator, *arguments):
        return method(self, widen(a), widen(b), accumulator, *arguments)

    return wrapped


def install() -> None:
    for name in ("binary_op", "unary_op", "ternary_op", "create_fma"):
        setattr(_builder, name, _widening(getattr(_builder, name)))
    for name in ("cast_impl", "create_fp_to_fp"):
        setattr(_builder, name, _casting(getattr(_builder, name)))
    _builder.create_dot = _dot(_builder.create_dot)

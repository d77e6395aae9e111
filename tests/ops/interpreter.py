"""Triton's interpreter, made right for bf16: it keeps bit patterns and computes with them as if they were integers."""

from __future__ import annotations

from typing import Any

import numpy as np


def _wide(handle: Any) -> np.ndarray:
    """A bf16 handle's numbers in fp32, or any other handle's data."""
    import triton.language as tl

    if handle.dtype.scalar != tl.bfloat16:
        return handle.data
    return (handle.data.astype(np.uint32) << 16).view(np.float32)


def _rounded(data: np.ndarray) -> np.ndarray:
    """fp32 to bf16 bit patterns, to nearest even as a GPU's conversion does; the interpreter's own truncates."""
    bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(data), np.uint32(0x7FC0), rounded).astype(np.uint16).reshape(np.shape(data))


def repair() -> None:
    """Patch `InterpreterBuilder`: products of bf16 in fp32, conversions that round, any other bf16 arithmetic an error."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    if getattr(builder, "_repaired", False):
        return
    builder._repaired = True
    dot, cast = builder.create_dot, builder.cast_impl

    def create_dot(self: Any, a: Any, b: Any, sums: Any, *rest: Any) -> Any:
        if tl.bfloat16 not in (a.dtype.scalar, b.dtype.scalar):
            return dot(self, a, b, sums, *rest)
        return interpreter.TensorHandle(np.matmul(_wide(a), _wide(b)) + sums.data, sums.dtype.scalar)

    def cast_impl(self: Any, source: Any, kind: Any) -> Any:
        before, after = source.dtype.scalar, kind.scalar
        if before == after or tl.bfloat16 not in (before, after):
            return cast(self, source, kind)
        if before == tl.bfloat16:
            wide = interpreter.TensorHandle(_wide(source), tl.float32)
            return wide if after == tl.float32 else cast(self, wide, kind)
        wide = source if before == tl.float32 else cast(self, source, tl.float32)
        return interpreter.TensorHandle(_rounded(wide.data), after)

    def guarded(name: str) -> Any:
        original = getattr(builder, name)

        def checked(self: Any, *operands: Any, **options: Any) -> Any:
            if any(isinstance(x, interpreter.TensorHandle) and x.dtype.scalar == tl.bfloat16 for x in operands):
                raise TypeError(f"{name} of bf16 is wrong in the interpreter: the kernel has to widen first")
            return original(self, *operands, **options)

        return checked

    builder.create_dot, builder.cast_impl = create_dot, cast_impl
    for name in ("binary_op", "unary_op", "create_fma"):
        if hasattr(builder, name):
            setattr(builder, name, guarded(name))

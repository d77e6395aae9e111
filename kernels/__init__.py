"""Triton kernels, one file per operation; installed as `hart_infer.kernels`.

Modules in this folder import torch and triton only, and know nothing of the package above them. Kernels are not specialised
on counts that change from scale to scale (queries, keys, rows, tokens), so that all scales share one compiled binary. They
are specialised on strides and on the length of a row, because Triton loads 128 bits at once only where 16 divides these.
"""

from __future__ import annotations

from typing import Any

MIN_CAPABILITY = (8, 0)
DTYPES = ("float32", "float16", "bfloat16")


class LimitExceeded(Exception):
    """Raised by a launcher, before it launches anything, for valid arguments that are larger than its kernel supports."""


def refusal(where: Any) -> str | None:
    """Return why Triton kernels can't run at `where` (its device, dtype and capability), or None if they can.

    Raises the allocator's or driver's error where memory ran out while it tried: that says nothing about the next call.
    """
    from .launch import failure, interpreted

    if str(where.dtype).removeprefix("torch.") not in DTYPES:
        return f"{where.dtype} is not supported"
    if where.device == "cpu":
        return None if interpreted() else "Triton runs on the CPU only interpreted, for tests (TRITON_INTERPRET=1)"
    if where.device != "cuda":
        return f"Triton has no {where.device} kernels"
    if where.capability < MIN_CAPABILITY:
        return f"it needs compute capability {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} or newer"
    if interpreted():
        return "Triton was told to interpret its kernels (TRITON_INTERPRET=1)"
    return failure()

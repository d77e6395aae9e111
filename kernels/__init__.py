"""Triton kernels, one file per operation; installed as `hart_infer.kernels`.

Modules in this folder import torch and triton only, and know nothing of the package above them. What only counts (queries,
keys, rows) is not specialised on, so that a picture's scales share one binary; what is a stride or bounds a row is.
"""

from __future__ import annotations

from typing import Any

MIN_CAPABILITY = (8, 0)
DTYPES = ("float32", "float16", "bfloat16")


class Beyond(Exception):
    """Raised at a kernel's door, with a sentence, for arguments that are right but larger than it was made for."""


def refusal(where: Any) -> str | None:
    """Why Triton kernels don't run at a `Where` (device, dtype, capability), or None if they do."""
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

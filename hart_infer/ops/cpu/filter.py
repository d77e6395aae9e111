"""Filter logits by top-k and top-p by the CPU's kernel: what the reference in `hart_infer/ops/logits.py` does, in fp32."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from .library import call, load


class Filter(ctypes.Structure):
    """`struct Filter` of csrc/cpu/kernels.h."""

    _fields_ = [
        ("logits", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "width", "top_k")),
        ("has_top_p", ctypes.c_int32),
        ("removable", ctypes.c_float),
    ]


def refusal(where: Any) -> str | None:
    """Return why the kernel can't run at a `Where` (device, dtype), or None: any x86-64 CPU runs it."""
    if where.device != "cpu":
        return "it is for CPUs"
    if where.dtype != torch.float32:
        return f"{where.dtype} is not supported"
    loaded = load()
    return loaded if isinstance(loaded, str) else None


def drop_unlikely(logits: Tensor, top_k: int, top_p: float) -> None:
    """Compute what the reference in `hart_infer/ops/logits.py` computes.

    A code whose sum is within rounding of p may differ, and one of a logit 87 below the best has no probability here. Rows
    without a softmax (a NaN, an inf, or all -inf) stay as they are.
    """
    if logits.dtype != torch.float32 or logits.device.type != "cpu":
        raise ValueError(f"drop_unlikely: the logits must be in float32, on the CPU, not in {logits.dtype} on {logits.device}.")
    width = logits.shape[-1]
    rows = logits.contiguous()
    if rows.numel():
        k = top_k if 0 < top_k < width else 0
        call("filter", Filter(rows.data_ptr(), rows.numel() // width, width, k, top_p > 0, 1 - top_p))
    if rows is not logits:
        logits.copy_(rows)

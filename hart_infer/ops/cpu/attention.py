"""Attend by the CPU's kernel: what the reference in `hart_infer/ops/attention.py` does, in bf16."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .library import LimitExceeded, Operand, call, has_tiles

LOG2E = math.log2(math.e)
MAX_HEAD_DIM = 1024
LIMIT = f"an even head_dim up to {MAX_HEAD_DIM} and a scale above 0"


class Arguments(ctypes.Structure):
    """`struct Attention` of csrc/cpu/kernels.h."""

    _fields_ = [
        *((name, Operand) for name in ("q", "k", "v")),
        ("out", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "heads", "queries", "head_dim")),
        ("ranges", ctypes.c_void_p),
        ("num_ranges", ctypes.c_int64),
        ("scale_log2", ctypes.c_float),
        ("bonus", ctypes.c_float),
        ("tiles", ctypes.c_int32),
    ]


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, multiplicity: int = 1, ranges: Sequence[int] | None = None
) -> Tensor:
    """Compute what the reference in `hart_infer/ops/attention.py` computes.

    Raises ValueError for arguments that don't fit, LimitExceeded for those beyond LIMIT, BackendError where it can't run.
    """
    _check(q, k, v, multiplicity, ranges)
    rows, heads, queries, head_dim = q.shape
    if head_dim % 2 or head_dim > MAX_HEAD_DIM or not scale > 0:
        raise LimitExceeded(f"attention's kernel for CPUs takes {LIMIT}, not {head_dim} and {scale}.")
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    out = q.new_empty(rows, queries, heads * head_dim)
    pairs = [0, k.shape[2]] if ranges is None else list(ranges)
    places = (ctypes.c_int64 * len(pairs))(*pairs)
    bonus = 0.0 if ranges is None else math.log2(multiplicity)  # for all keys it cancels out
    if out.numel():
        call(
            "attention",
            Arguments(
                Operand.of(q), Operand.of(k), Operand.of(v), out.data_ptr(), rows, heads, queries, head_dim,
                ctypes.addressof(places), len(pairs) // 2, scale * LOG2E, bonus, has_tiles(),
            ),
        )  # fmt: skip
    return out


def _check(q: Tensor, k: Tensor, v: Tensor, multiplicity: int, ranges: Sequence[int] | None) -> None:
    if q.dim() != 4 or k.shape != v.shape or k.dim() != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        shapes = ", ".join(str(list(x.shape)) for x in (q, k, v))
        raise ValueError(f"attention: q must be [R, H, L, d], k and v [R, H, N, d]; {shapes} don't fit each other.")
    if not k.shape[2]:
        raise ValueError("attention: there must be a key.")
    if any(x.dtype != torch.bfloat16 or x.device.type != "cpu" for x in (q, k, v)):
        raise ValueError("attention: q, k and v must be in bfloat16, on the CPU.")
    if multiplicity < 1:
        raise ValueError(f"attention: multiplicity must be at least 1, not {multiplicity}.")
    if ranges is not None:
        pairs = list(zip(ranges[::2], ranges[1::2], strict=False))
        if not ranges or len(ranges) % 2 or any(not 0 <= start < stop for start, stop in pairs):
            raise ValueError(f"attention: ranges must be pairs of start and a larger stop, not {list(ranges)}.")
        if max(stop for _, stop in pairs) > k.shape[2]:
            raise ValueError(f"attention: ranges {list(ranges)} must be within {k.shape[2]} keys.")

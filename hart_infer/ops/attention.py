"""Attend from the queries of one scale or of some positions to the key/value cache."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import widens
from .registry import REFERENCE, Backend, Default, op

# What attends on CUDA. A row goes, or changes, with a measurement (benchmarks/attention_tiles.py): ours has never been timed.
DEFAULTS = (
    Default(
        "triton",
        "PyTorch's own has neither ranges nor multiplicity: it would copy the keys, and add a mask in fp32",
        uses=("ranges", "multiplicity"),
    ),
    Default(
        REFERENCE,
        "its own kernels (FlashAttention-2, cuDNN's on Hopper and newer) have been timed on GPUs, ours has not",
    ),
)


@op(triton=Backend("..kernels.attention:attention"), cpu=Backend(".cpu:attention"), defaults=DEFAULTS)
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, multiplicity: int = 1, ranges: Sequence[int] | None = None
) -> Tensor:
    """Compute softmax attention without a mask: q [R, H, L, d], k and v [R, H, N, d], of one dtype -> [R, L, H * d].

    `ranges` [start0, stop0, start1, stop1, ...]: attend only to these of the N keys, which is not equal to full attention.

    `multiplicity` m: weight each key of the first range as m identical keys; without `ranges` it has no effect. This is exact
    for keys that are equal, as the unconditional half's 300 context keys are: one of them may stand for all.
    """
    rows, heads, length, head_dim = q.shape
    if ranges is not None:
        pairs = [(start, stop - start) for start, stop in zip(ranges[::2], ranges[1::2], strict=True)]
        k, v = (torch.cat([x.narrow(2, start, count) for start, count in pairs], dim=2) for x in (k, v))
    if multiplicity != 1 and ranges is not None:
        bonus = q.new_zeros(k.shape[2], dtype=torch.float32)
        # All in fp32: log(300) rounded to bf16 is a multiplicity 1.5 % off.
        bonus[: ranges[1] - ranges[0]] = math.log(multiplicity)
        out = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), bonus.expand(length, -1), scale=scale).to(q.dtype)
    elif widens(q, "attention"):
        out = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), scale=scale).to(q.dtype)
    else:
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.transpose(1, 2).reshape(rows, length, heads * head_dim)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None) -> Tensor:
    """Compute softmax attention of the last L of N positions to those up to each: q [R, H, L, d] -> [R, L, H * d].

    k and v [R, G, N, d]: each of the G key heads serves H / G consecutive query heads. `mask` [R, 1, L, N] bool, if given,
    replaces the causal rule: True where a query attends; one that attends nowhere gets 0, on a CPU. No kernel of ours:
    PyTorch's has the masks.
    """
    rows, heads, length, head_dim = q.shape
    groups, keys = k.shape[1:3]
    if length == 1:  # the queries that share keys are those of one head
        grouped = q.reshape(rows, groups, heads // groups, head_dim)
        out = attention(grouped, k, v, scale=scale) if mask is None else _masked(grouped, k, v, scale, mask)
        return out.unflatten(-1, (groups, head_dim)).transpose(1, 2).reshape(rows, 1, heads * head_dim)
    if heads > groups:
        k, v = (x.repeat_interleave(heads // groups, dim=1) for x in (k, v))
    if mask is None and length < keys:
        mask = torch.ones(length, keys, dtype=torch.bool, device=q.device).tril(keys - length)
    return _masked(q, k, v, scale, mask)


def _masked(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """Attend where `mask` is True, or causally: q, k, v [R, H, ., d] -> [R, L, H * d]."""
    dtype = q.dtype
    if widens(q, "attention"):
        q, k, v = q.float(), k.float(), v.float()
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale)
    return out.to(dtype).transpose(1, 2).flatten(2)

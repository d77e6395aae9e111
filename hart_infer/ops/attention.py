"""Attention of one scale over the key/value cache."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import widens
from .registry import Backend, op


@op(triton=Backend("..kernels.attention:attention"))
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, multiplicity: int = 1, ranges: Sequence[int] | None = None
) -> Tensor:
    """Softmax attention without a mask: q [R, H, L, d], k and v [R, H, N, d] -> [R, L, H * d].

    `ranges` (start, stop, start, stop, ...) leaves only those of the N keys, as if they were all: the first scales and a
    window, say. What that does to a picture is for who asks for it to know.

    `multiplicity`: each key of the first range (without `ranges`: all) counts as so many equal ones. This is exact: the
    unconditional half's context keys are all equal, and one may stand for the 300.
    """
    rows, heads, length, head_dim = q.shape
    if ranges is not None:
        pairs = [(start, stop - start) for start, stop in zip(ranges[::2], ranges[1::2], strict=True)]
        k, v = (torch.cat([x.narrow(2, start, count) for start, count in pairs], dim=2) for x in (k, v))
    if multiplicity != 1 and ranges is not None:
        bonus = q.new_zeros(k.shape[2], dtype=torch.float32)
        bonus[: ranges[1] - ranges[0]] = math.log(multiplicity)  # in fp32, and so all of it: bf16 would be 1 % off
        out = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), bonus.expand(length, -1), scale=scale).to(q.dtype)
    elif widens(q, "attention"):
        out = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), scale=scale).to(q.dtype)
    else:
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.transpose(1, 2).reshape(rows, length, heads * head_dim)

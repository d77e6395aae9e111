"""Attention of one scale over the key/value cache."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .precision import widens
from .registry import Backend, op


@op(triton=Backend("..kernels.attention:attention"))
def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """Softmax attention without a mask: q [R, H, L, d], k and v [R, H, N, d] -> [R, L, H * d]."""
    rows, heads, length, head_dim = q.shape
    if widens(q):
        out = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), scale=scale).to(q.dtype)
    else:
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.transpose(1, 2).reshape(rows, length, heads * head_dim)

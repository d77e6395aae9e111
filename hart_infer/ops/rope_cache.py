"""Rotate q and k of a merged qkv, and write k and v to the cache, as attention needs them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .registry import Backend, op
from .rope import rope


@op(mutates=("keys", "values"), triton=Backend("..kernels.rope_cache:rope_cache"), cpu=Backend(".cpu:rope_cache"))
def rope_cache(qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, gains: Tensor | None = None) -> Tensor:
    """Rotate q and k of `qkv` [R, L, 3, H, d] as `rope` does; return q [R, H, L, d].

    `cos`, `sin` [R, 1, L, d] in qkv's dtype. k is written to `keys` and v to `values`, both [R, H, L, d], views into a cache,
    which may have a wider dtype. With `gains` [H], q and k are first divided by their l2 norm and q multiplied by its
    head's gain.
    """
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    if gains is not None:
        q = F.normalize(q, dim=-1) * gains.view(-1, 1, 1)
        k = F.normalize(k, dim=-1)
    rope(k, cos, sin, out=keys)
    values.copy_(v)
    return rope(q, cos, sin)

"""Root-mean-square norm with HART's rounding point."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension of `x` [..., D] in fp32, round to x's dtype, then multiply by `weight` [D].

    Released `LlamaRMSNorm`: the rounding before the weight is part of the definition.
    """
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight

"""Apply group norm, then SiLU, as before most convolutions of the autoencoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .registry import Backend, op


@op(keeps_layout=True, triton=Backend("..kernels.group_norm_silu:group_norm_silu"))
def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, *, silu: bool = True) -> Tensor:
    """Normalise `x` [B, C, h, w] within each of `groups` groups of channels; `weight`, `bias` [C]; with `silu` apply SiLU.

    Statistics are taken in fp32; the norm is rounded to x's dtype before SiLU. The result keeps x's memory format: channels
    first or channels last.
    """
    last = not x.is_contiguous() and x.stride(1) == 1
    normed = F.group_norm(x, groups, weight, bias, eps)  # on a GPU always channels first
    normed = normed.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    return F.silu(normed, inplace=True) if silu else normed

"""Apply a layer norm with a scale and a shift per row, alone or after a gated update."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .registry import Backend, op


@op(cuda=Backend(".cuda:layer_norm_modulate"), cpu=Backend(".cpu:layer_norm_modulate"))
def layer_norm_modulate(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor, shift: Tensor, eps: float
) -> Tensor:
    """Return layer_norm(x) * (1 + scale) + shift for x [..., D]; `weight`, `bias` [D] or None.

    `scale` and `shift` broadcast to x, as [R, 1, D] does to [R, L, D]. All are of one dtype, but with x in fp32 and neither
    weight nor bias these two may be in half precision.
    """
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps) * (1 + scale) + shift


@op(cuda=Backend(".cuda:gated_layer_norm_modulate"), cpu=Backend(".cpu:gated_layer_norm_modulate"))
def gated_layer_norm_modulate(
    x: Tensor,
    update: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return x + gate * update, [..., D], and its norm as `layer_norm_modulate` computes it; `gate` broadcasts to x too."""
    total = x + gate * update
    return total, layer_norm_modulate.reference(total, weight, bias, scale, shift, eps)

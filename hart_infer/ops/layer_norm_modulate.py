"""Layer norm with a scale and a shift per row, alone and after a gated update (the residual diffusion's)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .registry import Backend, op


@op(cuda=Backend(".cuda:layer_norm_modulate"))
def layer_norm_modulate(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor, shift: Tensor, eps: float
) -> Tensor:
    """The layer norm of `x` [N, D], times 1 + `scale`, plus `shift`, both [N, D]; `weight`, `bias` [D] or None."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps) * (1 + scale) + shift


@op(cuda=Backend(".cuda:gated_layer_norm_modulate"))
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
    """x + gate * update, [N, D] each, and the modulated layer norm of that."""
    total = x + gate * update
    return total, layer_norm_modulate.reference(total, weight, bias, scale, shift, eps)

"""Root-mean-square norm with HART's rounding point, alone and with what comes before or after it."""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import Backend, op

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # what a quantised row is scaled to


@op(cuda=Backend(".cuda:rms_norm"))
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension of `x` [..., D] in fp32, round to x's dtype, then multiply by `weight` [D].

    Released `LlamaRMSNorm`: the rounding before the weight is part of the definition.
    """
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight


@op(cuda=Backend(".cuda:add_rms_norm"))
def add_rms_norm(x: Tensor, update: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum of two tensors [..., D], rounded to their dtype, and its norm."""
    total = x + update
    return total, rms_norm.reference(total, weight, eps)


@op(cuda=Backend(".cuda:rms_norm_modulate"))
def rms_norm_modulate(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """The norm of `x` [R, L, D], times 1 + `scale`, plus `shift`, [R, 1, D] each; `x` may be wider than the others."""
    return rms_norm.reference(x, weight, eps) * (1 + scale) + shift


@op(cuda=Backend(".cuda:rms_norm_quantized"))
def rms_norm_quantized(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The norm of `x` [..., D] in int8 or fp8 (e4m3), and each row's scale [...] fp32: values * scale is the norm.

    The largest number of a row becomes the dtype's largest.
    """
    normed = rms_norm.reference(x, weight, eps).float()
    scales = (normed.abs().amax(dim=-1) / LARGEST[dtype]).clamp(min=torch.finfo(torch.float32).tiny)
    quotients = normed / scales[..., None]
    return (quotients.round() if dtype == torch.int8 else quotients).to(dtype), scales

"""Apply the RMS norm that rounds before the weight, as released, alone or with an addition, modulation or quantization."""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import Backend, op

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # the largest magnitude of a quantized row becomes this


@op(cuda=Backend(".cuda:rms_norm"), cpu=Backend(".cpu:rms_norm"))
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension of `x` [..., D] in fp32, round to x's dtype, then multiply by `weight` [D].

    Released `LlamaRMSNorm`: the rounding before the weight is part of the definition.
    """
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight


@op(cuda=Backend(".cuda:add_rms_norm"), cpu=Backend(".cpu:add_rms_norm"))
def add_rms_norm(x: Tensor, update: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the sum of `x` and `update` [..., D], rounded to their dtype, and the RMS norm of that sum."""
    total = x + update
    return total, rms_norm.reference(total, weight, eps)


@op(cuda=Backend(".cuda:rms_norm_modulate"))
def rms_norm_modulate(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """Return rms_norm(x) * (1 + scale) + shift: `x` [R, L, D], `scale`, `shift` [R, 1, D].

    `x` may be fp32 with half-precision parameters; the result has x's dtype.
    """
    return rms_norm.reference(x, weight, eps) * (1 + scale) + shift


@op(cuda=Backend(".cuda:rms_norm_quantized"))
def rms_norm_quantized(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the RMS norm of `x` [..., D] in int8 or fp8 (e4m3), and each row's scale [...] fp32: values * scale is the norm.

    scale = the row's largest magnitude / the dtype's largest number.
    """
    normed = rms_norm.reference(x, weight, eps).float()
    scales = (normed.abs().amax(dim=-1) / LARGEST[dtype]).clamp(min=torch.finfo(torch.float32).tiny)
    quotients = normed / scales[..., None]
    return (quotients.round() if dtype == torch.int8 else quotients).to(dtype), scales

"""Apply HART's rotary embedding: the usual rotate-half, but with two angles per pair."""

from __future__ import annotations

from torch import Tensor


def rope(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor | None = None) -> Tensor:
    """Rotate `x` [R, H, L, d] by `cos`, `sin` [R, 1, L, d], already rounded to x's dtype; returns [R, H, L, d].

    With h = d/2: out_i = x_i cos_i - x_{i+h} sin_i and out_{i+h} = x_{i+h} cos_{i+h} + x_i sin_{i+h}. The two halves of
    cos and sin differ for image tokens (row angles, then column angles), so this is not one rotation per pair.
    `out`, if given, receives the result and may be any strided view of x's shape that does not overlap `x`.
    """
    half = x.shape[-1] // 2
    out = x.new_empty(x.shape) if out is None else out
    first, second = x[..., :half], x[..., half:]
    out[..., :half] = (first * cos[..., :half]).sub_(second * sin[..., :half])
    out[..., half:] = (second * cos[..., half:]).add_(first * sin[..., half:])
    return out

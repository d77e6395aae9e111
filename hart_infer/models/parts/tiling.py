"""Run a convolutional stack tile by tile, blending the overlaps: less memory, approximate."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

OVERLAP = 4  # tiles overlap by side // OVERLAP


def tiled(stack: Callable[[Tensor], Tensor], x: Tensor, tile: int) -> Tensor:
    """Apply `stack` to overlapping square tiles of `x` [B, C, h, w]; every output cell blends the tiles that cover it."""
    height, width = x.shape[-2:]
    side = min(tile, height, width)
    rows, columns = _starts(height, side), _starts(width, side)
    total: Tensor | None = None
    weight: Tensor | None = None
    for top in rows:
        for left in columns:
            part = stack(x[..., top : top + side, left : left + side]).float()
            scale = part.shape[-1] // side
            if total is None or weight is None:
                total = part.new_zeros(*part.shape[:-2], height * scale, width * scale)
                weight = part.new_zeros(height * scale, width * scale)
            window = _window(side * scale, side * scale // OVERLAP, part.device)
            area = (..., slice(top * scale, (top + side) * scale), slice(left * scale, (left + side) * scale))
            total[area] += part * window
            weight[area] += window
    assert total is not None and weight is not None
    return total / weight


def _starts(length: int, side: int) -> list[int]:
    """Return where tiles begin: evenly spread, overlapping by about a quarter, the last one flush with the end."""
    count = 1 + -(-(length - side) // max(1, side - side // OVERLAP)) if length > side else 1
    return [round(i * (length - side) / max(1, count - 1)) for i in range(count)]


def _window(side: int, overlap: int, device: torch.device) -> Tensor:
    """Return weights [side, side] that fall off linearly over the overlap and are never zero."""
    ramp = torch.arange(1, side + 1, device=device, dtype=torch.float32).clamp(max=overlap) / overlap
    profile = torch.minimum(ramp, ramp.flip(0))
    return profile[:, None] * profile

"""Compute cosine and sine tables of HART's rotary embedding (released `LlamaRotaryEmbedding1D`, `LlamaRotaryEmbedding2D`).

Context tokens have one position each; image tokens a row and a column, given as fractions of the last scale's grid and
shifted by the context's last position. The tables depend on the scale and the prompt, not on the layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

THETA = 10000.0
Table = tuple[Tensor, Tensor]  # cos, sin: [R, 1, L, d] each


def context_table(position_ids: Tensor, head_dim: int, dtype: torch.dtype) -> Table:
    """Return cos, sin [R, 1, T, d] for context `position_ids` [R, T]: 1-D over all of d."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    angles = position_ids.float()[..., None] * (1.0 / THETA**exponents)  # [R, T, d/2]
    return _table(torch.cat([angles, angles], dim=-1), dtype)


def image_tables(sides: Sequence[int], last_side: int, last_position: Tensor, head_dim: int, dtype: torch.dtype) -> list[Table]:
    """Return cos, sin [R, 1, side * side, d] of several scales, computed together.

    `last_position` [R] is each row's last context position id. Along d: row, row, column, column frequencies, so that
    rotate-half pairs a row angle with a column angle.
    """
    device = last_position.device
    positions = _positions(tuple(sides), last_side, device) + last_position.float()[:, None, None]  # [R, 2, L]
    exponents = torch.arange(0, head_dim, 4, dtype=torch.float32, device=device) / head_dim
    angles = positions[..., None] * (1.0 / THETA**exponents)  # [R, 2, L, d/4]
    row_angles, column_angles = angles.unbind(1)
    tables = _table(torch.cat([row_angles, row_angles, column_angles, column_angles], dim=-1), dtype)
    lengths = [side * side for side in sides]
    return list(zip(*(part.split(lengths, dim=2) for part in tables), strict=True))


def no_rotation(rows: int, length: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Table:
    """Return cos 1 and sin 0, [R, 1, L, d] each: what models without rotary positions rotate by. Takes no memory."""
    pair = torch.ones(1, 1, 1, head_dim, dtype=dtype, device=device), torch.zeros(1, 1, 1, head_dim, dtype=dtype, device=device)
    cos, sin = (values.expand(rows, 1, length, head_dim) for values in pair)
    return cos, sin


@lru_cache(maxsize=256)
def _positions(sides: tuple[int, ...], last_side: int, device: torch.device) -> Tensor:
    """Return the row and column of all scales' tokens in units of the last scale's cells, [2, L] fp32 on `device`.

    Computed on the CPU, since CUDA divides by a number in another rounding; kept, since a captured graph can't copy them.
    """
    parts = []
    for side in sides:
        grid = torch.arange(side, dtype=torch.float32, device="cpu") / side * last_side
        row, column = torch.meshgrid(grid, grid, indexing="ij")
        parts.append(torch.stack([row.flatten(), column.flatten()]))
    return torch.cat(parts, dim=1).to(device)


def _table(angles: Tensor, dtype: torch.dtype) -> Table:
    return angles.cos().to(dtype)[:, None], angles.sin().to(dtype)[:, None]

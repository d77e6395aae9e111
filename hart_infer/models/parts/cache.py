"""The key/value cache: allocated once per generation, every scale at a known offset."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...ops.precision import widens


class KVCache:
    """Keys and values of every block for every scale that later ones attend to.

    `keys`, `values`: [depth, R, H, length, d], of uninitialised memory until a scale writes it. A scale that is not cached
    attends to [what is cached, its own] through one scratch pair [2, R, H, scratch_length, d] that all blocks share.
    """

    def __init__(
        self,
        *,
        depth: int,
        rows: int,
        num_heads: int,
        head_dim: int,
        length: int,
        scratch_length: int = 0,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.keys = torch.empty(depth, rows, num_heads, length, head_dim, dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)
        scratch_dtype = torch.float32 if widens(self.keys, "attention") else dtype
        self.scratch = self.keys.new_empty(2, rows, num_heads, scratch_length, head_dim, dtype=scratch_dtype)

    @staticmethod
    def size_in_bytes(*, depth: int, rows: int, width: int, length: int, scratch_length: int, itemsize: int) -> int:
        """Bytes that a cache takes, scratch included (unless attention is widened); `width` is num_heads * head_dim."""
        return 2 * rows * width * itemsize * (depth * length + scratch_length)

    def at(self, offset: int, length: int, *, cached: bool = True, rows: slice = slice(None)) -> Place:
        """The place of a scale of `length` tokens behind `offset` cached ones, for some of the rows."""
        return Place(self, offset, length, cached, rows)


@dataclass(frozen=True)
class Place:
    """Where one scale's keys and values go, and what it attends to."""

    cache: KVCache
    offset: int
    length: int
    cached: bool
    rows: slice

    def slot(self, layer: int) -> tuple[Tensor, Tensor]:
        """Where the scale's own keys and values of a block go: two [R, H, length, d] views to write into."""
        keys, values = self._buffers(layer)
        return keys[:, :, self.offset :], values[:, :, self.offset :]

    def visible(self, layer: int) -> tuple[Tensor, Tensor]:
        """All that the scale attends to, earlier ones and itself: two [R, H, offset + length, d] views."""
        keys, values = self._buffers(layer)
        if not self.cached:
            keys[:, :, : self.offset].copy_(self.cache.keys[layer, self.rows, :, : self.offset])
            values[:, :, : self.offset].copy_(self.cache.values[layer, self.rows, :, : self.offset])
        return keys, values

    def _buffers(self, layer: int) -> tuple[Tensor, Tensor]:
        """Memory for what was cached before and the scale itself: [R, H, offset + length, d] each."""
        end = self.offset + self.length
        if not self.cached:
            keys, values = self.cache.scratch.unbind(0)
            return keys[self.rows, :, :end], values[self.rows, :, :end]
        return self.cache.keys[layer, self.rows, :, :end], self.cache.values[layer, self.rows, :, :end]

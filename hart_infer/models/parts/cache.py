"""The key/value cache: allocated once per generation, every scale at a known offset."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ... import ops
from ...ops.precision import widens


class KVCache:
    """Keys and values of every block for every scale that later ones attend to.

    `keys`, `values`: [depth, R, H, length, d], uninitialised until a scale is written. A scale that is not cached attends to
    a copy of [cached, its own] in `scratch` [2, R, H, scratch_length, d], which all blocks share.
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
        """Return a cache's bytes; `width` is num_heads * head_dim. The scratch takes more where attention is widened."""
        return 2 * rows * width * itemsize * (depth * length + scratch_length)

    def spread(self, rows: slice, count: int, length: int) -> None:
        """Copy the first `length` positions of `count` rows, evenly spaced among `rows`, to the rows behind each."""
        for kept in (self.keys, self.values):
            each = kept[:, rows, :, :length].unflatten(1, (count, -1))
            each[:, :, 1:].copy_(each[:, :, :1])

    def at(self, offset: int, length: int, *, cached: bool = True, rows: slice = slice(None)) -> CachePlace:
        """Return the place of a scale of `length` tokens at position `offset`, for `rows`."""
        return CachePlace(self, offset, length, cached, rows)


class Place(Protocol):
    """Where the keys and values of a scale, or of some positions, go, and what they attend to."""

    def slot(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return memory [R, H, L, d] for the keys and the values of a block."""
        ...

    def visible(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values [R, H, N, d] that are attended to, those just written last."""
        ...

    def attend(self, q: Tensor, layer: int, *, scale: float) -> Tensor:
        """Let the queries [R, H, L, d] of a block attend to what is visible -> [R, L, H * d]."""
        ...


@dataclass(frozen=True)
class CachePlace:
    """A scale's part of the cache: a `Place`."""

    cache: KVCache
    offset: int
    length: int
    cached: bool
    rows: slice

    def slot(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return the views [R, H, length, d] into which a block writes the scale's keys and values."""
        keys, values = self._buffers(layer)
        return keys[:, :, self.offset :], values[:, :, self.offset :]

    def visible(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values that the scale attends to, its own included: two views [R, H, offset + length, d]."""
        keys, values = self._buffers(layer)
        if not self.cached:
            keys[:, :, : self.offset].copy_(self.cache.keys[layer, self.rows, :, : self.offset])
            values[:, :, : self.offset].copy_(self.cache.values[layer, self.rows, :, : self.offset])
        return keys, values

    def attend(self, q: Tensor, layer: int, *, scale: float) -> Tensor:
        """As `Place`: every query to all of it."""
        return ops.attention(q, *self.visible(layer), scale=scale)

    def _buffers(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return the memory of what was cached before and the scale itself: [R, H, offset + length, d] each."""
        end = self.offset + self.length
        if not self.cached:
            keys, values = self.cache.scratch.unbind(0)
            return keys[self.rows, :, :end], values[self.rows, :, :end]
        return self.cache.keys[layer, self.rows, :, :end], self.cache.values[layer, self.rows, :, :end]

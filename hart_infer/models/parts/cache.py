"""The key/value cache: allocated once per generation, every scale at a known offset."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...generation.schedule import Stage
from ...ops.precision import widens
from ..config import TransformerConfig


class KVCache:
    """Keys and values of every block for every scale but the last, whose own are needed only inside its block.

    `keys`, `values`: [depth, rows, H, capacity, d]. The last scale attends to [cached, its own] through one scratch
    pair [rows, H, capacity + last, d] that all blocks share. A cache of a single stage (the context's) holds that stage.
    """

    def __init__(
        self, config: TransformerConfig, stages: Sequence[Stage], *, rows: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Allocate for the given stages; the memory is uninitialised until a scale writes it."""
        self.capacity, self._scratch_length = _lengths(stages)
        per_layer = (rows, config.num_heads, self.capacity, config.head_dim)
        self.keys = torch.empty(config.depth, *per_layer, dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)
        self._scratch: Tensor | None = None

    @staticmethod
    def size_in_bytes(config: TransformerConfig, stages: Sequence[Stage], *, rows: int, itemsize: int) -> int:
        """Bytes that a cache of `rows` rows takes, scratch included."""
        capacity, scratch = _lengths(stages)
        return 2 * rows * config.embed_dim * itemsize * (config.depth * capacity + scratch)

    def slot(self, layer: int, stage: Stage) -> tuple[Tensor, Tensor]:
        """Where this stage's keys and values of a block go: two [rows, H, stage.length, d] views to write into."""
        keys, values = self._buffers(layer, stage)
        end = stage.offset + stage.length
        return keys[:, :, stage.offset : end], values[:, :, stage.offset : end]

    def visible(self, layer: int, stage: Stage) -> tuple[Tensor, Tensor]:
        """All that this stage attends to, earlier scales and itself: two [rows, H, offset + length, d] views."""
        keys, values = self._buffers(layer, stage)
        end = stage.offset + stage.length
        if stage.is_last:
            keys[:, :, : stage.offset].copy_(self.keys[layer])
            values[:, :, : stage.offset].copy_(self.values[layer])
        return keys[:, :, :end], values[:, :, :end]

    def _buffers(self, layer: int, stage: Stage) -> tuple[Tensor, Tensor]:
        if not stage.is_last:
            return self.keys[layer], self.values[layer]
        if self._scratch is None:
            _, rows, heads, _, head_dim = self.keys.shape
            dtype = torch.float32 if widens(self.keys, "attention") else self.keys.dtype
            self._scratch = self.keys.new_empty(2, rows, heads, self._scratch_length, head_dim, dtype=dtype)
        return self._scratch[0], self._scratch[1]


def _lengths(stages: Sequence[Stage]) -> tuple[int, int]:
    """(positions kept per block, positions of the shared scratch)."""
    last = stages[-1]
    end = last.offset + last.length
    return (last.offset, end) if last.is_last else (end, 0)

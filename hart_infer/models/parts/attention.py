"""Self-attention of one scale over the key/value cache."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ... import ops
from .cache import Place
from .layers import Linear
from .rope import Table

MAX_LOG_SCALE = math.log(100)


class Attention(nn.Module):
    """Rotary positions, softmax scale 0.25 / sqrt(d); q, k and v in one matrix.

    The released checkpoints have no bias on k; here it is zero.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, width // num_heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)
        self.scale = 0.25 / math.sqrt(self.head_dim)

    def gains(self) -> Tensor | None:
        """Return the factor on each head's normalised queries, [H]; None where queries and keys are not normalised."""
        return None

    def forward(self, x: Tensor, table: Table, place: Place, layer: int) -> Tensor:
        """x [R, L, D] -> [R, L, D]; writes this scale's keys and values into their place in the cache."""
        rows, length, _ = x.shape
        qkv = self.qkv(x).view(rows, length, 3, self.num_heads, self.head_dim)
        q = ops.rope_cache(qkv, *table, *place.slot(layer), self.gains())
        return self.proj(place.attend(q, layer, scale=self.scale))


class NormalizedAttention(Attention):
    """q and k divided by their l2 norm, q times exp(log_scale), at most 100, per head; softmax scale 1."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__(width, num_heads)
        self.log_scale = nn.Parameter(torch.zeros(1, num_heads, 1, 1))
        self.scale = 1.0

    def gains(self) -> Tensor:
        """exp(log_scale) [H]."""
        return self.log_scale.clamp(max=MAX_LOG_SCALE).exp().flatten()

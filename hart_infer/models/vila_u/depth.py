"""The depth transformer, which draws the D codes of one position one after another (released `RQTransformer`)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops.held import without_cudnn_attention
from ..parts.cache import KVCache, Place
from ..parts.checks import require, require_positive
from ..parts.layers import Linear


@dataclass(frozen=True, kw_only=True)
class DepthConfig:
    """The depth transformer (released `rqtransformer` of the vision tower's config)."""

    num_slots: int  # D: codes of a position
    code_dim: int  # C: released input_embed_dim_1
    hidden_size: int  # of the Llama: released input_embed_dim_2
    embed_dim: int  # E
    num_layers: int  # released head.n_layer
    num_heads: int  # released head.block.n_head
    vocab_size: int  # K: codes of a codebook
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        """Raise ConfigError for heads that don't divide and sizes out of range."""
        require_positive(self, num_slots=2**10, code_dim=2**16, hidden_size=2**16, embed_dim=2**16, num_layers=2**10)
        require_positive(self, num_heads=2**12, vocab_size=2**24, norm_eps=1)
        require(
            self.embed_dim % self.num_heads == 0,
            f"embed_dim {self.embed_dim} must split into {self.num_heads} heads.",
        )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.embed_dim // self.num_heads


class DepthAttention(nn.Module):
    """Self-attention of one slot to itself and those before; q, k and v in one matrix, softmax scale 1 / sqrt(d)."""

    def __init__(self, config: DepthConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.scale = 1 / math.sqrt(self.head_dim)
        self.qkv = Linear(config.embed_dim, 3 * config.embed_dim)
        self.proj = Linear(config.embed_dim, config.embed_dim)

    def forward(self, x: Tensor, place: Place, layer: int) -> Tensor:
        """x [R, 1, E] -> [R, 1, E]; writes the slot's key and value into its place in the cache."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [R, H, 1, d] each
        own_keys, own_values = place.slot(layer)
        own_keys.copy_(k)
        own_values.copy_(v)
        return self.proj(place.attend(q, layer, scale=self.scale))


class DepthBlock(nn.Module):
    """Attention and GELU MLP, each after a layer norm (released `AttentionBlock`)."""

    def __init__(self, config: DepthConfig) -> None:
        super().__init__()
        width = config.embed_dim
        self.attn_norm = nn.LayerNorm(width, config.norm_eps)
        self.attn = DepthAttention(config)
        self.mlp_norm = nn.LayerNorm(width, config.norm_eps)
        self.fc1 = Linear(width, 4 * width)
        self.fc2 = Linear(4 * width, width)

    def forward(self, x: Tensor, place: Place, layer: int) -> Tensor:
        """x [R, 1, E] -> [R, 1, E]."""
        x = x + self.attn(self.attn_norm(x), place, layer)
        return x + self.fc2(F.gelu(self.fc1(self.mlp_norm(x))))


class DepthTransformer(nn.Module):
    """A causal transformer over the D slots of a position, run one slot at a time over a cache of the slots before."""

    def __init__(self, config: DepthConfig) -> None:
        super().__init__()
        self.config = config
        self.hidden_embed = Linear(config.hidden_size, config.embed_dim)
        self.code_embed = Linear(config.code_dim, config.embed_dim)
        self.slot_embed = nn.Parameter(torch.zeros(config.num_slots, config.embed_dim))
        self.blocks = nn.ModuleList(DepthBlock(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.embed_dim, config.norm_eps)
        self.classifier = Linear(config.embed_dim, config.vocab_size)

    @property
    def dtype(self) -> torch.dtype:
        """The activations' dtype."""
        return self.slot_embed.dtype

    def new_cache(self, rows: int) -> KVCache:
        """Allocate keys and values of all slots; every position starts again at slot 0 and overwrites them."""
        return KVCache(
            depth=self.config.num_layers,
            rows=rows,
            num_heads=self.config.num_heads,
            head_dim=self.config.head_dim,
            length=self.config.num_slots,
            dtype=self.dtype,
            device=self.slot_embed.device,
        )

    def embed_hidden(self, hidden: Tensor) -> Tensor:
        """Embed the Llama's hidden states [R, H] as the input [R, E] of slot 0."""
        return self.hidden_embed(hidden.to(self.dtype)) + self.slot_embed[0]

    def embed_codes(self, codes: Tensor, slot: int) -> Tensor:
        """Embed the sum [R, C] of the codes drawn so far as the input [R, E] of `slot`, which is 1 or more."""
        return self.code_embed(codes.to(self.dtype)) + self.slot_embed[slot]

    def step(self, x: Tensor, slot: int, cache: KVCache) -> Tensor:
        """Run one slot: input x [R, E], with the slots before in `cache` -> logits over the codebook [R, K] fp32."""
        x = x[:, None]
        place = cache.at(slot, 1, rows=slice(0, len(x)))
        with without_cudnn_attention(x.device):  # every slot has another number of keys
            for layer, block in enumerate(self.blocks):
                x = block(x, place, layer)
        return self.classifier(self.norm(x[:, 0])).float()

"""The scalable-resolution autoregressive transformer (paper section 3.2; released `HARTForT2I`).

It maps the embedded tokens of one scale, given the cached keys and values of the scales before, to hidden states; the
head maps those to logits over the codebook. The loop over the scales is `generation.py`'s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..generation.schedule import Stage
from .config import TransformerConfig
from .parts.cache import KVCache
from .parts.diffusion import ResidualDiffusion
from .parts.layers import Linear, RMSNorm, SinusoidEmbedding, SteadyLinear

MAX_LOG_SCALE = math.log(100)
Table = tuple[Tensor, Tensor]  # cos, sin: [R, 1, L, d]


@dataclass(frozen=True)
class Modulation:
    """What the adaptive norms take from the context: the same for every scale, so computed once."""

    blocks: list[Tensor | None]  # per block [R, 6, D]: gamma1, gamma2, scale1, scale2, shift1, shift2
    head: Tensor  # [R, 2, D]: scale, shift

    def rows(self, index: Tensor | slice) -> Modulation:
        """A selection of the rows."""
        return Modulation([None if block is None else block[index] for block in self.blocks], self.head[index])

    @staticmethod
    def cat(parts: list[Modulation]) -> Modulation:
        """Stack along the rows."""
        blocks = [
            None if group[0] is None else torch.cat([block for block in group if block is not None])
            for group in zip(*(part.blocks for part in parts), strict=True)
        ]
        return Modulation(blocks, torch.cat([part.head for part in parts]))


class Attention(nn.Module):
    """Self-attention with HART's rotary embedding over the key/value cache."""

    def __init__(self, config: TransformerConfig) -> None:
        """qkv in one matrix; the released checkpoint has no bias on k, here it is zero."""
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.qkv = Linear(config.embed_dim, 3 * config.embed_dim)
        self.proj = Linear(config.embed_dim, config.embed_dim)
        self.log_scale = nn.Parameter(torch.zeros(1, config.num_heads, 1, 1)) if config.attn_l2_norm else None
        self.scale = 1.0 if config.attn_l2_norm else 0.25 / math.sqrt(config.head_dim)

    def forward(self, x: Tensor, table: Table, cache: KVCache, layer: int, stage: Stage) -> Tensor:
        """x [R, L, D] -> [R, L, D]; writes this scale's keys and values into the cache."""
        rows, length, _ = x.shape
        qkv = self.qkv(x).view(rows, length, 3, self.num_heads, self.head_dim)
        gains = None if self.log_scale is None else self.log_scale.clamp(max=MAX_LOG_SCALE).exp().flatten()
        q = ops.rope_cache(qkv, *table, *cache.slot(layer, stage), gains)
        keys, values = cache.visible(layer, stage)
        return self.proj(ops.attention(q, keys, values, scale=self.scale))


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x), no biases (released `LlamaMLP`)."""

    def __init__(self, width: int, hidden: int) -> None:
        """Three matrices between `width` and `hidden`."""
        super().__init__()
        self.gate = Linear(width, hidden, bias=False)
        self.up = Linear(width, hidden, bias=False)
        self.down = Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        return self.down(ops.swiglu(self.gate(x), self.up(x)))


class GeluMLP(nn.Module):
    """fc2(gelu_tanh(fc1 x)) (released `FFN`)."""

    def __init__(self, width: int, hidden: int) -> None:
        """Two matrices between `width` and `hidden`."""
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Attention and MLP, both after the one norm that they share (released `AdaLNSelfAttn`)."""

    def __init__(self, config: TransformerConfig) -> None:
        """Adaptive norms only where the configuration has them."""
        super().__init__()
        width = config.embed_dim
        self.norm = RMSNorm(width, config.norm_eps)
        self.attn = Attention(config)
        self.mlp = (SwiGLU if config.mlp_type == "llama" else GeluMLP)(width, config.mlp_dim)
        self.modulation = None if config.disable_aln else SteadyLinear(width, 6 * width, halves=True)
        self.modulation_table = nn.Parameter(torch.zeros(6, width)) if config.shared_aln else None

    def modulate(self, pooled: Tensor) -> Tensor | None:
        """The six vectors [R, 6, D] from the pooled context [R, D]; None for a plain block."""
        if self.modulation is not None:
            six: Tensor = self.modulation(F.silu(pooled))
            return six.view(len(pooled), 6, -1)
        if self.modulation_table is not None:
            return self.modulation_table + pooled[:, None]
        return None

    def forward(self, x: Tensor, six: Tensor | None, table: Table, cache: KVCache, layer: int, stage: Stage) -> Tensor:
        """x [R, L, D] -> [R, L, D]."""
        if six is None:
            x, normed = self.norm.after(x, self.attn(self.norm(x), table, cache, layer, stage))
            return x + self.mlp(normed)
        gamma1, gamma2, scale1, scale2, shift1, shift2 = six[:, :, None].unbind(1)  # [R, 1, D] each
        x = x + gamma1 * self.attn(self.norm.modulated(x, scale1, shift1), table, cache, layer, stage)
        return x + gamma2 * self.mlp(self.norm.modulated(x, scale2, shift2))


class Head(nn.Module):
    """Logits over the codebook: adaptive norm in fp32, then a linear map (released `AdaLNBeforeHead`, `head`)."""

    def __init__(self, config: TransformerConfig, vocab_size: int) -> None:
        """`vocab_size` is the autoencoder's."""
        super().__init__()
        self.norm = RMSNorm(config.embed_dim, config.norm_eps)
        self.modulation = SteadyLinear(config.embed_dim, 2 * config.embed_dim, halves=True)
        self.linear = SteadyLinear(config.embed_dim, vocab_size)

    def modulate(self, pooled: Tensor) -> Tensor:
        """(scale, shift) [R, 2, D] from the pooled context [R, D]."""
        pair: Tensor = self.modulation(F.silu(pooled))
        return pair.view(len(pooled), 2, -1)

    def forward(self, hidden: Tensor, modulation: Tensor) -> Tensor:
        """hidden [R, L, D], modulation [R, 2, D] -> logits [R, L, V] fp32."""
        scale, shift = modulation[:, :, None].unbind(1)
        normed = self.norm.modulated(hidden.float(), scale, shift)
        return self.linear(normed.to(self.linear.weight.dtype)).float()


class Transformer(nn.Module):
    """Everything in a checkpoint's `llm/`: embeddings, blocks, head, and the residual diffusion's network."""

    def __init__(self, config: TransformerConfig, *, vocab_size: int, channels: int) -> None:
        """`vocab_size` V and latent `channels` C are the autoencoder's."""
        super().__init__()
        self.config = config
        width, scales = config.embed_dim, len(config.patch_nums)
        self.context_norm = RMSNorm(config.context_dim, config.norm_eps) if config.use_context_norm else nn.Identity()
        self.context_embed = Linear(config.context_dim, width)
        self.word_embed = Linear(channels, width)
        self.level_embed = SinusoidEmbedding(width) if config.use_timestep_embed else nn.Embedding(scales, width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head = Head(config, vocab_size)
        self.decoder_norm = RMSNorm(width, config.norm_eps)
        self.diffusion = ResidualDiffusion(
            channels=channels, condition_dim=width, width=config.diff_width, depth=config.diff_depth
        )

    @property
    def dtype(self) -> torch.dtype:
        """The activations' dtype."""
        return self.context_embed.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.context_embed.weight.device

    def embed_context(self, context: Tensor) -> Tensor:
        """Text context [R, T, context_dim] -> [R, T, D], without the level embedding."""
        return self.context_embed(self.context_norm(context.to(self.dtype)))

    def modulate(self, embedded: Tensor, mask: Tensor) -> Modulation:
        """All adaptive norms' vectors from the embedded context [R, T, D] and its mask [R, T].

        Blocks pool by a masked average or by a plain maximum, padding included; the head always by the maximum.
        """
        maximum = embedded.amax(dim=1)
        if self.config.shared_aln or self.config.sep_aln_pooling_mode == "avg":
            weights = mask.to(embedded.dtype)[..., None]
            pooled = (embedded * weights / weights.sum(dim=1, keepdim=True).clamp(min=1)).sum(dim=1)
        else:
            pooled = maximum
        return Modulation([block.modulate(pooled) for block in self._blocks()], self.head.modulate(maximum))

    def embed_level(self, index: int) -> Tensor:
        """Level embedding [D] of scale `index` (0: the context as a whole)."""
        embedding: Tensor = self.level_embed(torch.full((1,), index, device=self.device))
        return embedding[0]

    def embed_tokens(self, latent: Tensor, index: int) -> Tensor:
        """A scale's input, latent [B, C, p, p] fp32 -> [B, p * p, D]."""
        tokens = latent.flatten(2).transpose(1, 2).to(self.dtype)
        return self.word_embed(tokens) + self.embed_level(index)

    def forward(self, x: Tensor, modulation: Modulation, table: Table, cache: KVCache, stage: Stage) -> Tensor:
        """One scale through all blocks: x [R, L, D] -> hidden [R, L, D], caching keys and values."""
        for layer, (block, six) in enumerate(zip(self.blocks, modulation.blocks, strict=True)):
            x = block(x, six, table, cache, layer, stage)
        return x

    def residual_condition(self, hidden: Tensor, code_embeddings: Tensor) -> Tensor:
        """The residual diffusion's condition z [R, L, D] from the last scale's hidden states and drawn codes [B, L, C]."""
        words: Tensor = self.word_embed(code_embeddings.to(self.dtype))
        return self.decoder_norm(hidden + words.repeat(len(hidden) // len(words), 1, 1))

    def _blocks(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]

"""HART's transformer: a text condition, rotary positions, and the residual diffusion's network (released `HARTForT2I`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .next_scale import Block, Condition, Head, ModulatedBlock, NextScaleTransformer, PlainBlock
from .parts.attention import Attention, NormalizedAttention
from .parts.checks import require, require_one_of, require_positive, require_rising
from .parts.diffusion import ResidualDiffusion
from .parts.layers import MANY_ROWS, Embedding, GeluMLP, Linear, RMSNorm, SinusoidEmbedding, SwiGLU
from .parts.modulation import LinearModulation, NoModulation, TableModulation
from .parts.rope import Table, context_table, image_tables


@dataclass(frozen=True, kw_only=True)
class HartConfig:
    """The transformer and its residual diffusion (paper section 3; field names as in the released `HARTForT2IConfig`)."""

    patch_nums: tuple[int, ...]
    context_token: int
    context_dim: int
    embed_dim: int
    num_heads: int
    depth: int
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-6
    mlp_type: str = "gpt2"
    disable_aln: bool = False
    shared_aln: bool = False
    sep_aln_pooling_mode: str = "max"
    attn_l2_norm: bool = False
    use_timestep_embed: bool = False
    use_context_norm: bool = False
    diff_width: int = 1024
    diff_depth: int = 6

    def __post_init__(self) -> None:
        """Raise ConfigError for unsupported combinations and sizes out of range."""
        require_rising(self, "patch_nums")
        require_positive(self, context_token=2**16, context_dim=2**16, embed_dim=2**16, num_heads=2**12, depth=2**10)
        require_positive(self, mlp_ratio=64, norm_eps=1, diff_width=2**16, diff_depth=2**10)
        require(
            self.embed_dim % self.num_heads == 0 and self.head_dim % 4 == 0,
            f"embed_dim {self.embed_dim} must split into {self.num_heads} heads of a multiple of 4.",
        )
        require_one_of(self, mlp_type=("gpt2", "llama"), sep_aln_pooling_mode=("avg", "max"))
        require(self.disable_aln or not self.shared_aln, "shared_aln = true without disable_aln = true is not supported.")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.embed_dim // self.num_heads

    @property
    def mlp_dim(self) -> int:
        """Hidden width of a block's MLP: SwiGLU rounds up to a multiple of 256."""
        if self.mlp_type == "llama":
            return (int(self.embed_dim * self.mlp_ratio * 2 / 3) + 255) // 256 * 256
        return round(self.embed_dim * self.mlp_ratio)


def _block(config: HartConfig) -> Block:
    """One block of the kind that the configuration asks for."""
    width = config.embed_dim
    parts = (
        RMSNorm(width, config.norm_eps),
        (NormalizedAttention if config.attn_l2_norm else Attention)(width, config.num_heads),
        (SwiGLU if config.mlp_type == "llama" else GeluMLP)(width, config.mlp_dim),
    )
    if not config.disable_aln:
        return ModulatedBlock(*parts, LinearModulation(width, 6))
    if config.shared_aln:
        return ModulatedBlock(*parts, TableModulation(width))
    return PlainBlock(*parts, NoModulation())


def masked_average(embedded: Tensor, mask: Tensor) -> Tensor:
    """[R, T, D] and mask [R, T] -> the average over each row's True tokens, of which there is at least one, [R, D]."""
    weights = mask.to(embedded.dtype)[..., None]
    return (embedded * weights / weights.sum(dim=1, keepdim=True).clamp(min=1)).sum(dim=1)


def maximum(embedded: Tensor, mask: Tensor) -> Tensor:
    """[R, T, D] -> the maximum over all tokens, padding included, [R, D]."""
    return embedded.amax(dim=1)


class HartTransformer(NextScaleTransformer):
    """Everything in a checkpoint's `llm/`. `vocab_size` V and latent `channels` C are the autoencoder's."""

    def __init__(self, config: HartConfig, *, vocab_size: int, channels: int) -> None:
        width = config.embed_dim
        super().__init__(
            channels=channels,
            blocks=[_block(config) for _ in range(config.depth)],
            head=Head(RMSNorm(width, config.norm_eps), width, vocab_size),
        )
        self.config = config
        self.pool = masked_average if config.shared_aln or config.sep_aln_pooling_mode == "avg" else maximum
        self.context_norm = RMSNorm(config.context_dim, config.norm_eps) if config.use_context_norm else nn.Identity()
        self.context_embed = Linear(config.context_dim, width)
        scales = len(config.patch_nums)
        self.level_embed = SinusoidEmbedding(width) if config.use_timestep_embed else Embedding(scales, width)
        self.decoder_norm = RMSNorm(width, config.norm_eps)
        self.diffusion = ResidualDiffusion(
            channels=channels, condition_dim=width, width=config.diff_width, depth=config.diff_depth
        )

    def condition(self, context: Tensor, mask: Tensor, position_ids: Tensor) -> Condition:
        """Make a condition of encoded prompts: context [R, T, context_dim], mask [R, T] bool, position_ids [R, T] int64.

        The blocks' condition is pooled by a masked average, or by a maximum over all tokens, as configured; the head's always
        by the maximum.
        """
        copies = -(-MANY_ROWS // (context.shape[0] * context.shape[1]))  # to have MANY_ROWS; 1 unless the context is tiny
        context, mask, position_ids = (
            x.to(self.device).repeat_interleave(copies, dim=0) for x in (context, mask, position_ids)
        )
        embedded = self.embed_context(context)
        return Condition(
            inputs=embedded + self.embed_scales()[0],
            table=context_table(position_ids, self.head_dim, self.dtype),
            modulation=self.modulate(self.pool(embedded, mask), maximum(embedded, mask)),
            last_position=position_ids[:, -1],
            copies=copies,
        )

    def unconditional(self) -> Condition:
        """Make the condition of one row: context 0, position ids 0, a mask of the first token only."""
        tokens = self.config.context_token
        context = torch.zeros(1, tokens, self.config.context_dim, device=self.device)
        position_ids = torch.zeros(1, tokens, dtype=torch.int64, device=self.device)
        mask = torch.zeros_like(position_ids, dtype=torch.bool)
        mask[:, 0] = True
        return self.condition(context, mask, position_ids)

    def embed_context(self, context: Tensor) -> Tensor:
        """Embed a text context [R, T, context_dim] -> [R, T, D], without the level embedding."""
        return self.context_embed(self.context_norm(context.to(self.dtype)))

    def embed_scales(self) -> list[Tensor]:
        """Return the level embedding [1, D] of every scale; that of scale 0 is added to all context tokens."""
        levels: Tensor = self.level_embed(torch.arange(len(self.config.patch_nums), device=self.device))
        return list(levels.split(1))

    def image_tables(self, sides: Sequence[int], last_position: Tensor) -> list[Table]:
        """cos, sin [R, 1, side * side, d] of every scale."""
        return image_tables(sides, self.config.patch_nums[-1], last_position, self.head_dim, self.dtype)

    def residual_condition(self, hidden: Tensor, code_embeddings: Tensor) -> Tensor:
        """The residual diffusion's condition z [R, L, D] from the last scale's hidden states and drawn codes [B, L, C]."""
        embedded: Tensor = self.word_embed(code_embeddings.to(self.dtype))
        return self.decoder_norm(hidden + embedded.repeat(len(hidden) // len(embedded), 1, 1))

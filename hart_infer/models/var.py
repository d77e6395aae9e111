"""VAR's transformer: class condition, learned positions, norms without parameters (arXiv:2404.02905, released `VAR`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .next_scale import Condition, Head, ModulatedBlock, NextScaleTransformer
from .parts.attention import NormalizedAttention
from .parts.checks import require, require_positive, require_rising
from .parts.layers import Embedding, GeluMLP, LayerNorm
from .parts.modulation import LinearModulation, TableModulation
from .parts.rope import Table, no_rotation

CONDITION_ROWS = 2  # the released code sends at least two rows, one per guidance half, through scale 0; so rounds BLAS


@dataclass(frozen=True, kw_only=True)
class VarConfig:
    """The class-conditional transformer (arXiv:2404.02905). Released files have none; it follows from tensors."""

    patch_nums: tuple[int, ...]
    num_classes: int
    embed_dim: int
    num_heads: int
    depth: int
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-6
    shared_aln: bool = False

    def __post_init__(self) -> None:
        """Raise ConfigError for unsupported combinations and sizes out of range."""
        require_rising(self, "patch_nums")
        require_positive(self, num_classes=2**20, embed_dim=2**16, num_heads=2**12, depth=2**10, mlp_ratio=64, norm_eps=1)
        require(
            self.embed_dim % self.num_heads == 0 and self.head_dim % 4 == 0,
            f"embed_dim {self.embed_dim} must split into {self.num_heads} heads of a multiple of 4.",
        )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.embed_dim // self.num_heads


def _block(config: VarConfig) -> ModulatedBlock:
    """Return one block of the kind that the configuration asks for."""
    width = config.embed_dim
    return ModulatedBlock(
        LayerNorm(config.norm_eps),
        NormalizedAttention(width, config.num_heads),
        GeluMLP(width, round(width * config.mlp_ratio)),
        TableModulation(width) if config.shared_aln else LinearModulation(width, 6),
    )


class SharedModulation(LinearModulation):
    """The six vectors that all blocks' tables add to, computed once (released `SharedAdaLin`)."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 6)

    def forward(self, condition: Tensor) -> Tensor:
        """[R, D] -> [R, 6 * D]."""
        return super().forward(condition).flatten(1)


class VarTransformer(NextScaleTransformer):
    """Everything in a released `var_*.pth`. `vocab_size` V and latent `channels` C are the autoencoder's."""

    def __init__(self, config: VarConfig, *, vocab_size: int, channels: int) -> None:
        width = config.embed_dim
        super().__init__(
            channels=channels,
            blocks=[_block(config) for _ in range(config.depth)],
            head=Head(LayerNorm(config.norm_eps), width, vocab_size),
        )
        self.config = config
        self.shared_modulation = SharedModulation(width) if config.shared_aln else nn.Identity()
        self.class_embed = Embedding(config.num_classes + 1, width)  # the last one is "no class"
        self.start = nn.Parameter(torch.zeros(1, width))
        self.level_embed = Embedding(len(config.patch_nums), width)
        self.position_embed = Embedding(sum(side * side for side in config.patch_nums), width)

    def condition(self, classes: Tensor) -> Condition:
        """Make a condition of `classes` [R] int64 in 0..num_classes; num_classes is "no class"."""
        condition = self.class_embed(classes.to(self.device))  # [R, D]
        copies = torch.arange(len(condition), device=self.device).repeat_interleave(CONDITION_ROWS)
        return Condition(
            inputs=(condition[copies, None] + self.start) + self.embed_scales()[0],
            table=no_rotation(len(copies), 1, self.head_dim, self.dtype, self.device),
            modulation=self.modulate(self.shared_modulation(condition), condition).rows(copies),
            last_position=torch.zeros_like(copies),
            copies=CONDITION_ROWS,
        )

    def unconditional(self) -> Condition:
        """Make the condition of one row of "no class"."""
        return self.condition(torch.full((1,), self.config.num_classes))

    def embed_scales(self) -> list[Tensor]:
        """Return level and position embedding of every scale's tokens, [side * side, D] each."""
        positions = self.position_embed.weight.split([side * side for side in self.config.patch_nums])
        return [level + position for level, position in zip(self.level_embed.weight, positions, strict=True)]

    def image_tables(self, sides: Sequence[int], last_position: Tensor) -> list[Table]:
        """Return tables that rotate nothing: positions are in `embed_scales`."""
        rows = len(last_position)
        return [no_rotation(rows, side * side, self.head_dim, self.dtype, self.device) for side in sides]

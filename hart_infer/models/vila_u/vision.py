"""VILA-U's vision tower: pixels to residual codes and back (paper section 3.1; released `RQVAESiglip`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..parts.autoencoder import decoder, laid_out
from ..parts.checks import MAX_SIDE, require, require_positive
from ..parts.layers import Conv2d
from ..parts.quantizer import nearest_codes
from .siglip import SiglipConfig, SiglipEncoder

NORM_GROUPS = 32
MAX_CODES = 2**20
MAX_LEVELS = 8


@dataclass(frozen=True, kw_only=True)
class VisionConfig(SiglipConfig):
    """The tower: the encoder's sizes, and those of the quantizer and the decoder by their released names.

    `n_embed` counts codes: one number for all depths or one for each. `decoder_latent_shape` is the height and width that
    features are resized to before they are decoded, or empty. `resolution` only says which levels have attention.
    """

    n_embed: tuple[int, ...]
    depth: int  # codes of a position
    shared_codebook: bool = True
    decoder_latent_shape: tuple[int, ...] = ()
    z_channels: int = 256
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2  # of a level; the decoder has one more
    attn_resolutions: tuple[int, ...] = (16,)
    resolution: int = 256

    def __post_init__(self) -> None:
        """Refuse sizes that don't fit each other, or that nothing could hold."""
        super().__post_init__()
        require_positive(self, depth=64, z_channels=2**12, ch=2**13, num_res_blocks=64, resolution=2**16)
        self._require_range("n_embed", MAX_CODES)
        counts = {1} if self.shared_codebook else {1, self.depth}
        kind = "one entry, as shared_codebook is set" if self.shared_codebook else f"one entry or depth {self.depth}"
        require(len(self.n_embed) in counts, f"n_embed must have {kind}, not {len(self.n_embed)}.")
        require(len(self.decoder_latent_shape) in (0, 2), "decoder_latent_shape must be a height and a width, or empty.")
        self._require_range("decoder_latent_shape", MAX_SIDE)
        require(0 < len(self.ch_mult) <= MAX_LEVELS, f"ch_mult must have 1 to {MAX_LEVELS} entries, not {len(self.ch_mult)}.")
        self._require_range("ch_mult", 64)
        require(self.ch % NORM_GROUPS == 0, f"ch must be a multiple of {NORM_GROUPS}, not {self.ch}.")
        few = len(self.attn_resolutions) <= 64
        require(few, f"attn_resolutions must have at most 64 entries, not {len(self.attn_resolutions)}.")
        self._require_range("attn_resolutions", 2**16)
        scale = self.upsample
        require(self.resolution % scale == 0, f"resolution must be a multiple of {scale}, not {self.resolution}.")

    def _require_range(self, name: str, limit: int) -> None:
        """Require all entries of a field to be positive and at most `limit`."""
        values: Sequence[int] = getattr(self, name)
        fits = all(0 < value <= limit for value in values)
        require(fits, f"{name} must have entries from 1 to {limit:,}, not {list(values[:9])}.")

    @property
    def code_shape(self) -> tuple[int, int, int]:
        """Rows, columns and depth of a picture's codes."""
        return self.grid, self.grid, self.depth

    @property
    def vocab_sizes(self) -> tuple[int, ...]:
        """The number of codes at each depth."""
        return self.n_embed * self.depth if len(self.n_embed) == 1 else self.n_embed

    @property
    def upsample(self) -> int:
        """Pixels that the decoder makes of a latent cell, along a side."""
        return int(2 ** (len(self.ch_mult) - 1))

    @property
    def picture_shape(self) -> tuple[int, int]:
        """Height and width of decoded pictures."""
        height, width = self.decoder_latent_shape or (self.grid, self.grid)
        return height * self.upsample, width * self.upsample

    @property
    def attention_levels(self) -> tuple[int, ...]:
        """Levels of the decoder with attention: by the side that `resolution` would give them, not by their real one."""
        return tuple(i for i in range(len(self.ch_mult)) if self.resolution // 2**i in self.attn_resolutions)


class ResidualQuantizer(nn.Module):
    """Codebooks [K + 1, C], one or one per depth; row K is the released padding, never a code.

    Computes in fp32 in every dtype; the released code in bf16 rounds residuals and sums to bf16 after each depth.
    """

    def __init__(self, vocab_sizes: Sequence[int], channels: int, *, shared: bool) -> None:
        super().__init__()
        self.vocab_sizes = tuple(vocab_sizes)
        stored = self.vocab_sizes[:1] if shared else self.vocab_sizes
        self.codebooks = nn.ModuleList(nn.Embedding(size + 1, channels) for size in stored)

    def codebook(self, depth: int) -> Tensor:
        """Return the codes' rows at a depth, [K, C] in the weights' dtype."""
        stored = self.codebooks[depth if len(self.codebooks) > 1 else 0]
        return stored.get_parameter("weight")[: self.vocab_sizes[depth]]

    def rows(self, codes: Tensor, depth: int) -> Tensor:
        """Return the rows [..., C] fp32 of `codes` [...] at one depth."""
        return F.embedding(codes, self.codebook(depth)).float()

    def rows_of_depths(self, codes: Tensor) -> Iterator[Tensor]:
        """Yield the rows [..., C] fp32 of `codes` [..., d], depth by depth; d may be less than the quantizer's depth."""
        return (self.rows(codes[..., depth], depth) for depth in range(codes.shape[-1]))

    def encode(self, hidden: Tensor) -> Tensor:
        """Return the codes [B, h, w, D] int64 of `hidden` [B, h, w, C]: at each depth the nearest row to what is left."""
        rest = hidden.float()
        codes = []
        for depth in range(len(self.vocab_sizes)):
            codebook = self.codebook(depth).float()
            # Picture by picture: distances of a batch take memory, and their rounding may depend on its size.
            nearest = torch.cat([nearest_codes(each.flatten(0, 1), codebook) for each in rest]).view(rest.shape[:-1])
            codes.append(nearest)
            rest = rest - self.rows(nearest, depth)
        return torch.stack(codes, dim=-1)


class VisionTower(nn.Module):
    """Pictures to codes and features, and features to pictures: all of a checkpoint's `vision_tower/` that inference reads.

    The depth transformer, which the same released file holds, is a module of its own.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = SiglipEncoder(config)
        self.quantizer = ResidualQuantizer(config.vocab_sizes, config.hidden_size, shared=config.shared_codebook)
        self.post_quant_conv = Conv2d(config.hidden_size, config.z_channels, 1)
        self.decoder = decoder(
            z_channels=config.z_channels,
            out_channels=3,
            ch=config.ch,
            ch_mult=config.ch_mult,
            blocks_per_level=config.num_res_blocks + 1,
            attention_levels=config.attention_levels,
            groups=NORM_GROUPS,
        )

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        return self.post_quant_conv.weight.dtype

    def hidden(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, size, size] in -1..1 -> what is quantised, [B, g, g, C] in the weights' dtype."""
        grid = self.config.grid
        return self.encoder(pixels).unflatten(1, (grid, grid))

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [B, 3, size, size] in -1..1 -> codes [B, g, g, D] int64 and their features [B, g, g, C]."""
        codes = self.quantizer.encode(self.hidden(pixels))
        return codes, self.embed(codes)

    def embed(self, codes: Tensor) -> Tensor:
        """Codes [..., D] -> features [..., C]: the sum of their rows, rounded once to the weights' dtype."""
        return reduce(torch.add, self.quantizer.rows_of_depths(codes)).to(self.dtype)

    def decode(self, features: Tensor) -> Tensor:
        """Features [B, g, g, C] -> pixels [B, 3, height, width] fp32, nominally in -1..1 but not clamped."""
        latent = laid_out(features.permute(0, 3, 1, 2), self.dtype)
        if self.config.decoder_latent_shape:
            latent = F.interpolate(latent, size=self.config.decoder_latent_shape, mode="bilinear", align_corners=False)
        return self.decoder(self.post_quant_conv(latent)).float()

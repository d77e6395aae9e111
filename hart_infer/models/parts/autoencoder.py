"""The hybrid autoencoder: VQGAN encoder and decoder around the quantizer (paper section 3.1; released `HARTAutoEncoder`)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import ops
from .checks import require, require_one_of, require_positive, require_rising
from .layers import Conv2d
from .quantizer import Quantizer, Tokens
from .tiling import tiled

NORM_EPS = 1e-6
BLOCKS_PER_LEVEL = 2  # residual blocks of an encoder level; the decoder has one more
Mode = Literal["discrete", "hybrid"]


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """The hybrid tokenizer: VQGAN encoder and decoder, multi-scale quantizer (paper section 3.1; `HARTAutoEncoderConfig`)."""

    v_patch_nums: tuple[int, ...]
    vocab_size: int = 4096
    z_channels: int = 32
    ch: int = 160
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    share_quant_resi: int = 4
    quantizer_type: str = "var"
    norm_groups: int = 32  # of the group norms; the released code has no such key, and 32

    def __post_init__(self) -> None:
        """Refuse values that no recorded data covers, or that nothing could hold."""
        require_rising(self, "v_patch_nums")
        require_positive(self, vocab_size=2**20, z_channels=2**12, ch=2**13, norm_groups=2**13)
        fits = 0 < len(self.ch_mult) <= 8 and min(self.ch_mult) > 0 and max(self.ch_mult) <= 64
        require(fits, f"ch_mult must have positive entries, at most 8 of at most 64, not {list(self.ch_mult)[:9]}.")
        require_one_of(self, share_quant_resi=(0, 1, 4), quantizer_type=("var", "var_hybrid"))
        require(self.ch % self.norm_groups == 0, f"ch must be a multiple of norm_groups {self.norm_groups}, not {self.ch}.")

    @property
    def downsample(self) -> int:
        """Pixels per latent cell along a side."""
        return int(2 ** (len(self.ch_mult) - 1))


class GroupNorm(nn.GroupNorm):
    """A group norm, and SiLU behind it unless told otherwise, through `ops.group_norm_silu`."""

    def __init__(self, channels: int, groups: int, *, silu: bool = True) -> None:
        """`channels` in `groups` groups."""
        super().__init__(groups, channels, eps=NORM_EPS)
        self.silu = silu

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, h, w] -> the same shape."""
        return ops.group_norm_silu(x, self.weight, self.bias, self.num_groups, self.eps, silu=self.silu)


class ResnetBlock(nn.Module):
    """Two normalised 3x3 convolutions and a shortcut."""

    def __init__(self, channels: int, out_channels: int, groups: int) -> None:
        """The shortcut is a 1x1 convolution where the channels change."""
        super().__init__()
        self.norm1 = GroupNorm(channels, groups)
        self.conv1 = Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(out_channels, groups)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Identity() if channels == out_channels else Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, h, w] -> [B, out_channels, h, w]."""
        hidden = self.conv1(self.norm1(x))
        hidden = self.conv2(self.norm2(hidden))
        return self.shortcut(x) + hidden


class AttentionBlock(nn.Module):
    """Single-head attention over the pixels, scaled by channels^-1/2."""

    def __init__(self, channels: int, groups: int) -> None:
        """1x1 convolutions in and out."""
        super().__init__()
        self.norm = GroupNorm(channels, groups, silu=False)
        self.qkv = Conv2d(channels, 3 * channels, 1)
        self.proj = Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C, h, w]."""
        batch, channels, height, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, 3, 1, channels, height * width)
        q, k, v = qkv.transpose(3, 4).contiguous().unbind(1)  # [B, 1, hw, C]
        attended = ops.attention.reference(q, k, v, scale=channels**-0.5)  # [B, hw, C]; one head, too wide for the kernels
        return x + self.proj(attended.transpose(1, 2).reshape(batch, channels, height, width))


class Downsample(nn.Module):
    """Halve the sides: pad right and bottom by one, then a stride-2 convolution."""

    def __init__(self, channels: int) -> None:
        """Channels are kept."""
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C, h/2, w/2]."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the sides: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        """Channels are kept."""
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C, 2h, 2w]."""
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


def _middle(channels: int, groups: int) -> dict[str, nn.Module]:
    return {
        "mid_block_1": ResnetBlock(channels, channels, groups),
        "mid_attn_1": AttentionBlock(channels, groups),
        "mid_block_2": ResnetBlock(channels, channels, groups),
    }


def _out(channels: int, out_channels: int, groups: int) -> dict[str, nn.Module]:
    return {"norm_out": GroupNorm(channels, groups), "conv_out": Conv2d(channels, out_channels, 3, padding=1)}


def _encoder(config: AutoencoderConfig) -> nn.Sequential:
    """Image [B, 3, h, w] -> latent [B, C, h/f, w/f], as one sequence of layers with the released names."""
    channels, groups = config.ch, config.norm_groups
    layers: dict[str, nn.Module] = {"conv_in": Conv2d(3, channels, 3, padding=1)}
    lowest = len(config.ch_mult) - 1
    for level, multiplier in enumerate(config.ch_mult):
        for i in range(BLOCKS_PER_LEVEL):
            layers[f"down_{level}_block_{i}"] = ResnetBlock(channels, config.ch * multiplier, groups)
            channels = config.ch * multiplier
            if level == lowest:
                layers[f"down_{level}_attn_{i}"] = AttentionBlock(channels, groups)
        if level < lowest:
            layers[f"down_{level}_downsample"] = Downsample(channels)
    return nn.Sequential(OrderedDict(layers | _middle(channels, groups) | _out(channels, config.z_channels, groups)))


def decoder(
    *,
    z_channels: int,
    out_channels: int,
    ch: int,
    ch_mult: Sequence[int],
    blocks_per_level: int,
    attention_levels: Collection[int],
    groups: int,
) -> nn.Sequential:
    """Return a decoder of latents [B, z_channels, h, w] to [B, out_channels, f * h, f * w], f = 2^(levels - 1).

    It is one sequence of layers with the released names. Level i is ch * ch_mult[i] wide; those in `attention_levels` have an
    attention behind each residual block.
    """
    lowest = len(ch_mult) - 1
    channels = ch * ch_mult[lowest]
    layers: dict[str, nn.Module] = {"conv_in": Conv2d(z_channels, channels, 3, padding=1)}
    layers |= _middle(channels, groups)
    for level in range(lowest, -1, -1):
        for i in range(blocks_per_level):
            layers[f"up_{level}_block_{i}"] = ResnetBlock(channels, ch * ch_mult[level], groups)
            channels = ch * ch_mult[level]
            if level in attention_levels:
                layers[f"up_{level}_attn_{i}"] = AttentionBlock(channels, groups)
        if level > 0:
            layers[f"up_{level}_upsample"] = Upsample(channels)
    return nn.Sequential(OrderedDict(layers | _out(channels, out_channels, groups)))


def laid_out(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast x [B, C, h, w] to the weights' dtype; in half precision to channels last, which is faster and rounds differently."""
    suits = dtype != torch.float32 and x.device.type in ("cpu", "cuda")
    return x.to(dtype, memory_format=torch.channels_last if suits else torch.contiguous_format)


class Autoencoder(nn.Module):
    """Images to hybrid tokens and back. Images are in -1..1 here; the quantizer stays in fp32 in every dtype.

    Holds all of a released checkpoint's `tokenizer/` but the discriminator.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = _encoder(config)
        self.quant_conv = Conv2d(config.z_channels, config.z_channels, 3, padding=1)
        self.quantizer = Quantizer(
            vocab_size=config.vocab_size,
            channels=config.z_channels,
            patch_nums=config.v_patch_nums,
            share_quant_resi=config.share_quant_resi,
        )
        self.post_quant_conv = Conv2d(config.z_channels, config.z_channels, 3, padding=1)
        self.decoder = decoder(
            z_channels=config.z_channels,
            out_channels=3,
            ch=config.ch,
            ch_mult=config.ch_mult,
            blocks_per_level=BLOCKS_PER_LEVEL + 1,
            attention_levels=(len(config.ch_mult) - 1,),
            groups=config.norm_groups,
        )

    def encode_latent(self, image: Tensor) -> Tensor:
        """Image [B, 3, h, w] in -1..1 -> continuous latent [B, C, h/f, w/f] fp32."""
        return self.quant_conv(self.encoder(laid_out(image, self.quant_conv.weight.dtype))).float()

    def encode(self, image: Tensor) -> Tokens:
        """Hybrid tokenization of an image [B, 3, size, size] in -1..1: codes per scale and the continuous residual."""
        return self.quantizer.encode(self.encode_latent(image))

    def decode(self, latent: Tensor, *, tile: int | None = None) -> Tensor:
        """Latent [B, C, h/f, w/f] -> image [B, 3, h, w] fp32, clamped to -1..1.

        `tile`: run all levels but the lowest in tiles of `tile` latent cells (approximate: their group norms see a tile).
        """
        hidden = self.post_quant_conv(laid_out(latent, self.post_quant_conv.weight.dtype))
        if tile is None or tile >= max(latent.shape[-2:]):
            image = self.decoder(hidden)
        else:
            lowest = len(self.config.ch_mult) - 1
            split = 1 + max(i for i, (name, _) in enumerate(self.decoder.named_children()) if name.startswith(f"up_{lowest}_"))
            hidden = self.decoder[:split](hidden)
            image = tiled(self.decoder[split:], hidden, tile * (hidden.shape[-1] // latent.shape[-1]))
        return image.float().clamp_(-1, 1)

    def to_device(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        """Move and cast in place; the quantizer is moved only."""
        for child in self.children():
            child.to(device=device, dtype=None if isinstance(child, Quantizer) else dtype)

    def reconstruct(self, image: Tensor, mode: Mode = "hybrid") -> Tensor:
        """Image -> tokens -> image, [B, 3, size, size] in -1..1; `mode` as in `latent`."""
        return self.decode(self.latent(image, mode))

    def latent(self, image: Tensor, mode: Mode = "hybrid") -> Tensor:
        """Return the latent that decodes to the reconstruction of an image [B, 3, size, size] in -1..1: [B, C, P, P] fp32.

        "hybrid" is the continuous latent, "discrete" the sum of the codes alone (paper figure 4).
        """
        latent = self.encode_latent(image)
        if mode == "discrete":
            latent = self.quantizer.discrete(self.quantizer.encode(latent).embeddings)
        return latent

"""Group norm and SiLU of images [B, C, h, w], channels last or first, in three launches.

The first computes the statistics of slabs (runs of pixels) per channel, the second merges them per group, the third applies
them: x is read twice and written once. Sums of squares are taken about running means and merged by the formula of Chan, Golub
and LeVeque, so that a mean far from zero costs no precision.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import refusal as refusal
from .launch import Config, multiprocessors

CHANNELS_LAST = Config(64, 64, warps=8)  # pixels x channels of a tile; channels are contiguous
CHANNELS_FIRST = Config(512, 8, warps=8)  # pixels are contiguous
MERGED = 4096  # the most slabs times channels of a group that one program of merge_kernel holds


@triton.jit
def slab_kernel(
    x, means, squares,
    x_image, x_pixel, x_channel, pixels, channels, per_slab,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Compute each channel's mean and sum of squares about it over one slab of `per_slab` pixels, reading x once.

    means, squares [B, slabs, C] fp32; grid (slabs, blocks of channels, B).
    """
    image = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    lane = tl.arange(0, PIXELS)
    x += image * x_image + channel[None, :].to(tl.int64) * x_channel
    mean = tl.zeros([PIXELS, CHANNELS], tl.float32)
    square = tl.zeros([PIXELS, CHANNELS], tl.float32)
    first = tl.program_id(0) * per_slab
    last = tl.minimum(first + per_slab, pixels)
    seen = 0.0
    for start in range(first, last, PIXELS):
        pixel = start + lane
        valid = (pixel[:, None] < last) & (channel[None, :] < channels)
        value = tl.load(x + pixel[:, None].to(tl.int64) * x_pixel, mask=valid, other=0.0).to(tl.float32)
        seen += 1.0
        delta = tl.where(valid, value - mean, 0.0)
        mean += delta * (1.0 / seen)
        square += delta * (value - mean)
    count = tl.maximum(last - first - lane + PIXELS - 1, 0) // PIXELS  # of pixels that each lane has seen
    count = count.to(tl.float32)[:, None]
    merged = tl.sum(mean * count, 0) / (last - first).to(tl.float32)
    distance = mean - merged[None, :]
    place = (image * tl.num_programs(0) + tl.program_id(0)) * channels + channel
    tl.store(means + place, merged, mask=channel < channels)
    tl.store(squares + place, tl.sum(square + count * distance * distance, 0), mask=channel < channels)


@triton.jit(do_not_specialize=["slabs"])
def merge_kernel(
    means, squares, group_means, group_scales,
    pixels, channels, per_slab, slabs, eps,
    PER_GROUP: tl.constexpr, WIDTH: tl.constexpr, SLABS: tl.constexpr,
):  # fmt: skip
    """Compute the mean and 1 / standard deviation of one group of one image from its channels' slabs; grid (groups, B).

    means, squares [B, slabs, C]; group_means, group_scales [B, groups]; all fp32. Adds up in fp64, as there is little to add.
    PER_GROUP: channels of a group. WIDTH and SLABS: the next powers of two of PER_GROUP and of `slabs`.
    """
    image = tl.program_id(1).to(tl.int64)
    slab = tl.arange(0, SLABS)[:, None]
    lane = tl.arange(0, WIDTH)[None, :]
    valid = (slab < slabs) & (lane < PER_GROUP)
    place = (image * slabs + slab) * channels + tl.program_id(0) * PER_GROUP + lane
    count = tl.where(valid, tl.minimum(per_slab, pixels - slab * per_slab), 0).to(tl.float64)
    mean = tl.load(means + place, mask=valid, other=0.0).to(tl.float64)
    square = tl.load(squares + place, mask=valid, other=0.0).to(tl.float64)
    total = tl.full([], PER_GROUP, tl.float64) * pixels  # `pixels.to()` fails for 1, which Triton compiles in as a Python int
    merged = tl.sum(tl.sum(mean * count, 1), 0) / total
    distance = mean - merged
    variance = tl.sum(tl.sum(square + count * distance * distance, 1), 0) / total
    place = image * tl.num_programs(0) + tl.program_id(0)
    tl.store(group_means + place, merged.to(tl.float32))
    tl.store(group_scales + place, (1.0 / tl.sqrt(variance + eps)).to(tl.float32))


@triton.jit(do_not_specialize=["groups"])
def apply_kernel(
    x, out, weight, bias, group_means, group_scales,
    x_image, x_pixel, x_channel, pixels, channels, groups,
    PER_GROUP: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Normalise one tile of PIXELS x CHANNELS and, with SILU, apply SiLU to it; out has the strides of x.

    group_means, group_scales [B, groups] fp32; grid (blocks of pixels, blocks of channels, B).
    """
    image = tl.program_id(2).to(tl.int64)
    pixel = (tl.program_id(0) * PIXELS + tl.arange(0, PIXELS))[:, None]
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < channels
    valid = (pixel < pixels) & known[None, :]
    place = image * x_image + pixel.to(tl.int64) * x_pixel + channel[None, :].to(tl.int64) * x_channel
    group = image * groups + channel // PER_GROUP
    mean = tl.load(group_means + group, mask=known, other=0.0)
    scale = tl.load(group_scales + group, mask=known, other=0.0)
    scale *= tl.load(weight + channel, mask=known, other=0.0).to(tl.float32)
    shift = tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)
    value = tl.load(x + place, mask=valid, other=0.0).to(tl.float32)
    dtype = out.dtype.element_ty
    value = ((value - mean[None, :]) * scale[None, :] + shift[None, :]).to(dtype)
    if SILU:
        wide = value.to(tl.float32)
        value = tl.div_rn(wide, 1.0 + tl.exp(-wide)).to(dtype)
    tl.store(out + place, value, mask=valid)


def slabs_for(pixels: int, tile: int, per_group: int, programs: int, processors: int) -> tuple[int, int]:
    """Return the number of slabs per image and the pixels of a slab, a multiple of `tile`.

    Enough slabs for four programs per multiprocessor, but no more than merge_kernel takes. programs: B * blocks of channels.
    """
    wanted = triton.cdiv(4 * processors, programs)
    at_most = max(1, MERGED // triton.next_power_of_2(per_group))
    slabs = max(1, min(wanted, triton.cdiv(pixels, tile), at_most))
    per_slab = triton.cdiv(triton.cdiv(pixels, slabs), tile) * tile
    return triton.cdiv(pixels, per_slab), per_slab


def _laid_out(x: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Return x without gaps between its elements, an empty result of the same strides, and whether the channels come last."""
    if not x.is_contiguous() and x.stride(1) == 1:
        batch, channels, height, width = x.shape
        out = x.new_empty(batch, height, width, channels).permute(0, 3, 1, 2)
        return x.contiguous(memory_format=torch.channels_last), out, True
    return x.contiguous(), x.new_empty(x.shape), False


def _check(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> None:
    """Raise ValueError for shapes or devices that don't fit each other."""
    if x.dim() != 4 or groups < 1 or not x.shape[1] or x.shape[1] % groups:
        raise ValueError(f"group_norm_silu: x must be [B, C, h, w] with C a multiple of {groups} groups, not {list(x.shape)}.")
    if weight.shape != (x.shape[1],) or bias.shape != weight.shape:
        shapes = f"{list(weight.shape)} and {list(bias.shape)}"
        raise ValueError(f"group_norm_silu: weight and bias must be [{x.shape[1]}], not {shapes}.")
    if not x.device == weight.device == bias.device:
        raise ValueError(f"group_norm_silu: x, weight and bias are on {x.device}, {weight.device} and {bias.device}.")


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, *, silu: bool = True) -> Tensor:
    """Compute what the reference in `hart_infer/ops/group_norm_silu.py` computes; the result is channels last if x is."""
    _check(x, weight, bias, groups)
    batch, channels, height, width = x.shape
    pixels, per_group = height * width, channels // groups
    x, out, last = _laid_out(x)
    if not out.numel():
        return out
    tiles = CHANNELS_LAST if last else CHANNELS_FIRST
    strides = (channels * pixels, channels, 1) if last else (channels * pixels, 1, pixels)
    block = min(tiles.columns, triton.next_power_of_2(channels))
    blocks = triton.cdiv(channels, block)
    slabs, per_slab = slabs_for(pixels, tiles.rows, per_group, blocks * batch, multiprocessors(x.device))
    means, squares = x.new_empty(2, batch, slabs, channels, dtype=torch.float32)
    group_means, group_scales = x.new_empty(2, batch, groups, dtype=torch.float32)
    slab_kernel[(slabs, blocks, batch)](
        x, means, squares, *strides, pixels, channels, per_slab, PIXELS=tiles.rows, CHANNELS=block, num_warps=tiles.warps
    )  # fmt: skip
    merge_kernel[(groups, batch)](
        means, squares, group_means, group_scales, pixels, channels, per_slab, slabs, eps,
        PER_GROUP=per_group, WIDTH=triton.next_power_of_2(per_group), SLABS=triton.next_power_of_2(slabs), num_warps=8,
    )  # fmt: skip
    apply_kernel[(triton.cdiv(pixels, tiles.rows), blocks, batch)](
        x, out, weight.contiguous(), bias.contiguous(), group_means, group_scales, *strides, pixels, channels, groups,
        PER_GROUP=per_group, PIXELS=tiles.rows, CHANNELS=block, SILU=silu, num_warps=tiles.warps,
    )  # fmt: skip
    return out

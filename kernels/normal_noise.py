"""Standard normal noise by Philox and Box-Muller, in one launch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import refusal as refusal_of_dtype

BLOCK = 1024


def refusal(where: Any) -> str | None:
    """As the package's; the seeds' int64 is no obstacle."""
    return refusal_of_dtype(replace(where, dtype=torch.float32))


@triton.jit
def _uniform(word):
    """Turn 32 random bits into a number between 0 and 1, as `hart_infer/ops/philox.py` does."""
    return ((word >> 9) * 2 + 1).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08  # 2^-24


@triton.jit(do_not_specialize=["step", "tokens"])
def normal_noise_kernel(seeds, out, step, tokens, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """Draw BLOCK elements of one image of out [B, tokens, CHANNELS], contiguous; grid (blocks, B)."""
    image = tl.program_id(1).to(tl.int64)
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token, channel = element // CHANNELS, element % CHANNELS
    third = tl.zeros([BLOCK], tl.uint32) + step.to(tl.uint32)
    last = tl.full([BLOCK], 1, tl.uint32)
    first, second, _, _ = tl.philox(tl.load(seeds + image), channel.to(tl.uint32), token.to(tl.uint32), third, last)
    noise = tl.sqrt(-2.0 * tl.log(_uniform(first))) * tl.cos(6.283185307179586 * _uniform(second))
    tl.store(out + image * tokens * CHANNELS + element, noise, mask=token < tokens)


def normal_noise(seeds: Tensor, *, step: int, tokens: int, channels: int) -> Tensor:
    """Compute what the reference in `hart_infer/ops/normal_noise.py` computes."""
    if seeds.dtype != torch.int64 or seeds.dim() != 1:
        raise ValueError(f"normal_noise: seeds must be int64, one for each image, not {list(seeds.shape)} {seeds.dtype}.")
    out = seeds.new_empty(len(seeds), tokens, channels, dtype=torch.float32)
    if out.numel():
        normal_noise_kernel[(triton.cdiv(tokens * channels, BLOCK), len(seeds))](
            seeds.contiguous(), out, step, tokens, CHANNELS=channels, BLOCK=BLOCK, num_warps=4
        )
    return out

"""Draw standard normal noise of the residual diffusion with Philox random numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from .philox import normal, philox
from .registry import Backend, op

STREAM = 1  # the counter's last word, 0 in guided_sample: no word is used twice


@op(triton=Backend("..kernels.normal_noise:normal_noise"))
def normal_noise(seeds: Tensor, *, step: int, tokens: int, channels: int) -> Tensor:
    """Return noise [B, tokens, channels] fp32 that depends on an image's seed, on token, channel and `step` alone.

    By Box-Muller from the first two words of Philox with key `seeds` [B] int64 and counter (channel, token, step, STREAM).
    """
    channel = torch.arange(channels, device=seeds.device)
    token = torch.arange(tokens, device=seeds.device)[:, None]
    last = torch.full_like(channel, STREAM)
    first, second, _, _ = philox((channel, token, torch.full_like(channel, step), last), seeds[:, None, None])
    return normal(first, second)

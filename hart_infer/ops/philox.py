"""Compute random numbers by Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).

A number depends only on its key and counter: not on a batch, a device, a version of PyTorch, or what was drawn before.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return four 32-bit words for each `counter` of four 32-bit words and 64-bit `key`; all int64, shapes broadcast."""
    a, b, c, d = counter
    low_key, high_key = key & WORD, (key >> 32) & WORD
    for _ in range(ROUNDS):
        first, second = a * MULTIPLIERS[0], c * MULTIPLIERS[1]  # wraps in int64; the bits are right
        a, b = (second >> 32) & WORD ^ b ^ low_key, second & WORD
        c, d = (first >> 32) & WORD ^ d ^ high_key, first & WORD
        low_key, high_key = (low_key + KEY_STEPS[0]) & WORD, (high_key + KEY_STEPS[1]) & WORD
    return a, b, c, d


def uniform(words: Tensor) -> Tensor:
    """Return u = (k + 0.5) / 2^23 fp32, where k is the word's top 23 bits: u is never 0 or 1."""
    return ((words >> 9) * 2 + 1).to(torch.float32) * 2.0**-24


def normal(first: Tensor, second: Tensor) -> Tensor:
    """Return standard normal noise fp32 by Box-Muller: sqrt(-2 log u) cos(2 pi v) of two words' `uniform`."""
    return (-2 * uniform(first).log()).sqrt() * (2 * math.pi * uniform(second)).cos()


def gumbel(words: Tensor) -> Tensor:
    """Return -log(-log u), fp32 Gumbel noise of a word's `uniform`."""
    return uniform(words).log_().neg_().log_().neg_()

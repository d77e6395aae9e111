"""Random numbers as a function: Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).

A number depends on its key and its place alone: not on a batch, a device, a version of PyTorch, or what was drawn before.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random words of 32 bits for every counter of four, under a key of 64; all int64, of shapes that broadcast."""
    a, b, c, d = counter
    low_key, high_key = key & WORD, (key >> 32) & WORD
    for _ in range(ROUNDS):
        first, second = a * MULTIPLIERS[0], c * MULTIPLIERS[1]  # may wrap around, and keeps its 64 bits
        a, b = (second >> 32) & WORD ^ b ^ low_key, second & WORD
        c, d = (first >> 32) & WORD ^ d ^ high_key, first & WORD
        low_key, high_key = (low_key + KEY_STEPS[0]) & WORD, (high_key + KEY_STEPS[1]) & WORD
    return a, b, c, d


def gumbel(words: Tensor) -> Tensor:
    """Standard Gumbel noise, fp32: -log(-log u) of the middle u of one of 2^23 equal parts of 0..1, so that it is finite."""
    uniform = ((words >> 9) * 2 + 1).to(torch.float32) * 2.0**-24
    return uniform.log_().neg_().log_().neg_()

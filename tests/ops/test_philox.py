"""Philox 4x32-10, in PyTorch and as Triton has it, against Random123's known answers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hart_infer.ops.philox import gumbel, philox

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

KNOWN = [  # counter, key, words
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@triton.jit
def words_kernel(counter, seed, out):
    """The four words that a kernel sees."""
    a, b = tl.load(counter).to(tl.uint32), tl.load(counter + 1).to(tl.uint32)
    c, d = tl.load(counter + 2).to(tl.uint32), tl.load(counter + 3).to(tl.uint32)
    a, b, c, d = tl.philox(tl.load(seed), a, b, c, d)
    tl.store(out, a.to(tl.int64))
    tl.store(out + 1, b.to(tl.int64))
    tl.store(out + 2, c.to(tl.int64))
    tl.store(out + 3, d.to(tl.int64))


def bits(key: tuple[int, int]) -> Tensor:
    """A key as int64 holds it."""
    value = key[0] | key[1] << 32
    return torch.tensor([value - 2**64 if value >= 2**63 else value])


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_gives_the_known_answers(counter, key, words):
    found = philox(tuple(torch.tensor([c]) for c in counter), bits(key))
    assert tuple(word.item() for word in found) == words
    found = torch.zeros(4, dtype=torch.int64)
    words_kernel[(1,)](torch.tensor(counter), bits(key), found)
    assert tuple(found.tolist()) == words


def test_noise_is_finite_for_every_word():
    assert gumbel(torch.tensor([0, 511, 512, 2**31, 2**32 - 512, 2**32 - 1])).isfinite().all()

"""Draw exponential random numbers by the CPU's kernel: what the reference in `hart_infer/ops/exponential.py` draws."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .library import call, load

STATE = 5056  # bytes of a generator's state
WORDS = 624  # of 32 bits, in it


class Exponential(ctypes.Structure):
    """`struct Exponential` of csrc/cpu/kernels.h."""

    _fields_ = [("state", ctypes.c_void_p), ("out", ctypes.c_void_p), ("count", ctypes.c_int64)]


def refusal(where: Any) -> str | None:
    """Return why the kernel can't run at a `Where` (device, dtype), or None: any x86-64 CPU runs it."""
    if where.device != "cpu":
        return "it is for CPUs"
    loaded = load()
    if isinstance(loaded, str):
        return loaded
    return None if _knows_the_state() else "this PyTorch keeps its generators' states otherwise"


@lru_cache(maxsize=1)
def _knows_the_state() -> bool:
    """Draw some numbers by the kernel and by PyTorch, and return whether they and the generators' states are the same."""
    generator = torch.Generator().manual_seed(1)
    torch.randint(9, (1,), device="cpu", generator=generator)  # an odd number of words
    state = generator.get_state()
    if len(state) != STATE:
        return False
    try:
        drawn = exponential(state, 999)
    except RuntimeError:
        return False
    uniform = torch.rand(999, dtype=torch.float64, device="cpu", generator=generator)
    return torch.equal(state, generator.get_state()) and torch.allclose(drawn.double(), -torch.log1p(-uniform), rtol=1e-6)


def exponential(state: Tensor, count: int) -> Tensor:
    """Compute what the reference in `hart_infer/ops/exponential.py` computes, but for rounding: log to 2 ulp of fp64."""
    if state.dtype != torch.uint8 or state.shape != (STATE,) or state.device.type != "cpu" or not state.is_contiguous():
        given = f"{state.dtype} {list(state.shape)} on {state.device}"
        raise ValueError(f"exponential: the state must be {STATE} contiguous bytes on the CPU, not {given}.")
    left, following = state[8:12].view(torch.int32).item(), state[16:24].view(torch.int64).item()
    if not (1 <= left <= WORDS and 0 <= following <= WORDS):
        raise RuntimeError("exponential: the state is no Mersenne Twister's.")
    drawn = torch.empty(count, dtype=torch.float32, device="cpu")
    if count:
        call("exponential", Exponential(state.data_ptr(), drawn.data_ptr(), count))
    return drawn

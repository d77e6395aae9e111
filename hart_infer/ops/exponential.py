"""Draw exponential random numbers from the state of a generator on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import Backend, op

FP64_DRAWS = 2**20  # per chunk, to bound their memory


def _shaped(state: Tensor, count: int) -> Tensor:
    """Return what tells a compiler the result's shape: a generator takes no state without data."""
    return torch.empty(count, dtype=torch.float32, device=state.device)


@op(mutates=("state",), fake=_shaped, cpu=Backend(".cpu.exponential:exponential"))
def exponential(state: Tensor, count: int) -> Tensor:
    """Return standard exponential draws, [count] fp32 on the CPU: -log(1 - u) of fp64 u.

    `state` uint8 is a CPU generator's (`torch.Generator.get_state`), and moves on as the generator does.

    These are `exponential_`'s numbers in torch 2.13, with which the golden data were recorded; those of other versions differ
    (2.6, for one). Raises RuntimeError for a state that is none.
    """
    generator = torch.Generator()
    generator.set_state(state)
    drawn = torch.empty(count, dtype=torch.float32, device="cpu")
    for part in drawn.split(FP64_DRAWS):
        uniform = torch.rand(part.shape, dtype=torch.float64, device="cpu", generator=generator)
        part.copy_(uniform.neg_().log1p_().neg_())
    state.copy_(generator.get_state())
    return drawn

"""Draw exponential random numbers from the state of a generator on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import Backend, op

FP64_DRAWS = 2**20  # per chunk, to bound their memory


@op(
    mutates=("state",),
    fake=lambda state, count: torch.empty(count, device=state.device),  # a generator takes no state without data
    cpu=Backend(".cpu.exponential:exponential"),
)
def exponential(state: Tensor, count: int) -> Tensor:
    """Return standard exponential draws, [count] fp32 on the CPU: -log(1 - u) of fp64 u.

    `state` uint8 is a CPU generator's (`torch.Generator.get_state`), and moves on as the generator does.

    So draws torch 2.13, with which the golden data were recorded; `exponential_` differs between versions (2.6, for one).
    """
    generator = torch.Generator()
    generator.set_state(state)
    drawn = torch.empty(count)
    for part in drawn.split(FP64_DRAWS):
        part.copy_(torch.rand(part.shape, dtype=torch.float64, generator=generator).neg_().log1p_().neg_())
    state.copy_(generator.get_state())
    return drawn

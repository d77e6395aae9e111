"""Guidance halves on two devices: of two processes one computes the conditional rows of every scale, the other the
unconditional ones.

A map from Schedule to Schedule, as the fast modes are. Hidden states are exchanged after each scale; logits, draws and the
residual diffusion are then computed by both, from the same numbers, so both have the same codes.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from ..models.next_scale import NextScaleTransformer
from .pruning import BlockInputs, EveryToken, Memory, Pass
from .schedule import Schedule, Stage


@dataclass(frozen=True)
class Pair:
    """Two processes; the first has the conditional rows."""

    group: dist.ProcessGroup | None = None  # None is the default group

    @property
    def size(self) -> int:
        """Number of processes: two."""
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """Which of the two this one is."""
        return dist.get_rank(self.group)

    def gather(self, own: Tensor) -> list[Tensor]:
        """Return what the first and what the second process gave, tensors of one shape."""
        gathered = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(gathered, own.contiguous(), group=self.group)
        return gathered


@dataclass(frozen=True)
class Half(Pass):
    """Computes half of a guided scale's rows, and takes the others from the other process."""

    run: Pass
    pair: Pair

    def __call__(self, transformer: NextScaleTransformer, inputs: BlockInputs, memory: Memory) -> Tensor:
        """As `Pass`: R rows in, R out."""
        count = len(inputs.x) // 2
        own = inputs.rows(slice(self.pair.rank * count, (self.pair.rank + 1) * count))
        return torch.cat(self.pair.gather(self.run(transformer, own, memory)))

    def num_updates(self, depth: int) -> int:
        """As `Pass`."""
        return self.run.num_updates(depth)


@dataclass(frozen=True)
class FirstAlone(Pass):
    """Has the first process compute a scale without guidance, whose earlier keys the second one lacks."""

    run: Pass
    pair: Pair

    def __call__(self, transformer: NextScaleTransformer, inputs: BlockInputs, memory: Memory) -> Tensor:
        """As `Pass`."""
        hidden = inputs.x if self.pair.rank else self.run(transformer, inputs, memory)
        return self.pair.gather(hidden)[0]

    def num_updates(self, depth: int) -> int:
        """As `Pass`."""
        return self.run.num_updates(depth)


def split_guidance(schedule: Schedule, pair: Pair) -> Schedule:
    """Share a guided schedule between two processes; one without guidance is computed by both."""

    def split(stage: Stage) -> Stage:
        return stage if stage.prefilled else replace(stage, run=(Half if stage.guided else FirstAlone)(stage.run, pair))

    return replace(schedule, stages=tuple(map(split, schedule))) if schedule.guided else schedule


def agree(schedule: Schedule, seeds: Sequence[int], pair: Pair, device: torch.device) -> bool:
    """Whether both processes are about to draw the same seeds by like schedules."""
    described = [(type(stage.run).__name__, replace(stage, run=EveryToken())) for stage in schedule]
    digest = zlib.crc32(repr((list(seeds), described)).encode())
    first, second = pair.gather(torch.tensor(digest, dtype=torch.int64, device=device))
    return bool(first == second)

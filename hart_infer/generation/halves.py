"""Guidance halves on two devices: of two processes one computes the conditional rows of every scale, the other the
unconditional ones.

A map from Schedule to Schedule, as the fast modes are. Hidden states are exchanged after each scale; logits, draws and the
residual diffusion are then computed by both, and the second takes the first one's result, so that the two stay in step where
they round apart.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from ..models.next_scale import NextScaleTransformer
from .next_scale import Edit
from .pruning import BlockInputs, EveryToken, Memory, Pass
from .schedule import Schedule, Stage


@dataclass(frozen=True)
class Pair:
    """Two processes; the first has the conditional rows."""

    group: dist.ProcessGroup | None = None  # None is the default group

    def gather(self, own: Tensor) -> Tensor:
        """Return what both gave, tensors of one shape [N, ...], as [2, N, ...]: the first process's first."""
        gathered = own.new_empty(2 * len(own), *own.shape[1:])
        dist.all_gather_into_tensor(gathered, own.contiguous(), group=self.group)
        return gathered.unflatten(0, (2, -1))

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether either of the two says so."""
        return bool(self.gather(torch.tensor([flag], dtype=torch.uint8, device=device)).any())

    def agrees(self, description: object, inputs: Tensor) -> bool:
        """Whether both describe alike what they are about to do, and have the same inputs [N, D], but for rounding."""
        digest = zlib.crc32(repr((description, inputs.shape)).encode())
        first, second = self.gather(torch.tensor([digest], dtype=torch.int64, device=inputs.device))
        if first != second:
            return False
        first, second = self.gather(inputs.float())
        return not ((first - second).norm(dim=-1) > 0.03 * first.norm(dim=-1)).any()


@dataclass(frozen=True)
class GuidanceHalf(Pass):
    """Computes half of a guided scale's rows, and takes the others from the other process."""

    run: Pass
    pair: Pair

    def __call__(self, transformer: NextScaleTransformer, inputs: BlockInputs, memory: Memory) -> Tensor:
        """As `Pass`: R rows in, R out."""
        count, rank = len(inputs.x) // 2, dist.get_rank(self.pair.group)
        own = self.run(transformer, inputs.rows(slice(rank * count, (rank + 1) * count)), memory)
        return self.pair.gather(own).flatten(0, 1)


@dataclass(frozen=True)
class FirstAlone(Pass):
    """Has the first process compute a scale without guidance, whose earlier keys the second one lacks."""

    run: Pass
    pair: Pair

    def __call__(self, transformer: NextScaleTransformer, inputs: BlockInputs, memory: Memory) -> Tensor:
        """As `Pass`."""
        first = dist.get_rank(self.pair.group) == 0
        return self.pair.gather(self.run(transformer, inputs, memory) if first else inputs.x)[0]


def split_guidance(schedule: Schedule, pair: Pair) -> Schedule:
    """Share a guided schedule between two processes; one without guidance is computed by both."""

    def split(stage: Stage) -> Stage:
        return stage if stage.prefilled else replace(stage, run=(GuidanceHalf if stage.guided else FirstAlone)(stage.run, pair))

    return replace(schedule, stages=tuple(map(split, schedule))) if schedule.guided else schedule


def in_step(edit: Edit, pair: Pair) -> Edit:
    """Return `edit` with the first process's result for both."""

    def shared(embedding: Tensor, stage: Stage) -> Tensor:
        edited = edit(embedding, stage)
        return torch.empty_like(edited).copy_(pair.gather(edited)[0])  # with its strides, by which convolutions round

    return shared


def described(schedule: Schedule) -> Sequence[object]:
    """What has to be the same in both processes; how scales prune, by name and number, as functions have addresses."""
    return [(replace(stage, run=EveryToken()), type(stage.run), getattr(stage.run, "kept", None)) for stage in schedule]

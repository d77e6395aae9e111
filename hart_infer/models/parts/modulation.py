"""The vectors of adaptive norms, computed once per generation from the condition: they are the same at every scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import SteadyLinear


@dataclass(frozen=True)
class Modulation:
    """Per row: every block's vectors and the head's."""

    blocks: Tensor  # [depth, R, 6, D]: gamma1, gamma2, scale1, scale2, shift1, shift2; [depth, R, 0, D] for plain blocks
    head: Tensor  # [R, 2, D]: scale, shift

    def rows(self, index: Tensor | slice) -> Modulation:
        """A selection of the rows."""
        return Modulation(self.blocks[:, index], self.head[index])

    @staticmethod
    def cat(parts: Sequence[Modulation]) -> Modulation:
        """Stack along the rows."""
        return Modulation(torch.cat([part.blocks for part in parts], dim=1), torch.cat([part.head for part in parts]))


class NoModulation(nn.Module):
    """Gives a plain block no vectors."""

    def forward(self, condition: Tensor) -> Tensor:
        """[R, D] -> [R, 0, D]."""
        return condition.new_empty(len(condition), 0, condition.shape[-1])


class LinearModulation(SteadyLinear):
    """`count` vectors from a linear map of SiLU of the condition (released `ada_lin`)."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__(width, count * width, halves=True)

    def forward(self, condition: Tensor) -> Tensor:
        """[R, D] -> [R, count, D]."""
        vectors: Tensor = super().forward(F.silu(condition))
        return vectors.view(len(condition), -1, condition.shape[-1])


class TableModulation(nn.Module):
    """Adds six learned vectors to the condition (released `scale_shift_table`; VAR's `ada_gss`)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(6, width))

    def forward(self, condition: Tensor) -> Tensor:
        """Condition [R, D] or [R, 6 * D] -> [R, 6, D]."""
        return self.table + condition.view(len(condition), -1, self.table.shape[-1])

"""What launchers share: tile sizes, what a device has, and where Triton runs at all."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton

INTERPRETED = ((8, 0), 4)  # what the interpreter pretends to be: capability, multiprocessors


@dataclass(frozen=True)
class Config:
    """A kernel's tile and how it is compiled."""

    rows: int
    columns: int
    warps: int
    stages: int

    def __init__(self, rows: int, columns: int, *, warps: int, stages: int) -> None:
        """`rows` x `columns` elements a tile."""
        for name, value in (("rows", rows), ("columns", columns), ("warps", warps), ("stages", stages)):
            object.__setattr__(self, name, value)


@lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability and number of multiprocessors."""
    if device.type != "cuda":
        return INTERPRETED
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), properties.multi_processor_count


def interpreted() -> bool:
    """Whether Triton interprets kernels on CPU tensors instead of compiling them (TRITON_INTERPRET=1)."""
    return bool(triton.knobs.runtime.interpret) if hasattr(triton, "knobs") else False

"""What launchers share: tile sizes, what a device has, and where Triton runs at all."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton

INTERPRETED = 4  # multiprocessors that the interpreter pretends to have


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
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a device has to fill."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else INTERPRETED


def interpreted() -> bool:
    """Whether Triton interprets kernels on CPU tensors instead of compiling them (TRITON_INTERPRET=1)."""
    return bool(triton.knobs.runtime.interpret) if hasattr(triton, "knobs") else False

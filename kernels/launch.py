"""What launchers share: tile sizes, what a device has, and where Triton runs at all."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

INTERPRETED = 4  # multiprocessors that the interpreter pretends to have


@dataclass(frozen=True)
class Config:
    """A kernel's tile, `rows` x `columns` elements, and how it is compiled."""

    rows: int
    columns: int
    warps: int
    stages: int = 3  # of software pipelining: Triton's own default
    described: bool = False  # read through tensor descriptors where a device has them


@lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a device has to fill."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else INTERPRETED


@lru_cache(maxsize=16)
def capability(device: torch.device) -> int:
    """80 for an A100, 90 for an H100, 0 for what is no GPU."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    return 10 * major + minor


@triton.jit
def _trial_kernel(out):
    """Something to launch."""
    tl.store(out, 1)


def failure() -> str | None:
    """Why Triton can't launch anything on the current CUDA device, or None: it needs a C compiler and Python's headers."""
    return _failure(torch.cuda.current_device() if torch.cuda.is_available() else 0)


@lru_cache(maxsize=16)
def _failure(index: int) -> str | None:
    try:
        with torch.cuda.device(index):
            _trial_kernel[(1,)](torch.zeros(1, dtype=torch.int32, device=torch.device("cuda", index)))
    except Exception as error:  # whatever it is, PyTorch still works
        reason = str(error).strip() or type(error).__name__
        return f"Triton can't launch a kernel ({reason.splitlines()[0]})"
    return None


def interpreted() -> bool:
    """Whether Triton interprets kernels on CPU tensors instead of compiling them (TRITON_INTERPRET=1)."""
    knobs = getattr(triton, "knobs", None)  # older versions know the variable alone
    return bool(knobs.runtime.interpret) if knobs else os.environ.get("TRITON_INTERPRET", "0") == "1"

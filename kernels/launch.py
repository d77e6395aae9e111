"""What the launchers share: tiles, the properties of a device, and whether Triton can launch kernels at all."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

INTERPRETED = 4  # multiprocessors to assume where kernels are interpreted on the CPU


@dataclass(frozen=True)
class Config:
    """A kernel's tile of `rows` x `columns` elements, and the options that it is compiled with."""

    rows: int
    columns: int
    warps: int
    stages: int = 3  # of software pipelining; 3 is Triton's default


@lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors of a device; INTERPRETED for the CPU."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else INTERPRETED


@lru_cache(maxsize=16)
def capability(device: torch.device) -> int:
    """Return a device's compute capability times 10: 80 for an A100, 90 for an H100, 0 for the CPU."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    return 10 * major + minor


@triton.jit
def _trial_kernel(out):
    """Store a 1 in out [1] int32."""
    tl.store(out, 1)


def failure() -> str | None:
    """Return why Triton can't launch a kernel on the current CUDA device, or None if it can.

    It tries once per device and remembers the answer: Triton needs a C compiler and Python's headers, which may be missing.
    Where memory runs out instead, it raises that error and remembers nothing: the next call tries again.
    """
    return _failure(torch.cuda.current_device() if torch.cuda.is_available() else 0)


def _trial(index: int) -> None:
    """Launch the trial kernel on CUDA device `index`."""
    with torch.cuda.device(index):
        _trial_kernel[(1,)](torch.zeros(1, dtype=torch.int32, device=torch.device("cuda", index)))


@lru_cache(maxsize=16)  # which keeps what is returned, not what is raised
def _failure(index: int) -> str | None:
    try:
        _trial(index)
    except Exception as error:  # of any kind: operations then run on PyTorch
        if _ran_out_of_memory(error):
            raise
        reason = str(error).strip() or type(error).__name__
        return f"Triton can't launch a kernel ({reason.splitlines()[0]})"
    return None


def _ran_out_of_memory(error: Exception) -> bool:
    """Return whether memory ran out. PyTorch's allocator has a class for that, Triton's driver a RuntimeError's message."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "out of memory" in str(error).lower()


def interpreted() -> bool:
    """Return whether Triton interprets kernels on CPU tensors instead of compiling them (TRITON_INTERPRET=1)."""
    knobs = getattr(triton, "knobs", None)  # older versions of Triton have the environment variable only
    return bool(knobs.runtime.interpret) if knobs else os.environ.get("TRITON_INTERPRET", "0") == "1"

"""The number of threads with which a model runs on a CPU, and the memory that it leaves."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

SMALL_MODEL = 50_000_000  # parameters
LARGE_BLOCK = 31 << 20  # bytes: glibc learns from freed blocks of up to 32 MiB


def threads_for(model: nn.Module) -> int | None:
    """Return 1 below SMALL_MODEL parameters, else None: as many as PyTorch takes.

    A small model's operations last microseconds, so OpenMP's threads mostly spin, waiting for each other; beside other work
    they wait for one that has no core. Four images of an earlier hart-mini on two cores of an AMD EPYC: 0.52 s with two threads
    and 0.77 s with one on an idle machine, 4.9 s and 0.8 s beside other work. One thread also gives the same bits on any
    number of cores.
    """
    return 1 if sum(parameter.numel() for parameter in model.parameters()) < SMALL_MODEL else None


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Run the block with `count` CPU threads in this Python thread; None changes nothing.

    Other Python threads keep their numbers, but one that first uses PyTorch during the block starts with `count` too.
    """
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def keep_freed_memory() -> None:
    """Let glibc keep what a small model's call frees for the next one, as it does after a large model's by itself.

    After a freed block of 31 MiB it maps only larger blocks apart, and gives the end of a heap back only beyond 62 MiB
    (mallopt(3), "dynamic mmap threshold"), in the whole process, unless its user set MALLOC_TRIM_THRESHOLD_ or the like. A
    small model's blocks have 2 MiB at most, which leaves it at 4: 5,000 page faults in each picture of hart-mini. Nothing
    happens with other C libraries.
    """
    torch.UntypedStorage(LARGE_BLOCK, device="cpu")  # freed at once; none of its pages is touched


def leave_file(module: nn.Module) -> None:
    """Copy the parameters out of their checkpoint's mapped file, once most weights have been replaced, and give memory back.

    Else all of the file's pages, the old weights too, would stay in memory; so would what glibc keeps of freed memory, 1.2 GB
    for the released HART.
    """
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)

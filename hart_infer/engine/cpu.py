"""How a model runs on a CPU: with how many threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

SMALL_MODEL = 50_000_000  # parameters


def threads_for(model: nn.Module) -> int | None:
    """1 for a small model, else None: as many as PyTorch takes.

    A small model's operations last microseconds, and between two of them OpenMP's threads spin, waiting for each other. Beside
    other work a thread waits for one that has no core: four pictures of hart-mini then took 4.9 s with two threads and 0.8 s
    with one, on two cores (alone: 0.52 and 0.77). One thread also draws the same bits whatever the number of cores.
    """
    return 1 if sum(parameter.numel() for parameter in model.parameters()) < SMALL_MODEL else None


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Within it, this thread's operations on the CPU take `count` threads; None leaves the number alone.

    Other threads keep their numbers, but for one that uses PyTorch for the first time meanwhile: it begins with `count`.
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

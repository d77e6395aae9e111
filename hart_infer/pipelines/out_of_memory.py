"""Check before a call that it can fit in memory; clean up when memory runs out, or the user interrupts."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import OutOfMemoryError, is_out_of_memory

_OURS = ("hart_infer", "torch")


UNKNOWN_MEMORY = 2**40  # bytes assumed where the system does not tell: absurd calls are refused there too


def total_memory(device: torch.device) -> int:
    """Return the bytes that a device has in all; UNKNOWN_MEMORY if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return UNKNOWN_MEMORY


def check_memory(count: int, bytes_each: int, device: torch.device, *, bytes_once: int = 0, what: str = "pictures") -> None:
    """Raise OutOfMemoryError if bytes_once + count * bytes_each exceeds the device's total memory; `what` is counted."""
    total, needed = total_memory(device), bytes_once + count * bytes_each
    if needed > total:
        raise OutOfMemoryError(
            f"{count:,} {what} in one call need at least {needed / 2**30:,.1f} GiB, and {device} has "
            f"{total / 2**30:,.1f}: at most {max(total - bytes_once, 0) // bytes_each:,} could fit. Generate fewer at a time "
            "(num_images_per_prompt, prompts)."
        )


@contextmanager
def out_of_memory_advice() -> Iterator[None]:
    """On out-of-memory or Ctrl-C free what the call held; raise OutOfMemoryError with advice for the first."""
    try:
        yield
    except KeyboardInterrupt as error:
        _release(error)
        raise
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, OutOfMemoryError) or not is_out_of_memory(error):
            raise
        _release(error)
        raise OutOfMemoryError(
            "The device ran out of memory. Generate fewer pictures at once (num_images_per_prompt, prompts), load with "
            "dtype=torch.bfloat16, call enable_model_cpu_offload() or, where the pipeline has it, enable_decoder_tiling(), ask "
            "for a shorter answer (max_new_tokens), or free what else is on the device."
        ) from error


def _release(error: BaseException) -> None:
    """Clear the locals of finished hart_infer and torch frames: a notebook keeps the traceback, and with it the cache."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_globals.get("__name__", "").partition(".")[0] in _OURS:
            try:
                frame.clear()
            except RuntimeError:  # still running
                continue

"""Hold process-wide settings of torch while any thread needs them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Generic, TypeVar

import torch

ValueT = TypeVar("ValueT")


class Held(Generic[ValueT]):
    """A context manager for many threads: the first to enter writes the value, the last to leave restores the old one."""

    def __init__(self, read: Callable[[], ValueT], write: Callable[[ValueT], object], value: ValueT) -> None:
        self._read, self._write, self._value = read, write, value
        self._lock = threading.Lock()
        self._inside = 0
        self._before: list[ValueT] = []

    def __enter__(self) -> None:
        """Write the value, unless another thread has."""
        with self._lock:
            if not self._inside:
                self._before = [self._read()]
                self._write(self._value)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        """Restore the old value, unless another thread still needs the new one."""
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._write(self._before.pop())


def _set_convolution_tf32(allowed: bool) -> None:
    torch.backends.cudnn.allow_tf32 = allowed


no_convolution_tf32 = Held(lambda: torch.backends.cudnn.allow_tf32, _set_convolution_tf32, False)
_no_cudnn_attention = Held(torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp, False)


def without_cudnn_attention(device: torch.device) -> AbstractContextManager[None]:
    """Keep cuDNN's attention away on CUDA: it may give NaN for rows that attend to nothing, and plans for each length."""
    return _no_cudnn_attention if device.type == "cuda" else nullcontext()

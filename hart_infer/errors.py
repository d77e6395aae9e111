"""Define the exceptions that hart_infer raises on purpose; each message says what is wrong, what was expected, what to do."""

from __future__ import annotations


class HartError(Exception):
    """Base class of every error that hart_infer raises on purpose."""


class ConfigError(HartError, ValueError):
    """A checkpoint's configuration is incomplete or inconsistent, or asks for an unsupported option."""


class WeightsError(HartError, ValueError):
    """A checkpoint's tensors are truncated, missing, unexpected, of the wrong shape, or not plain tensors."""


class CheckpointNotFoundError(HartError, FileNotFoundError):
    """A folder, file, Hub repository or revision does not exist, or cannot be reached and is not cached."""


class InputError(HartError, ValueError):
    """An argument of a call is of the wrong type, out of range, or contradicts another."""


class OutputError(HartError, OSError):
    """A picture or a checkpoint could not be written; nothing half-written is left."""


class BackendError(HartError, RuntimeError):
    """A backend that was asked for by name can't run an operation here; the message says why."""


class OutOfMemoryError(HartError, RuntimeError):
    """The device ran out of memory; the message says what to reduce."""


# What torch's allocators say in a RuntimeError: CUDA and MPS, CPU on Unix, CPU on Windows, cuBLAS.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether Python's or a device's allocator raised `error`."""
    told = isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)
    return told or isinstance(error, MemoryError)

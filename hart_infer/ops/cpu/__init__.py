"""Check arguments and call the compiled kernels for x86 CPUs of `csrc/cpu/`, where they were built."""

from __future__ import annotations

from .attention import LIMIT, LimitExceeded, attention
from .library import describe, refusal

__all__ = ["LIMIT", "LimitExceeded", "attention", "describe", "refusal"]

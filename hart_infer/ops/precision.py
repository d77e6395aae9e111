"""When half-precision tensors are better multiplied in fp32."""

from __future__ import annotations

import platform
from functools import lru_cache

import torch
from torch import Tensor

MIN_ROWS = 128  # below, reading the weights is the cost, and widening them would add to it


@lru_cache(maxsize=2)
def _has_matrix_units(dtype: torch.dtype) -> bool:
    """Whether an x86 CPU has AMX tiles for the dtype; other CPUs are taken to be at home in half precision."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    name = {torch.bfloat16: "_is_amx_tile_supported", torch.float16: "_is_amx_fp16_supported"}[dtype]
    return bool(getattr(torch.cpu, name, lambda: False)())


def widens(x: Tensor) -> bool:
    """Whether products of `x` are taken in fp32 and rounded once, to x's dtype: half precision on an x86 CPU without AMX.

    Storage stays half precision. This rounds less than half-precision arithmetic, and in bf16 it was the faster way on the
    one such CPU that was tried (AVX-512: about 1.5 times for a linear map of 1024 rows).
    """
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) and not _has_matrix_units(x.dtype)

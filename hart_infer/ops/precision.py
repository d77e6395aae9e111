"""When half-precision tensors are better multiplied in fp32."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

MIN_ROWS = 128  # below, reading the weights is the cost, and widening them would add to it


@lru_cache(maxsize=1)
def _cpu_has_matrix_units() -> bool:
    """Whether the CPU has AMX tiles, the only units that multiply bf16 faster than fp32."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(supported is not None and supported())


def widens(x: Tensor) -> bool:
    """Whether products of `x` are taken in fp32 and rounded once, to x's dtype: half precision on a CPU without AMX.

    Storage stays half precision. This rounds less than half-precision arithmetic, and is faster there.
    """
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) and not _cpu_has_matrix_units()

"""Which products of half-precision tensors a CPU takes in fp32, by what it can do."""

from __future__ import annotations

import platform
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

Product = Literal["linear", "conv2d", "attention"]

MIN_ROWS = 128  # of a linear map: below, reading the weights is the cost, and widening them adds to it

# The instructions with which a product in half precision is at least as fast as in fp32. One core's GFLOP/s, half precision as
# it is / widened to fp32 and rounded once (benchmarks/products.py writes such a table; its records are in benchmarks/results):
#   AMD EPYC, AVX512_BF16      bf16  linear 209 / 90, convolution 230 / 98, attention 80 / 83 (and no copies: as it is)
#   the same, no fp16 at all   fp16  linear 11 / 90
#   Intel Xeon, AVX-512 alone  bf16  linear: widened 1.5 times as fast
# An x86 CPU with none of them widens.
NATIVE: dict[torch.dtype, dict[Product, frozenset[str]]] = {
    torch.bfloat16: dict.fromkeys(("linear", "conv2d", "attention"), frozenset({"amx_bf16", "amx_tile", "avx512_bf16"})),
    torch.float16: dict.fromkeys(("linear", "conv2d", "attention"), frozenset({"amx_fp16"})),
}


@lru_cache(maxsize=1)
def instructions() -> frozenset[str]:
    """The instruction sets among those of NATIVE that this CPU has."""
    cpu = torch.cpu
    older = {"amx_tile": "_is_amx_tile_supported", "amx_fp16": "_is_amx_fp16_supported"}
    older["avx512_bf16"] = "_is_avx512_bf16_supported"
    found = {name for name, function in older.items() if getattr(cpu, function, lambda: False)()}
    known = cpu.get_capabilities() if hasattr(cpu, "get_capabilities") else {}
    return frozenset(found | {name for name, has in known.items() if has is True})


def widens(x: Tensor, product: Product) -> bool:
    """Whether a product of `x` is taken in fp32 and rounded once, to x's dtype: half precision on a CPU that is slow at it.

    Storage stays half precision, and the result rounds less than half-precision arithmetic. CPUs other than x86 are taken to
    be at home in half precision; none has been measured.
    """
    if x.device.type != "cpu" or x.dtype not in NATIVE or platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    return not instructions() & NATIVE[x.dtype][product]

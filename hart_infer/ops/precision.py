"""Decide which half-precision products on a CPU are computed in fp32."""

from __future__ import annotations

import platform
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

Product = Literal["linear", "conv2d", "attention"]

MIN_ROWS = 128  # of a linear map: with fewer, reading the weights dominates, and widening adds to it

# The instructions with which a product in half precision is at least as fast as in fp32; an x86 CPU with none of them widens.
# GFLOP/s of one core, native / widened to fp32 and rounded once (benchmarks/results/products_epyc_avx512_bf16.json):
#
#                                    linear    conv2d     attention
#   AMD EPYC, AVX512_BF16     bf16   198 / 92  229 / 105  79 / 81 (native all the same: it makes no fp32 copies)
#   the same, no fp16 at all  fp16    22 / 93   20 / 105  50 / 80
#
# On an Intel Xeon with AVX-512 alone a linear map in bf16 was 1.5 times as fast widened.
NATIVE: dict[torch.dtype, dict[Product, frozenset[str]]] = {
    torch.bfloat16: dict.fromkeys(("linear", "conv2d", "attention"), frozenset({"amx_bf16", "amx_tile", "avx512_bf16"})),
    torch.float16: dict.fromkeys(("linear", "conv2d", "attention"), frozenset({"amx_fp16"})),
}


@lru_cache(maxsize=1)
def instructions() -> frozenset[str]:
    """Return the instruction sets that this CPU has, by the names in NATIVE; others may be among them."""
    cpu = torch.cpu
    older = {"amx_tile": "_is_amx_tile_supported", "amx_fp16": "_is_amx_fp16_supported"}
    older["avx512_bf16"] = "_is_avx512_bf16_supported"
    found = {name for name, function in older.items() if getattr(cpu, function, lambda: False)()}
    known = cpu.get_capabilities() if hasattr(cpu, "get_capabilities") else {}
    return frozenset(found | {name for name, has in known.items() if has is True})


def widens(x: Tensor, product: Product) -> bool:
    """Return whether a product of `x` is computed in fp32 and rounded once, to x's dtype: on x86 CPUs slow at that dtype.

    Storage stays in x's dtype, and the result is rounded less often than in half-precision arithmetic. Other CPUs are assumed
    to be fast in half precision; none was measured.
    """
    if x.device.type != "cpu" or x.dtype not in NATIVE or platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    return not instructions() & NATIVE[x.dtype][product]

"""Map by weights in int8 by the CPU's kernel: what the reference in `hart_infer/ops/int8_linear.py` does, in bf16."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .library import call

TILE_ROWS, PANEL, QUAD = 12, 32, 4  # csrc/cpu/int8_linear.cpp's


class Int8Linear(ctypes.Structure):
    """`struct Int8Linear` of csrc/cpu/kernels.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "scale", "sums", "bias", "levels", "row_scales", "out")),
        *((name, ctypes.c_int64) for name in ("rows", "in_width", "out_width")),
    ]


def int8_linear(x: Tensor, packed: Tensor, scale: Tensor, sums: Tensor, bias: Tensor | None) -> Tensor:
    """Compute what the reference in `hart_infer/ops/int8_linear.py` computes, to the bit."""
    width, outputs = x.shape[-1], len(scale)
    _check(x, packed, scale, sums, bias)
    x, packed = x.contiguous(), packed.contiguous()
    out = x.new_empty(*x.shape[:-1], outputs)
    rows = x.numel() // width
    levels = x.new_empty(-(-rows // TILE_ROWS) * TILE_ROWS, width, dtype=torch.uint8)
    row_scales = x.new_empty(rows, dtype=torch.float32)
    if out.numel():
        tensors = (x, packed, scale, sums, bias, levels, row_scales, out)
        call("int8_linear", Int8Linear(*(None if y is None else y.data_ptr() for y in tensors), rows, width, outputs))
    return out


def _check(x: Tensor, packed: Tensor, scale: Tensor, sums: Tensor, bias: Tensor | None) -> None:
    width, outputs = x.shape[-1], len(scale)
    halves, others = (x if bias is None else bias, x), ((packed, torch.int8), (scale, torch.float32), (sums, torch.int32))
    expected = [*((y, torch.bfloat16) for y in halves), *others]
    if any(y.dtype != dtype or y.device.type != "cpu" for y, dtype in expected):
        raise ValueError("int8_linear: x and bias must be bfloat16, packed int8, scale float32, sums int32, all on the CPU.")
    if width % QUAD or packed.shape != (-(-outputs // PANEL), width // QUAD, PANEL, QUAD):
        raise ValueError(f"int8_linear: packed {list(packed.shape)} is not of {outputs} outputs and {width} inputs.")
    vectors = [y for y in (scale, sums, bias) if y is not None]
    if any(y.shape != (outputs,) or not y.is_contiguous() for y in vectors):
        raise ValueError(f"int8_linear: scale, sums and bias must be [{outputs}], contiguous.")

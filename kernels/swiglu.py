"""SwiGLU's product silu(gate) * up, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import refusal as refusal

BLOCK = 1024


@triton.jit
def swiglu_kernel(gate, up, out, gate_row, up_row, width, BLOCK: tl.constexpr):
    """Compute BLOCK columns of one row of out [rows, width], contiguous; grid (rows, blocks of columns)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = column < width
    dtype = out.dtype.element_ty
    g = tl.load(gate + row * gate_row + column, mask=valid, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_row + column, mask=valid, other=0.0).to(tl.float32)
    activated = tl.div_rn(g, 1.0 + tl.exp(-g)).to(dtype).to(tl.float32)  # rounded, as PyTorch's silu is
    tl.store(out + row * width + column, (activated * u).to(dtype), mask=valid)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Compute what the reference in `hart_infer/ops/swiglu.py` computes."""
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"swiglu: gate {list(gate.shape)} {gate.dtype} and up {list(up.shape)} {up.dtype} must be alike.")
    if gate.device != up.device:
        raise ValueError(f"swiglu: gate and up are on {gate.device} and {up.device}.")
    if not gate.numel():
        return gate.new_empty(gate.shape)
    width = gate.shape[-1]
    rows = [x.reshape(-1, width) for x in (gate, up)]
    rows = [x if x.stride(1) == 1 else x.contiguous() for x in rows]
    out = gate.new_empty(gate.shape)
    grid = (len(rows[0]), triton.cdiv(width, BLOCK))
    swiglu_kernel[grid](*rows, out, rows[0].stride(0), rows[1].stride(0), width, BLOCK=BLOCK, num_warps=4)
    return out

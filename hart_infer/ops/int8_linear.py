"""Map by weights in int8, with activations quantised to int8 a row at a time: approximate."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .registry import Backend, op

LEVELS = 127  # the largest magnitude of a row, of weights as of activations, becomes this
CUDA_ROWS = 17  # torch._int_mm takes no fewer there
PANEL, QUAD = 32, 4  # outputs that lie together, and inputs that one instruction multiplies


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise the rows of `x` [..., D] symmetrically, to the nearest: levels [..., D] int8, and scales [...] fp32."""
    wide = x.float()
    scale = (wide.abs().amax(dim=-1) / LEVELS).clamp_(min=torch.finfo(torch.float32).tiny)
    return (wide / scale[..., None]).round_().to(torch.int8), scale


def pack_int8(levels: Tensor) -> Tensor:
    """Lay out levels [out, in] int8, in a multiple of QUAD, as [panels, in / QUAD, PANEL, QUAD], with zeros at the end."""
    out, width = levels.shape
    padded = F.pad(levels, (0, 0, 0, -out % PANEL)) if out % PANEL else levels
    return padded.view(-1, PANEL, width // QUAD, QUAD).transpose(1, 2).contiguous()


def unpack_int8(packed: Tensor, out: int) -> Tensor:
    """Undo `pack_int8` for `out` outputs."""
    return packed.transpose(1, 2).reshape(-1, packed.shape[1] * QUAD)[:out]


@op(cpu=Backend(".cpu:int8_linear"))
def int8_linear(x: Tensor, packed: Tensor, scale: Tensor, sums: Tensor, bias: Tensor | None) -> Tensor:
    """Quantise the rows of `x` [..., in] and map them -> [..., out] in x's dtype; sums are exact in int32.

    `packed`: the weight's levels, as `pack_int8` lays them out; `scale` [out] fp32 and `sums` [out] int32: each output's scale
    and the sum of its levels, which a kernel needs that knows unsigned levels alone. `bias` [out] in x's dtype.
    MPS, which has no product of integers, sums in fp32.
    The reference unpacks the weight in every call.
    """
    levels, scales = quantize_rows(x.reshape(-1, x.shape[-1]))
    rows = len(levels)
    levels = F.pad(levels, (0, 0, 0, max(CUDA_ROWS - rows, 0)))
    product = _product(levels, unpack_int8(packed, len(scale)).t())[:rows] * scales[:, None] * scale
    out = (product if bias is None else product + bias).to(x.dtype)
    return out.view(*x.shape[:-1], len(scale))


def _product(levels: Tensor, weight: Tensor) -> Tensor:
    """levels [M, K] int8 and weight [K, N] int8 -> [M, N] fp32."""
    if levels.device.type == "mps":
        return levels.float() @ weight.float()
    return torch._int_mm(levels, weight).float()

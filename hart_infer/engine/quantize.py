"""Run linear maps on weights in int8, to save memory, or on activations in int8 too, to save time: approximate, opt-in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from .. import ops
from ..models.parts.layers import Linear
from ..ops.int8_linear import QUAD, pack_int8, quantize_rows

ModuleT = TypeVar("ModuleT", bound=nn.Module)
Quantize = Literal["int8", "int8_weight_only"]
UNIT = 128  # products are of levels / UNIT, which is exact in every dtype: sums of plain levels overflow fp16


class QuantizedLinear(nn.Module):
    """A linear map whose weight is in int8, with one fp32 scale per output."""

    scale: Tensor  # [out] fp32

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """Move as modules do, but keep the scale in fp32 when the dtype changes."""
        scale = self.scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.scale = scale.to(self.scale.device)
        return self


class Int8Linear(QuantizedLinear):
    """A linear map whose weight is int8 with one fp32 scale per output; products are taken in the input's dtype.

    Each weight is off by at most half a step, 1/254 of its row's largest. Weights are widened in every call, so this saves
    memory, not time.
    """

    weight: Tensor  # [out, in] int8

    def __init__(self, linear: nn.Linear) -> None:
        """Quantise `linear`: symmetric, rounded to the nearest."""
        super().__init__(linear)
        weight, scale = quantize_rows(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] in x's dtype."""
        out = ops.linear(x, self.weight.to(x.dtype).div_(UNIT), None).float() * (self.scale * UNIT)
        return (out if self.bias is None else out + self.bias).to(x.dtype)


class DynamicInt8Linear(QuantizedLinear):
    """A linear map of int8 by int8: weights have a scale per output, activations one per row, found as they come.

    Products are exact, so each output is off by what the two roundings are. On a CPU with AVX512_VNNI and AVX512_BF16 it takes
    about half of bf16's time; elsewhere it saves memory and takes longer.
    """

    packed: Tensor  # the levels, as `pack_int8` lays them out
    sums: Tensor  # [out] int32, of the levels

    def __init__(self, linear: nn.Linear) -> None:
        """Quantise `linear`, whose number of inputs is a multiple of QUAD."""
        super().__init__(linear)
        levels, scale = quantize_rows(linear.weight.detach())
        self.register_buffer("packed", pack_int8(levels))
        self.register_buffer("scale", scale)
        self.register_buffer("sums", levels.sum(dim=1, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] in x's dtype."""
        return ops.int8_linear(x, self.packed, self.scale, self.sums, self.bias)


def quantize_weights(module: ModuleT, mode: Quantize = "int8_weight_only", *, keep: tuple[str, ...] = ()) -> ModuleT:
    """Replace every `Linear` within `module` as `mode` says, one at a time, and return the module.

    "int8_weight_only": by an Int8Linear; "int8": by a DynamicInt8Linear, where the number of inputs is a multiple of QUAD.
    `keep`: names of children that stay as they are, wherever they are.
    """
    found = [path for path, part in module.named_modules() if isinstance(part, Linear)]
    for path in found:  # by name: a list of the modules would keep all weights until the end
        place, _, name = path.rpartition(".")
        linear = module.get_submodule(path)
        assert isinstance(linear, Linear)
        if name not in keep and (mode == "int8_weight_only" or linear.in_features % QUAD == 0):
            kind = Int8Linear if mode == "int8_weight_only" else DynamicInt8Linear
            setattr(module.get_submodule(place), name, kind(linear))
    return module


def is_quantized(module: nn.Module) -> bool:
    """Return whether `module` holds weights in int8."""
    return any(isinstance(part, QuantizedLinear) for part in module.modules())

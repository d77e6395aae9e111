"""Store the weights of linear maps as int8, to save memory: approximate, and opt-in."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from .. import ops
from ..models.parts.layers import Linear

ModuleT = TypeVar("ModuleT", bound=nn.Module)
LEVELS = 127
UNIT = 128  # products are of levels / UNIT, which is exact in every dtype: sums of plain levels overflow fp16


class Int8Linear(nn.Module):
    """A linear map whose weight is int8 with one fp32 scale per output; products are taken in the input's dtype.

    Each weight is off by at most half a step, 1/254 of its row's largest. Weights are widened in every call, so this saves
    memory, not time.
    """

    weight: Tensor  # [out, in] int8
    scale: Tensor  # [out] fp32

    def __init__(self, linear: nn.Linear) -> None:
        """Quantise `linear`: symmetric, rounded to the nearest."""
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        wide = linear.weight.detach().float()
        scale = wide.abs().amax(dim=1).clamp_(min=torch.finfo(torch.float32).tiny) / LEVELS
        self.register_buffer("weight", (wide / scale[:, None]).round_().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] in x's dtype."""
        out = ops.linear(x, self.weight.to(x.dtype).div_(UNIT), None).float() * (self.scale * UNIT)
        return (out if self.bias is None else out + self.bias).to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Linear:
        """Move as modules do, but keep the scale in fp32 when the dtype changes."""
        scale = self.scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.scale = scale.to(self.scale.device)
        return self


def quantize_weights(module: ModuleT, *, keep: tuple[str, ...] = ()) -> ModuleT:
    """Replace every `Linear` within `module` by an Int8Linear, one at a time, and return the module.

    `keep`: names of children that stay as they are, wherever they are.
    """
    found = [path for path, part in module.named_modules() if isinstance(part, Linear)]
    for path in found:  # by name: a list of the modules would keep all weights until the end
        place, _, name = path.rpartition(".")
        if name not in keep:
            setattr(module.get_submodule(place), name, Int8Linear(module.get_submodule(path)))  # type: ignore[arg-type]
    return module

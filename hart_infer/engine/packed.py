"""Keep weights in the layout that oneDNN multiplies by, instead of bringing them there in every call: on CPUs, in bf16."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..models.parts.layers import Linear
from ..ops.precision import NATIVE, instructions
from .cpu import leave_file

ROWS = 512  # of the products that the layout is chosen for; other numbers of rows run too


class PackedLinear(nn.Module):
    """A linear map in bf16 on a CPU whose weight is packed. The weight is no parameter, but is saved, and copied, as one."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.packed = _pack(linear.weight)

    @property
    def weight(self) -> Tensor:
        """A copy [out, in], as it was before packing."""
        return self.packed.to_dense()

    def unpacked(self) -> Linear:
        """Return the map as it was."""
        with torch.device("meta"):
            linear = Linear(self.in_features, self.out_features, bias=self.bias is not None)
        linear.weight, linear.bias = nn.Parameter(self.weight, requires_grad=False), self.bias
        return linear

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] in bf16."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x.bfloat16(), self.packed, self.bias, "none", [None], "")
        return out

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _apply(self, fn: Any, recurse: bool = True) -> PackedLinear:
        raise InputError("Packed weights can't be moved or cast; call disable_packed_weights() on the pipeline first.")

    def __getstate__(self) -> dict[str, Any]:
        """Give the plain weight to copies and pickles."""
        return self.__dict__ | {"packed": self.weight}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Pack it again."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.packed = _pack(self.packed)


def _pack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
    return packed


def packing_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why weights can't be packed there, None if they can."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return f"it is for bfloat16 on a CPU, and this is {str(dtype).removeprefix('torch.')} on {device}"
    if not instructions() & NATIVE[dtype]["linear"]:
        return "this CPU does not multiply in bfloat16"
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return "this PyTorch has no oneDNN"
    return None


def pack_weights(module: nn.Module) -> None:
    """Replace every plain `Linear` within `module`, one at a time, by a PackedLinear."""
    for path in [path for path, part in module.named_modules() if type(part) is Linear]:
        _replace(module, path, PackedLinear(module.get_submodule(path)))  # type: ignore[arg-type]
    leave_file(module)


def unpack_weights(module: nn.Module) -> None:
    """Undo `pack_weights`."""
    for path in [path for path, part in module.named_modules() if isinstance(part, PackedLinear)]:
        _replace(module, path, module.get_submodule(path).unpacked())  # type: ignore[operator]


def _replace(module: nn.Module, path: str, part: nn.Module) -> None:
    place, _, name = path.rpartition(".")
    setattr(module.get_submodule(place), name, part)

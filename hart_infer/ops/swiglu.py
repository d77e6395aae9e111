"""The gate of a SwiGLU MLP."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .registry import Backend, op


@op(triton=Backend("..kernels.swiglu:swiglu"))
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up for two tensors [..., D] of one dtype; silu is rounded to it before the product."""
    return F.silu(gate) * up

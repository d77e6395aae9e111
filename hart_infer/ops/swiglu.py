"""Compute the gate of a SwiGLU MLP."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .registry import Backend, op


@op(triton=Backend("..kernels.swiglu:swiglu"), cpu=Backend(".cpu:swiglu"))
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up for two tensors [..., D] of one dtype; silu(gate) is rounded to that dtype first."""
    return F.silu(gate) * up

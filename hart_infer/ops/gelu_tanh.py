"""Compute the activation of VAR's MLP."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .registry import Backend, op


@op(cpu=Backend(".cpu:gelu_tanh"))
def gelu_tanh(x: Tensor) -> Tensor:
    """Return x [..., D] times the normal distribution function of x, approximated by tanh, in x's dtype."""
    return F.gelu(x, approximate="tanh")

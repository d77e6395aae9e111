"""Compute GELU by tanh, the activation of VAR's MLPs, HART's of `mlp_type` gpt2, and VILA-U's tower."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .registry import Backend, op


@op(cpu=Backend(".cpu:gelu_tanh"))
def gelu_tanh(x: Tensor) -> Tensor:
    """Return x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2 for x [..., D], in its dtype."""
    return F.gelu(x, approximate="tanh")

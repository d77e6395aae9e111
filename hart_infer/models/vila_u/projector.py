"""The projector from a position's quantised feature to the Llama's input (released `MultimodalProjector`)."""

from __future__ import annotations

import re

import torch.nn.functional as F
from torch import Tensor, nn

from ..parts.checks import require
from ..parts.layers import Linear

MAX_LAYERS = 64


def projector_layers(kind: str) -> int:
    """Return the linear layers of a released `mm_projector_type`: `identity`, `linear` or `mlpNx_gelu`, else ConfigError."""
    match = re.fullmatch(r"mlp([1-9]\d?)x_gelu", kind)
    layers = {"identity": 0, "linear": 1}.get(kind, int(match[1]) if match else -1)
    require(
        0 <= layers <= MAX_LAYERS,
        f"mm_projector_type {kind!r} is not supported; identity, linear and mlpNx_gelu, N at most {MAX_LAYERS}, are.",
    )
    return layers


class Projector(nn.Module):
    """Linear layers with GELU (erf) between; none for `identity`."""

    def __init__(self, kind: str, *, code_dim: int, hidden_size: int) -> None:
        """Map C = `code_dim` features to H = `hidden_size`; raises ConfigError where `kind` can't."""
        super().__init__()
        count = projector_layers(kind)
        fits = count > 0 or code_dim == hidden_size
        require(fits, f"mm_projector_type 'identity' needs mm_hidden_size {code_dim} to be hidden_size {hidden_size}.")
        self.layers = nn.ModuleList(Linear(hidden_size if i else code_dim, hidden_size) for i in range(count))

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., H]."""
        for index, layer in enumerate(self.layers):
            x = layer(F.gelu(x) if index else x)
        return x

"""Compute what a position of VILA-U's sequence costs, from modules that need no storage."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from ..models.llama import Llama
from ..models.parts.layers import Linear
from ..models.vila_u.depth import DepthTransformer
from ..models.vila_u.projector import Projector


@dataclass(frozen=True)
class Cost:
    """What one part costs in one position."""

    weights_read: int  # elements, once for all rows, and as often as they are needed again
    flops: int  # of one row: 2 a multiply-add


def position_costs(llama: Llama, depth: DepthTransformer, projector: Projector, *, length: int) -> dict[str, Cost]:
    """Return the cost of drawing one position, by part, where the Llama attends to `length` positions.

    Multiply-adds of matrices and of attention are counted, with all keys and values cached, those of the depth transformer's
    slots too. Its weights are read once for each slot, as no cache of a processor holds them. What a position doesn't need is
    left out: the Llama's embedding, and its head, which only text is drawn by.
    """
    slots, width = depth.config.num_slots, depth.config.embed_dim
    each_slot = (depth.blocks, depth.norm, depth.classifier)
    others = [depth.hidden_embed, *[depth.code_embed] * (slots - 1)]
    repeated = [*each_slot * slots, *others]
    seen = slots * (slots + 1) // 2  # by all slots together: each sees itself and those before
    layers, hidden = llama.config.num_hidden_layers, llama.config.hidden_size
    return {
        "llama": Cost(
            _parameters([llama.layers, llama.norm]),
            2 * (_matrices([llama.layers]) + 2 * layers * hidden * length),
        ),
        "projector": Cost(_parameters([projector]), 2 * _matrices([projector])),
        "depth_transformer": Cost(
            _parameters(repeated),
            2 * (_matrices(repeated) + 2 * depth.config.num_layers * width * seen),
        ),
    }


def _parameters(modules: Iterable[nn.Module]) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def _matrices(modules: Iterable[nn.Module]) -> int:
    """Return the elements of the linear layers' matrices: the multiply-adds of one row."""
    return sum(part.weight.numel() for module in modules for part in module.modules() if isinstance(part, Linear))

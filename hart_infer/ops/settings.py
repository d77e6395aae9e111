"""The numbers by which codes are drawn, as a tensor on the device: a captured graph then obeys new ones."""

from __future__ import annotations

import torch
from torch import Tensor

from .logits import drop_tail, weigh

# Places in the tensor; kernels/guided_sample.py and kernels/diffusion_step.py read it in this order.
GUIDANCE, WITH_GUIDANCE, LOGIT_GAIN, TEMPERATURE, TOP_K, REMOVABLE = range(6)


def draw_settings(
    *, guidance: float = 0.0, logit_gain: float = 1.0, temperature: float = 1.0, top_k: int = 0, top_p: float = 0.0
) -> Tensor:
    """Return [t, 1 + t, gain, temperature, k, 1 - p] fp32; `guided_sample` says what they do.

    Raises ValueError for a `top_p` outside 0 to 1 or a `temperature` that is not above 0.
    """
    if not 0 <= top_p <= 1 or not temperature > 0:
        raise ValueError(f"top_p must be from 0 to 1, temperature above 0; they are {top_p} and {temperature}.")
    return torch.tensor([guidance, 1 + guidance, logit_gain, temperature, top_k, 1 - top_p], dtype=torch.float32)


def guide_by(rows: Tensor, settings: Tensor) -> Tensor:
    """As `logits.guide`, by the guidance in `settings` [6]: rows [2B, ...] -> [B, ...]."""
    return weigh(rows, settings[WITH_GUIDANCE], settings[GUIDANCE])


def filter_by(logits: Tensor, settings: Tensor, *, top_k: bool, top_p: bool) -> Tensor:
    """As `logits.filter_logits`, by the k and p in `settings` [6], without waiting for the device; in place.

    `top_k`, `top_p`: whether each is applied at all.
    """
    if top_k:
        place = (settings[TOP_K].long() - 1).clamp(0, logits.shape[-1] - 1)
        lowest = logits.sort(dim=-1, descending=True).values.index_select(-1, place[None])
        logits.masked_fill_(logits < lowest, -torch.inf)
    if top_p:
        drop_tail(logits, settings[REMOVABLE])
    return logits

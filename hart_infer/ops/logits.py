"""What is done to logits before a code is drawn: guidance, top-k, top-p."""

from __future__ import annotations

import torch
from torch import Tensor


def guide(rows: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance of `rows` [2B, ...], conditional first: (1 + t) conditional - t unconditional [B, ...]."""
    conditional, unconditional = rows.chunk(2)
    return (1 + guidance) * conditional - guidance * unconditional


def filter_logits(logits: Tensor, *, top_k: int, top_p: float) -> Tensor:
    """Set to -inf what top-k, then top-p, removes from `logits` [..., V] fp32; in place, and returned.

    Top-k keeps the k best codes and all ties of the last of them. Of what is left top-p removes the lowest codes whose
    cumulated probability is at most 1 - p, never the best one. 0 turns either off.
    """
    vocabulary = logits.shape[-1]
    if 0 < top_k < vocabulary:
        lowest = logits.topk(top_k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
        logits.masked_fill_(logits < lowest, -torch.inf)
    if top_p > 0:
        ascending, order = logits.sort(dim=-1, descending=False)
        remove = ascending.softmax(dim=-1).cumsum_(dim=-1) <= 1 - top_p
        remove[..., -1] = False
        logits.masked_fill_(remove.scatter(-1, order, remove), -torch.inf)
    return logits


def keep_ties(filtered: Tensor, logits: Tensor) -> Tensor:
    """`filtered` with the codes of `logits` [..., V] back that tie with the lowest one that stayed: no order decides."""
    lowest = filtered.masked_fill(filtered == -torch.inf, torch.inf).amin(dim=-1, keepdim=True)
    return logits.masked_fill(logits < lowest, -torch.inf)

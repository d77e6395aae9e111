"""Guide and filter logits before a code is drawn: classifier-free guidance, top-k, top-p."""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import Backend, op

BEST = 512  # codes: a nucleus seldom keeps more


def guide(rows: Tensor, guidance: float) -> Tensor:
    """Guide `rows` [2B, ...], the conditional half first -> (1 + t) conditional - t unconditional [B, ...], t: `guidance`."""
    return weigh(rows, 1 + guidance, guidance)


def weigh(rows: Tensor, conditional: float | Tensor, unconditional: float | Tensor) -> Tensor:
    """Return the first half of `rows` [2B, ...] times `conditional` less the second times `unconditional`, [B, ...]."""
    first, second = rows.chunk(2)
    return conditional * first - unconditional * second


def blend(rows: Tensor, guidance_scale: float) -> Tensor:
    """Guide `rows` [2B, ...], the conditional half first -> u + s (c - u) [B, ...]: VILA-U's convention and rounding."""
    conditional, unconditional = rows.chunk(2)
    return unconditional + guidance_scale * (conditional - unconditional)


def temper(logits: Tensor, temperature: float) -> Tensor:
    """Divide `logits` by `temperature`, in place, and return them; 1 disables it."""
    return logits if temperature == 1 else logits.div_(temperature)


def filter_logits(logits: Tensor, *, top_k: int, top_p: float) -> Tensor:
    """Set to -inf what top-k and then top-p remove from `logits` [..., V] fp32; in place, and returned.

    `top_k`: keep the k largest and ties with the k-th. `top_p`: then drop the least likely of the rest while their
    probabilities add up to at most 1 - top_p, never the best one; of equal ones the first. 0 disables either.
    """
    if 0 < top_k < logits.shape[-1] or top_p > 0:
        drop_unlikely(logits, top_k, top_p)
    return logits


@op(mutates=("logits",), keeps_layout=True, cpu=Backend(".cpu.filter:drop_unlikely"))
def drop_unlikely(logits: Tensor, top_k: int, top_p: float) -> None:
    """Do what `filter_logits` says, in place."""
    vocab_size = logits.shape[-1]
    if 0 < top_k < vocab_size:
        lowest = logits.topk(top_k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
        logits.masked_fill_(logits < lowest, -torch.inf)
    if top_p > 0:
        # What top-k left is sorted fast: most of it is equal. Other devices would have to be waited for, or lack fp64.
        by_best = top_k == 0 and logits.device.type == "cpu"
        (drop_tail_below_best if by_best else drop_tail)(logits, 1 - top_p)


def drop_tail(logits: Tensor, removable: float | Tensor) -> None:
    """Set to -inf the least likely of `logits` [..., V] while their probabilities add up to at most `removable`; in place.

    Never the best one; of equal ones the first.
    """
    ascending, order = logits.sort(dim=-1, stable=True)
    remove = ascending.softmax(dim=-1).cumsum_(dim=-1) <= removable
    remove[..., -1] = False
    logits.masked_fill_(remove.scatter(-1, order, remove), -torch.inf)


def drop_tail_below_best(logits: Tensor, removable: float) -> None:
    """Do to `logits` [..., V] what `drop_tail` does, in a third of its time on a CPU: sort each row's BEST codes alone.

    Rows that keep as many or more, or some of several equal ones, are sorted whole. On a CPU alone.
    """
    rows = logits.reshape(-1, logits.shape[-1])
    if rows.shape[-1] < 4 * BEST:
        drop_tail(logits, removable)
        return
    best, order = rows.topk(BEST, dim=-1)
    probabilities = rows.softmax(dim=-1)
    mass = probabilities.gather(-1, order).double()
    ascended = probabilities.sum(dim=-1, keepdim=True, dtype=torch.float64) - mass.cumsum(dim=-1) + mass
    count = (ascended.float() > removable).sum(dim=-1, keepdim=True).clamp_(min=1)
    lowest, following = (best.gather(-1, place.clamp(max=BEST - 1)) for place in (count - 1, count))
    known = lowest > following
    whole = rows[~known[:, 0]]
    if len(whole):
        drop_tail(whole, removable)
        rows[~known[:, 0]] = whole
    logits.copy_(rows.masked_fill_(known & (rows < lowest), -torch.inf).view(logits.shape))


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Keep the most likely of `probabilities` [..., V] until they add up to at least `top_p`, at least one; renormalise.

    In descending order, where `filter_logits` ascends: they differ where a sum is within rounding of the threshold.
    """
    descending, order = probabilities.sort(dim=-1, descending=True)
    reached = descending.cumsum(dim=-1) >= top_p
    remove = torch.zeros_like(reached)
    remove[..., 1:] = reached[..., :-1]
    kept = probabilities.masked_fill(remove.scatter(-1, order, remove), 0)
    return kept / kept.sum(dim=-1, keepdim=True)


def keep_ties(filtered: Tensor, logits: Tensor) -> Tensor:
    """Restore codes whose `logits` [..., V] equal the smallest that `filtered` kept, so that no tie depends on sort order."""
    lowest = filtered.masked_fill(filtered == -torch.inf, torch.inf).amin(dim=-1, keepdim=True)
    return logits.masked_fill(logits < lowest, -torch.inf)

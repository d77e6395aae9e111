"""From the head's logits to the codes of a scale and the embeddings to go on with, with its own random numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from .philox import gumbel, philox
from .registry import Backend, op


@op(triton=Backend("..kernels.guided_sample:guided_sample"))
def guided_sample(
    logits: Tensor,
    codebook: Tensor,
    seeds: Tensor,
    offset: Tensor,
    *,
    guidance: float,
    top_k: int,
    top_p: float,
    gain: float,
    temperature: float,
    mixes: bool,
) -> tuple[Tensor, Tensor]:
    """Draw codes [B, L] int64 and give their embeddings [B, L, C] fp32, from `logits` [B, L, V] and `codebook` [V, C] fp32.

    Logits [2B, L, V] are guided first: (1 + guidance) conditional - guidance unconditional, the conditional half in front.
    Then top-k and top-p remove what `hart_infer.sampling.filter_logits` removes, but for codes of equal logits, which stay
    or go together: top-p, too, keeps all ties at its threshold. 0 turns either off.

    A code is drawn by argmax(log p + G1), which is the race of exponential draws argmax(p / E1) of `Draws.multinomial`.
    With `mixes` the embedding is softmax((gain logits + G2) / temperature) @ codebook, else the drawn code's own.
    G1 and G2 are Gumbel noise from the first two words of Philox with key `seeds` [B] int64 and counter (code, token, offset):
    an image's depend on its seed and on `offset` [1] int64 alone, which has to differ from scale to scale.

    Nothing waits for the device, so nothing is raised for logits without a softmax (NaN, or infinite): there the code is -1
    and the embedding NaN.
    """
    logits = logits.float()
    if len(logits) > len(seeds):
        conditional, unconditional = logits.chunk(2)
        logits = (1 + guidance) * conditional - guidance * unconditional
    race, mixing = _noise(logits, seeds, offset)
    filtered = logits.masked_fill(logits < _threshold(logits, top_k, top_p), -torch.inf)
    indices = (filtered + race).argmax(dim=-1)
    embeddings = ((filtered * gain + mixing) / temperature).softmax(dim=-1) @ codebook if mixes else codebook[indices]
    failed = ~logits.logsumexp(dim=-1).isfinite()
    return indices.masked_fill(failed, -1), embeddings.masked_fill(failed[..., None], torch.nan)


def _noise(logits: Tensor, seeds: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent draws of Gumbel noise of the shape of `logits` [B, L, V]; image by image, for the words are wide."""
    _, length, vocabulary = logits.shape
    token = torch.arange(length, device=logits.device)[:, None]
    code = torch.arange(vocabulary, device=logits.device)
    draws = []
    for seed in seeds.unbind():
        race, mixing, _, _ = philox((code, token, offset & 0xFFFFFFFF, (offset >> 32) & 0xFFFFFFFF), seed)
        draws.append((gumbel(race), gumbel(mixing)))
    races, mixings = zip(*draws, strict=True)
    return torch.stack(races), torch.stack(mixings)


def _threshold(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """The lowest logit that stays, [..., 1]: what top-k leaves, of that what top-p leaves, and always the best."""
    vocabulary = logits.shape[-1]
    lowest = torch.full_like(logits[..., :1], -torch.inf)
    if 0 < top_k < vocabulary:
        lowest = logits.topk(top_k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    if top_p > 0:
        ascending = logits.masked_fill(logits < lowest, -torch.inf).sort(dim=-1).values
        removed = (ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p).sum(dim=-1, keepdim=True)
        lowest = ascending.gather(-1, removed.clamp_(max=vocabulary - 1))
    return lowest

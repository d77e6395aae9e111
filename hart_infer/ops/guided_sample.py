"""From the head's logits to the codes of a scale and the embeddings to go on with, with its own random numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from .logits import filter_logits, guide, keep_ties
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
    logit_gain: float,
    temperature: float,
    more_smooth: bool,
) -> tuple[Tensor, Tensor]:
    """Draw codes [B, L] int64 and give their embeddings [B, L, C] fp32, from `logits` [B, L, V] and `codebook` [V, C] fp32.

    Logits [2B, L, V] are guided first (`guide`), then filtered by top-k and top-p (`filter_logits`), but codes of equal
    logits stay or go together.

    A code is drawn by argmax(log p + G1), which is the race of exponential draws argmax(p / E1) of torch.multinomial.
    With `more_smooth` the embedding is softmax((logit_gain logits + G2) / temperature) @ codebook, else the drawn code's own.
    G1 and G2 are Gumbel noise from the first two words of Philox with key `seeds` [B] int64 and counter (code, token, offset):
    an image's depend on its seed and on `offset` [1] int64 alone, which has to differ from scale to scale.

    Nothing waits for the device, so nothing is raised for logits without a softmax (NaN, or infinite): there the code is -1
    and the embedding NaN.
    """
    logits = guide(logits.float(), guidance) if len(logits) > len(seeds) else logits.float()
    race, mixing = _noise(logits, seeds, offset)
    failed = ~logits.logsumexp(dim=-1).isfinite()
    filtered = keep_ties(filter_logits(logits.clone(), top_k=top_k, top_p=top_p), logits)
    indices = (filtered + race).argmax(dim=-1)
    if more_smooth:
        embeddings = ((filtered * logit_gain + mixing) / temperature).softmax(dim=-1) @ codebook
    else:
        embeddings = codebook[indices]
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

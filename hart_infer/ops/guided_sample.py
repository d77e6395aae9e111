"""Draw a scale's codes from the head's logits, with Philox random numbers, and return them with their embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

from .logits import keep_ties
from .philox import gumbel, philox
from .registry import Backend, op
from .settings import LOGIT_GAIN, TEMPERATURE, filter_by, guide_by


@op(triton=Backend("..kernels.guided_sample:guided_sample"))
def guided_sample(
    logits: Tensor,
    codebook: Tensor,
    seeds: Tensor,
    offset: Tensor,
    settings: Tensor,
    *,
    top_k: bool,
    top_p: bool,
    more_smooth: bool,
) -> tuple[Tensor, Tensor]:
    """Draw codes [B, L] int64; return them and embeddings [B, L, C] fp32, from `logits` [B, L, V] and `codebook` [V, C] fp32.

    `settings` [6] fp32, from `draw_settings`, has the numbers: guidance t and 1 + t, logit_gain, temperature, k, 1 - p. They
    lie on the device, so that a captured graph obeys new ones; `top_k` and `top_p` say whether those filters run at all.

    Logits [2B, L, V] are guided first (`logits.guide`), then filtered (`logits.filter_logits`), except that ties with the
    lowest kept logit are all kept.

    A code is drawn by argmax(log p + G1), equivalent to torch.multinomial's argmax(p / E) with exponential E. With
    `more_smooth` the embedding is softmax((logit_gain * logits + G2) / temperature) @ codebook, else the drawn code's.
    G1 and G2 are Gumbel noise from the first two words of Philox with key `seeds` [B] int64 and counter (code, token, offset).
    An image's noise depends only on its seed and on `offset` [1] int64, which must differ from scale to scale.

    It does not synchronise with the device, so logits without a softmax (a NaN or inf, or all -inf) raise nothing: the code
    is -1, the embedding NaN.
    """
    logits = guide_by(logits.float(), settings) if len(logits) > len(seeds) else logits.float()
    race, mixing = _noise(logits, seeds, offset)
    failed = ~logits.logsumexp(dim=-1).isfinite()
    filtered = keep_ties(filter_by(logits.clone(), settings, top_k=top_k, top_p=top_p), logits)
    indices = (filtered + race).argmax(dim=-1)
    if more_smooth:
        embeddings = ((filtered * settings[LOGIT_GAIN] + mixing) / settings[TEMPERATURE]).softmax(dim=-1) @ codebook
    else:
        embeddings = codebook[indices]
    return indices.masked_fill(failed, -1), embeddings.masked_fill(failed[..., None], torch.nan)


def _noise(logits: Tensor, seeds: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Draw Gumbel noise [B, L, V] fp32, shaped as `logits`, twice; one image at a time, as the int64 words take memory."""
    _, length, vocab_size = logits.shape
    token = torch.arange(length, device=logits.device)[:, None]
    code = torch.arange(vocab_size, device=logits.device)
    draws = []
    for seed in seeds.unbind():
        race, mixing, _, _ = philox((code, token, offset & 0xFFFFFFFF, (offset >> 32) & 0xFFFFFFFF), seed)
        draws.append((gumbel(race), gumbel(mixing)))
    races, mixings = zip(*draws, strict=True)
    return torch.stack(races), torch.stack(mixings)

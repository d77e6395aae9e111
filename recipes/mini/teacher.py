"""Teacher forcing: every scale sees the true codes of the scales before, and all are predicted in one step.

All scales run at once through the modules that generate, over a place that lets each see itself and those before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from model import AUTOENCODER, CONTEXT_TOKENS
from residual import diffusion_loss
from torch import Tensor

from hart_infer.generation.schedule import Stage
from hart_infer.models.hart import HartTransformer
from hart_infer.models.next_scale import Condition, NextScaleTransformer
from hart_infer.models.parts.modulation import Modulation
from hart_infer.models.parts.quantizer import Quantizer
from hart_infer.models.text import TextEncoder, attended
from hart_infer.ops.registry import use_backend

LOGITS_AT_ONCE = 1500  # rows of 4096
CORRUPTED = 0.02  # share of input codes replaced by random ones: sampling errs too


class TeacherPlace:
    """A `Place` of all scales, one after the other, that keeps what the backward pass needs; a `KVCache` writes over it."""

    def __init__(self, rows: int, num_heads: int, head_dim: int, lengths: Sequence[int]) -> None:
        """`rows` of the batch, `lengths` of the scales."""
        self.shape, self.lengths = (rows, num_heads, sum(lengths), head_dim), lengths
        self.dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.get_default_dtype()
        self.mask = mask_of(lengths[:-1]).to(self.dtype)
        self.stored: dict[int, tuple[Tensor, Tensor]] = {}

    def slot(self, layer: int) -> tuple[Tensor, Tensor]:
        """Fresh memory for the keys and values of a block."""
        self.stored[layer] = torch.empty(self.shape, dtype=self.dtype), torch.empty(self.shape, dtype=self.dtype)
        return self.stored[layer]

    def visible(self, layer: int) -> tuple[Tensor, Tensor]:
        """All scales' keys and values."""
        return self.stored[layer]

    def attend(self, q: Tensor, layer: int, *, scale: float) -> Tensor:
        """Let every scale attend to itself and those before: the last to all, the others by a mask."""
        keys, values = self.stored[layer]
        earlier = sum(self.lengths[:-1])
        before, last = (q * scale).to(keys.dtype).tensor_split([earlier], dim=2)
        seen = (
            attended_by(before, keys[:, :, :earlier], values[:, :, :earlier], self.mask),
            attended_by(last, keys, values, None),
        )
        return torch.cat(seen, dim=2).transpose(1, 2).flatten(2)


class Attended(torch.autograd.Function):
    """Attention by products and a softmax. The gradient of the scores is computed in their place.

    In bf16 on a CPU the backward pass of PyTorch's attention takes four times as long.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """q [..., M, d], k and v [..., N, d], mask [M, N], added, -> [..., M, d]."""
        scores = q @ k.mT
        if mask is not None:
            scores += mask
        weights = torch.softmax(scores, dim=-1, dtype=scores.dtype)
        found = weights @ v
        ctx.save_for_backward(q, k, v, weights, found)
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """The gradients of q, k and v."""
        q, k, v, weights, found = ctx.saved_tensors
        of_scores = gradient @ v.mT
        of_scores -= (gradient * found).sum(dim=-1, keepdim=True)
        of_scores *= weights
        return of_scores @ k, of_scores.mT @ q, weights.mT @ gradient, None


attended_by: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor] = Attended.apply


def encode(encoder: TextEncoder, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Hidden states [N, T, D], which have gradients, and mask [N, T] of captions."""
    tokens, mask = encoder.tokenize(captions, context_tokens=CONTEXT_TOKENS)
    model, positions = encoder.model, torch.arange(CONTEXT_TOKENS).expand(len(tokens), -1)
    place = TeacherPlace(len(tokens), model.config.num_key_value_heads, model.config.head_dim, [CONTEXT_TOKENS])
    with torch.autocast("cpu", torch.bfloat16):
        return model(model.embed_tokens(tokens), positions, place, attended(mask, 0)).float(), mask


def mask_of(lengths: Sequence[int]) -> Tensor:
    """[L, L] for `lengths` of L in all: 0 where a scale sees itself or one before, else so little that a softmax makes it 0."""
    scale = torch.repeat_interleave(torch.tensor(lengths, dtype=torch.long))
    return torch.where(scale[:, None] >= scale, 0.0, -1e4)


def once(condition: Condition) -> Condition:
    """One row of each that generation repeats."""
    if condition.copies == 1:
        return condition
    rows = slice(None, None, condition.copies)
    cos, sin = condition.table
    return Condition(
        inputs=condition.inputs[rows],
        table=(cos[rows], sin[rows]),
        modulation=condition.modulation.rows(rows),
        last_position=condition.last_position[rows],
    )


def forward(
    transformer: NextScaleTransformer, stages: Sequence[Stage], condition: Condition, inputs: Sequence[Tensor]
) -> tuple[list[Tensor], Modulation]:
    """Hidden states [B, p * p, D] of the given `stages`, the first ones, from the teacher-forced inputs [B, C, p, p] of all
    but the first."""
    with use_backend("torch"):  # a kernel has no gradient, and wants one dtype
        return _forward(transformer, stages, once(condition), inputs)


def _forward(
    transformer: NextScaleTransformer, stages: Sequence[Stage], condition: Condition, inputs: Sequence[Tensor]
) -> tuple[list[Tensor], Modulation]:
    rows, first, _ = condition.inputs.shape
    later, lengths = stages[1:], [first, *(stage.length for stage in stages[1:])]
    scales = transformer.embed_scales()
    embedded = [transformer.embed_tokens(latent, scales[stage.index]) for stage, latent in zip(later, inputs, strict=True)]
    tables = transformer.image_tables([stage.side for stage in later], condition.last_position)
    cos, sin = (
        torch.cat([x.expand(rows, -1, -1, -1) for x in parts], dim=2) for parts in zip(condition.table, *tables, strict=True)
    )
    place = TeacherPlace(rows, transformer.num_heads, transformer.head_dim, lengths)
    hidden = transformer(torch.cat([condition.inputs, *embedded], dim=1), condition.modulation, (cos, sin), place)
    context, *images = hidden.split(lengths, dim=1)
    return [context[:, -1:], *images], condition.modulation


def losses(
    transformer: NextScaleTransformer, quantizer: Quantizer, stages: Sequence[Stage], condition: Condition,
    codes: list[Tensor], latent: Tensor, generator: torch.Generator, corrupted: float = CORRUPTED,
) -> dict[str, Tensor]:  # fmt: skip
    """The loss, and its parts: the codes' cross-entropy by scale and, where HART's last scale takes part, the residual's.

    Half of the loss weighs tokens alike, half weighs scales alike: the first ones have few tokens and decide what is drawn.
    """
    with torch.no_grad():
        embeddings = [quantizer.embed(c) for c in codes]
        inputs = quantizer.inputs([quantizer.embed(corrupt(c, corrupted, generator)) for c in codes])[: len(stages) - 1]
    with torch.autocast("cpu", torch.bfloat16):
        hidden, modulation = forward(transformer, stages, condition, inputs)
    entropy = [code_entropy(transformer, h, modulation.head, c) for h, c in zip(hidden, codes, strict=False)]
    found = {f"scale {stage.side}": value.mean() for stage, value in zip(stages, entropy, strict=True)}
    found["loss"] = 0.5 * torch.cat(entropy, dim=1).mean() + 0.5 * torch.stack(list(found.values())).mean()
    if stages[-1].num_inference_steps and isinstance(transformer, HartTransformer):
        with torch.no_grad():
            residual = latent - sum(quantizer.contribution(e, s.phi) for e, s in zip(embeddings, stages, strict=True))
        known = transformer.residual_condition(hidden[-1], _tokens(embeddings[-1])).flatten(0, 1)
        with torch.autocast("cpu", torch.bfloat16):
            found["diffusion"] = diffusion_loss(transformer.diffusion, _tokens(residual).flatten(0, 1), known, generator)
        found["loss"] = found["loss"] + found["diffusion"]
    return found


def code_entropy(transformer: NextScaleTransformer, hidden: Tensor, modulation: Tensor, codes: Tensor) -> Tensor:
    """Cross-entropy [B, p * p] of one scale's codes, few pictures at a time, so that logits take little memory."""
    at_once = max(1, LOGITS_AT_ONCE // codes.shape[1])
    parts = zip(*(x.split(at_once) for x in (hidden, modulation, codes)), strict=True)
    with torch.autocast("cpu", torch.bfloat16):
        flat = [F.cross_entropy(transformer.head(h, m).flatten(0, 1), c.flatten(), reduction="none") for h, m, c in parts]
    return torch.cat(flat).view(codes.shape)


def corrupt(codes: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Replace a share of the codes by random ones."""
    others = torch.randint(AUTOENCODER.vocab_size, codes.shape, generator=generator)
    return torch.where(torch.rand(codes.shape, generator=generator) < share, others, codes)


def _tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)

"""Teacher forcing: every scale sees the true codes of the scales before, and all are predicted in one step.

The scales run one after the other through the modules that generate, over a cache that keeps what the backward pass needs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from model import AUTOENCODER
from residual import diffusion_loss
from torch import Tensor

from hart_infer.generation.schedule import Stage
from hart_infer.models.hart import HartTransformer
from hart_infer.models.next_scale import Condition, NextScaleTransformer
from hart_infer.models.parts.cache import Place
from hart_infer.models.parts.modulation import Modulation
from hart_infer.models.parts.quantizer import Quantizer
from hart_infer.ops.registry import use_backend

LOGITS_AT_ONCE = 1500  # rows of 4096
CORRUPTED = 0.05  # share of input codes replaced by random ones, as sampling errs too


class TeacherCache:
    """Keys and values of all scales so far, kept for the backward pass; a `KVCache` writes over its memory instead."""

    def __init__(self, rows: int, num_heads: int, head_dim: int) -> None:
        """Empty; `rows` of the batch."""
        self.rows, self.num_heads, self.head_dim = rows, num_heads, head_dim
        self.stored: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def at(self, length: int) -> TeacherPlace:
        """The place of a stage of `length` tokens, behind all that were asked for before."""
        return TeacherPlace(self, length)


class TeacherPlace:
    """A `Place` that keeps what the backward pass needs."""

    def __init__(self, cache: TeacherCache, length: int) -> None:
        """Of a scale of `length` tokens."""
        self.cache, self.length = cache, length

    def slot(self, layer: int) -> tuple[Tensor, Tensor]:
        """Fresh memory for the scale's keys and values of a block."""
        shape = (self.cache.rows, self.cache.num_heads, self.length, self.cache.head_dim)
        pair = torch.empty(shape), torch.empty(shape)
        self.cache.stored.setdefault(layer, []).append(pair)
        return pair

    def visible(self, layer: int) -> tuple[Tensor, Tensor]:
        """All scales' until and with this one."""
        keys, values = zip(*self.cache.stored[layer], strict=True)
        return torch.cat(keys, dim=2), torch.cat(values, dim=2)


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
    cache = TeacherCache(len(condition.inputs), transformer.num_heads, transformer.head_dim)
    place: Place = cache.at(condition.inputs.shape[1])
    hidden = [transformer(condition.inputs, condition.modulation, condition.table, place)[:, -1:]]
    for stage, latent in zip(stages[1:], inputs, strict=True):
        (table,), place = transformer.image_tables([stage.side], condition.last_position), cache.at(stage.length)
        hidden.append(transformer(transformer.embed_tokens(latent, stage.index), condition.modulation, table, place))
    return hidden, condition.modulation


def losses(
    transformer: NextScaleTransformer, quantizer: Quantizer, stages: Sequence[Stage], condition: Condition,
    codes: list[Tensor], latent: Tensor, generator: torch.Generator,
) -> dict[str, Tensor]:  # fmt: skip
    """The loss, and its parts: the codes' cross-entropy by scale and, where HART's last scale takes part, the residual's.

    Half of the loss weighs tokens alike, half weighs scales alike: the first ones have few tokens and decide what is drawn.
    """
    with torch.no_grad():
        embeddings = [quantizer.embed(c) for c in codes]
        inputs = quantizer.inputs([quantizer.embed(corrupt(c, generator)) for c in codes])[: len(stages) - 1]
    with torch.autocast("cpu", torch.bfloat16):
        hidden, modulation = forward(transformer, stages, condition, inputs)
    entropy = [code_entropy(transformer, h, modulation.head, c) for h, c in zip(hidden, codes, strict=False)]
    found = {f"scale {stage.side}": value.mean() for stage, value in zip(stages, entropy, strict=True)}
    found["loss"] = 0.5 * torch.cat(entropy, dim=1).mean() + 0.5 * torch.stack(list(found.values())).mean()
    if stages[-1].num_inference_steps and isinstance(transformer, HartTransformer):
        with torch.no_grad():
            residual = latent - sum(quantizer.contribution(e, s.phi) for e, s in zip(embeddings, stages, strict=True))
        known = transformer.residual_condition(hidden[-1], _tokens(embeddings[-1]))
        found["diffusion"] = diffusion_loss(
            transformer.diffusion, _tokens(residual).flatten(0, 1), known.flatten(0, 1), generator
        )
        found["loss"] = found["loss"] + found["diffusion"]
    return found


def code_entropy(transformer: NextScaleTransformer, hidden: Tensor, modulation: Tensor, codes: Tensor) -> Tensor:
    """Cross-entropy [B, p * p] of one scale's codes, few pictures at a time, so that logits take little memory."""
    at_once = max(1, LOGITS_AT_ONCE // codes.shape[1])
    parts = zip(*(x.split(at_once) for x in (hidden, modulation, codes)), strict=True)
    with torch.autocast("cpu", torch.bfloat16):
        flat = [F.cross_entropy(transformer.head(h, m).flatten(0, 1), c.flatten(), reduction="none") for h, m, c in parts]
    return torch.cat(flat).view(codes.shape)


def corrupt(codes: Tensor, generator: torch.Generator) -> Tensor:
    """Replace a share of the codes by random ones."""
    others = torch.randint(AUTOENCODER.vocab_size, codes.shape, generator=generator)
    return torch.where(torch.rand(codes.shape, generator=generator) < CORRUPTED, others, codes)


def _tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)

"""The generation loop: scale by scale, then the residual diffusion (released `HARTForT2I.autoregressive_infer_cfg`)."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .cache import KVCache
from .model.layers import MANY_ROWS, guide
from .model.quantizer import Quantizer
from .model.rope import context_table, image_table
from .model.transformer import Modulation, Transformer
from .sampling import Draws, Settings, sample_scale
from .schedule import Stage


@dataclass(frozen=True)
class Prefill:
    """What scale 0 leaves of a context, per row: all that later scales need of it."""

    keys: Tensor  # [depth, R, H, T, d]
    values: Tensor
    hidden: Tensor  # [R, 1, D]: the last position's
    modulation: Modulation
    last_position: Tensor  # [R]: the last context position id, which shifts the image tokens' positions

    def repeat(self, times: int) -> Prefill:
        """Each row `times` times in turn."""
        return self.rows(torch.arange(len(self.hidden), device=self.hidden.device).repeat_interleave(times))

    def rows(self, index: Tensor | slice) -> Prefill:
        """A selection of the rows."""
        return Prefill(
            self.keys[:, index],
            self.values[:, index],
            self.hidden[index],
            self.modulation.rows(index),
            self.last_position[index],
        )


@dataclass(frozen=True)
class ScaleOutput:
    """One finished scale."""

    stage: Stage
    indices: Tensor  # [B, p * p] int64
    f_hat: Tensor  # [B, C, P, P] fp32: the latent so far


def prefill(
    transformer: Transformer, context: Tensor, mask: Tensor, position_ids: Tensor, stage: Stage
) -> tuple[Prefill, Tensor]:
    """Run scale 0, the context, through the transformer.

    `context` [R, T, context_dim], `mask` [R, T] bool and `position_ids` [R, T] int64. Also returns the hidden states
    [R, T, D] of all positions.
    """
    config, rows = transformer.config, len(context)
    copies = -(-MANY_ROWS // (rows * stage.length))  # more than one for a tiny context only: see SteadyLinear
    context, mask, position_ids = (x.repeat_interleave(copies, dim=0) for x in (context, mask, position_ids))
    embedded = transformer.embed_context(context)
    modulation = transformer.modulate(embedded, mask)
    table = context_table(position_ids, config.head_dim, transformer.dtype)
    cache = KVCache(config, [stage], rows=len(context), dtype=transformer.dtype, device=transformer.device)
    hidden = transformer(embedded + transformer.embed_level(0), modulation, table, cache, stage)
    done = Prefill(cache.keys, cache.values, hidden[:, -1:].clone(), modulation, position_ids[:, -1])
    return (done.rows(slice(None, None, copies)), hidden[::copies]) if copies > 1 else (done, hidden)


def unconditional_prefill(transformer: Transformer, stage: Stage) -> Prefill:
    """Scale 0 of the unconditional half, one row: context 0, position ids 0, only the first token in the mask."""
    config = transformer.config
    context = torch.zeros(1, config.context_token, config.context_dim, device=transformer.device)
    position_ids = torch.zeros(1, config.context_token, dtype=torch.int64, device=transformer.device)
    mask = torch.zeros_like(position_ids, dtype=torch.bool)
    mask[:, 0] = True
    return prefill(transformer, context, mask, position_ids, stage)[0]


def generate(
    transformer: Transformer,
    quantizer: Quantizer,
    stages: Sequence[Stage],
    halves: Sequence[Prefill],
    draws: Draws,
    settings: Settings,
) -> Generator[ScaleOutput, None, None]:
    """Yield every scale of B images; the last one's `f_hat` is the finished latent.

    `halves`: the conditional rows, B of them, and, for guidance, the unconditional ones, B or one that serves all. Without
    the latter nothing is guided, at half the work.
    """
    rows, cache = _gather(transformer, stages, halves)
    batch, last_side = rows.images, stages[-1].side
    f_hat = torch.zeros(batch, transformer.diffusion.channels, last_side, last_side, device=transformer.device)
    codebook = quantizer.codebook.weight
    for stage in stages:
        if stage.index == 0:  # guidance is 0 here: the unconditional logits would not count
            hidden, modulation = halves[0].hidden, halves[0].modulation.head
        else:
            latent = quantizer.next_input(f_hat, stage.side)
            hidden, modulation = _run_scale(transformer, latent, stage, rows, cache, last_side), rows.modulation.head
        logits = transformer.head(hidden, modulation)
        if len(logits) > batch:
            logits = guide(logits, stage.guidance(settings.guidance_scale))
        indices, embedding = sample_scale(logits, codebook, stage, draws, settings)
        del logits
        if stage.is_last and settings.diffusion_steps:
            embedding = embedding + transformer.diffusion.sample(
                transformer.residual_condition(hidden, codebook[indices]),
                images=batch,
                guidance=stage.guidance(settings.guidance_scale),
                steps=settings.diffusion_steps,
                draws=draws,
            )
        embedding = embedding.transpose(1, 2).reshape(batch, -1, stage.side, stage.side)
        f_hat = f_hat + (embedding if stage.phi is None else quantizer.enlarge(embedding, stage.phi))
        yield ScaleOutput(stage, indices, f_hat)


@dataclass(frozen=True)
class _Rows:
    """Per row of the transformer's batch: the conditional images, then, with guidance, the unconditional ones."""

    modulation: Modulation
    last_position: Tensor
    images: int
    halves: int


def _gather(transformer: Transformer, stages: Sequence[Stage], halves: Sequence[Prefill]) -> tuple[_Rows, KVCache]:
    """One cache and one modulation for both halves, the context's keys and values already in place."""
    batch, length = len(halves[0].hidden), stages[0].length
    halves = [half if len(half.hidden) == batch else half.repeat(batch) for half in halves]
    rows = batch * len(halves)
    cache = KVCache(transformer.config, stages, rows=rows, dtype=transformer.dtype, device=transformer.device)
    for i, half in enumerate(halves):
        cache.keys[:, i * batch : (i + 1) * batch, :, :length] = half.keys
        cache.values[:, i * batch : (i + 1) * batch, :, :length] = half.values
    modulation = Modulation.cat([half.modulation for half in halves])
    last_position = torch.cat([half.last_position for half in halves])
    return _Rows(modulation, last_position, batch, len(halves)), cache


def _run_scale(transformer: Transformer, latent: Tensor, stage: Stage, rows: _Rows, cache: KVCache, last_side: int) -> Tensor:
    """A scale s > 0 through the transformer: latent [B, C, p, p] -> hidden [R, p * p, D]."""
    table = image_table(stage.side, last_side, rows.last_position, transformer.config.head_dim, transformer.dtype)
    x = transformer.embed_tokens(latent, stage.index).repeat(rows.halves, 1, 1)
    return transformer(x, rows.modulation, table, cache, stage)

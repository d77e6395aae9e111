"""The generation loop: scale by scale, then the residual diffusion (released `HARTForT2I.autoregressive_infer_cfg`)."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.next_scale import Modulation, Transformer
from ..models.parts.cache import KVCache
from ..models.parts.layers import MANY_ROWS
from ..models.parts.quantizer import Quantizer
from ..models.parts.rope import context_table, image_table
from ..models.text import PromptEmbeds
from .sampling import Draws, Settings, check_codes, sample_scale
from .schedule import Stage


@dataclass(frozen=True)
class Prefill:
    """What scale 0 leaves of a context, per row: all that later scales need of it."""

    keys: Tensor  # [depth, R, H, T, d]
    values: Tensor
    hidden: Tensor  # [R, 1, D]: the last position's
    modulation: Modulation
    last_position: Tensor  # [R]: the last context position id, which shifts the image tokens' positions

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


def images_at_once(device: torch.device, limit: int) -> int:
    """How many images to take through a network together: `limit` of them, or on the CPU each alone.

    Products round differently with the number of their rows, and 1 / tau amplifies that from scale to scale into other codes:
    only alone is an image exactly the same in every batch. On the CPU that costs nothing.
    """
    return 1 if device.type == "cpu" else max(1, limit)


def generate_images(
    transformer: Transformer,
    quantizer: Quantizer,
    stages: Sequence[Stage],
    contexts: Sequence[PromptEmbeds],
    unconditional: Prefill | None,
    seeds: Sequence[int],
    draw_device: torch.device,
    settings: Settings,
) -> Generator[ScaleOutput, None, None]:
    """Yield every scale of one image per seed.

    `contexts`: the prompts', each serving equally many seeds in turn, and, if `unconditional` doesn't take their place, the
    negative prompts', one for all or one each. With neither of the latter nothing is guided.
    """
    images, device = len(seeds), transformer.device
    together = images_at_once(device, images)
    halves = []
    for context in contexts:
        tensors = [x.to(device) for x in (context.context, context.mask, context.position_ids)]
        rows = zip(*(x.split(images_at_once(device, len(x))) for x in tensors), strict=True)
        halves.append([prefill(transformer, embeds, mask, ids, stages[0])[0] for embeds, mask, ids in rows])
    if unconditional is not None:
        halves.append([unconditional])
    runs = [
        generate(
            transformer,
            quantizer,
            stages,
            [half[i * len(half) // images] for half in halves],
            Draws(seeds[i : i + together], draw_device),
            settings,
        )
        for i in range(0, images, together)
    ]
    del halves
    with ExitStack() as stack:
        for run in runs:
            stack.enter_context(closing(run))
        for scales in zip(*runs, strict=True):
            indices, f_hat = (torch.cat(parts) for parts in zip(*((s.indices, s.f_hat) for s in scales), strict=True))
            yield ScaleOutput(scales[0].stage, indices, f_hat)


def generate(
    transformer: Transformer,
    quantizer: Quantizer,
    stages: Sequence[Stage],
    halves: Sequence[Prefill],
    draws: Draws,
    settings: Settings,
) -> Generator[ScaleOutput, None, None]:
    """Yield every scale of B images; the last one's `f_hat` is the finished latent.

    `halves`: the conditional contexts and, for guidance, the unconditional ones; each row serves equally many of the B images
    that `draws` is for, in turn. Without the latter nothing is guided, at half the work.
    """
    batch, last_side = draws.images, stages[-1].side
    rows, cache = _gather(transformer, stages, halves, batch)
    del halves
    f_hat = torch.zeros(batch, transformer.diffusion.channels, last_side, last_side, device=transformer.device)
    codebook = quantizer.codebook.weight
    for stage in stages:
        if stage.index == 0:  # guidance is 0 here: the unconditional logits would not count
            hidden, modulation = rows.context_hidden, rows.modulation.head[:batch]
        else:
            latent = quantizer.next_input(f_hat, stage.side)
            hidden, modulation = _run_scale(transformer, latent, stage, rows, cache, last_side), rows.modulation.head
        if stage.is_last:
            del cache  # most of the memory, before the largest logits and the diffusion want theirs
        indices, embedding = sample_scale(transformer.head(hidden, modulation), codebook, stage, draws, settings)
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
        if stage.is_last:
            check_codes(indices, draws)
        yield ScaleOutput(stage, indices, f_hat)


@dataclass(frozen=True)
class _Rows:
    """Per row of the transformer's batch: the conditional images, then, with guidance, the unconditional ones."""

    modulation: Modulation
    last_position: Tensor
    context_hidden: Tensor  # [B, 1, D]: conditional rows only
    halves: int


def _gather(transformer: Transformer, stages: Sequence[Stage], halves: Sequence[Prefill], images: int) -> tuple[_Rows, KVCache]:
    """One cache and one modulation for all rows, the context's keys and values already in place."""
    rows, length = images * len(halves), stages[0].length
    cache = KVCache(transformer.config, stages, rows=rows, dtype=transformer.dtype, device=transformer.device)
    modulations, positions, hidden = [], [], []
    for i, half in enumerate(halves):
        given = len(half.hidden)
        place = slice(i * images, (i + 1) * images)
        for kept, prefilled in ((cache.keys, half.keys), (cache.values, half.values)):
            kept[:, place, :, :length].unflatten(1, (given, images // given)).copy_(prefilled[:, :, None])
        index = torch.arange(given, device=half.hidden.device).repeat_interleave(images // given)
        modulations.append(half.modulation.rows(index))
        positions.append(half.last_position[index])
        hidden.append(half.hidden[index])
    return _Rows(Modulation.cat(modulations), torch.cat(positions), hidden[0], len(halves)), cache


def _run_scale(transformer: Transformer, latent: Tensor, stage: Stage, rows: _Rows, cache: KVCache, last_side: int) -> Tensor:
    """A scale s > 0 through the transformer: latent [B, C, p, p] -> hidden [R, p * p, D]."""
    table = image_table(stage.side, last_side, rows.last_position, transformer.config.head_dim, transformer.dtype)
    x = transformer.embed_tokens(latent, stage.index).repeat(rows.halves, 1, 1)
    return transformer(x, rows.modulation, table, cache, stage)

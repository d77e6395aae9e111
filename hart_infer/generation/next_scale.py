"""The loop over the scales, one step at a time (released `HARTForT2I.autoregressive_infer_cfg`).

`prefill` sends a condition through the transformer, `GenerationState` is what one generation has so far, `run_scale`
advances it by one scale, and `finish` gives the latent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..models.next_scale import Condition, NextScaleTransformer
from ..models.parts.cache import KVCache
from ..models.parts.modulation import Modulation
from ..models.parts.quantizer import Quantizer
from ..ops.logits import temper
from .pruning import BlockInputs, Memory
from .residual import sample_residual
from .sampling import Sampler
from .schedule import Schedule, Stage


@dataclass(frozen=True)
class Prefix:
    """Result of `prefill` for R conditions: all that the scales need of them."""

    keys: Tensor  # [depth, R, H, L, d]: of the condition's L tokens
    values: Tensor
    hidden_states: Tensor  # [R, 1, D]: of the last token, gives scale 0's logits
    modulation: Modulation  # R rows
    last_position: Tensor  # [R]: added to the positions of the image tokens


def new_cache(transformer: NextScaleTransformer, *, rows: int, length: int, scratch_length: int = 0) -> KVCache:
    """Allocate a cache for `rows` rows of the transformer's batch."""
    return KVCache(
        depth=transformer.depth,
        rows=rows,
        num_heads=transformer.num_heads,
        head_dim=transformer.head_dim,
        length=length,
        scratch_length=scratch_length,
        dtype=transformer.dtype,
        device=transformer.device,
    )


def prefill(transformer: NextScaleTransformer, condition: Condition, cache: KVCache, rows: slice) -> Prefix:
    """Run scale 0 for R conditions and fill `rows` of the cache.

    Each condition fills len(rows) / R consecutive rows: its keys and values are computed into the first of them and copied to
    the others.
    """
    if condition.copies > 1:
        prefix = _prefill_copies(transformer, condition)
        copy_prefix(prefix, cache, rows)
        return prefix
    count, length = condition.inputs.shape[:2]
    first = slice(rows.start, rows.stop, (rows.stop - rows.start) // count)
    hidden = transformer(condition.inputs, condition.modulation, condition.table, cache.at(0, length, rows=first))
    cache.spread(rows, count, length)
    keys, values = cache.keys[:, first, :, :length], cache.values[:, first, :, :length]
    return Prefix(keys, values, hidden[:, -1:].clone(), condition.modulation, condition.last_position)


def prefill_alone(transformer: NextScaleTransformer, condition: Condition) -> Prefix:
    """Prefill into a new cache; the Prefix can be copied into the caches of several generations."""
    rows, length = condition.inputs.shape[0] // condition.copies, condition.inputs.shape[1]
    return prefill(transformer, condition, new_cache(transformer, rows=rows, length=length), slice(0, rows))


def _prefill_copies(transformer: NextScaleTransformer, condition: Condition) -> Prefix:
    """Prefill conditions whose rows are repeated `copies` times, and keep one row of each."""
    rows, length = condition.inputs.shape[:2]
    cache, once = new_cache(transformer, rows=rows, length=length), slice(None, None, condition.copies)
    hidden = transformer(condition.inputs, condition.modulation, condition.table, cache.at(0, length))
    modulation, last_position = condition.modulation.rows(once), condition.last_position[once]
    return Prefix(cache.keys[:, once], cache.values[:, once], hidden[once, -1:].clone(), modulation, last_position)


def copy_prefix(prefix: Prefix, cache: KVCache, rows: slice) -> None:
    """Copy the keys and values of each of R conditions into len(rows) / R consecutive rows of the cache."""
    count, length = len(prefix.hidden_states), prefix.keys.shape[3]
    for kept, given in ((cache.keys, prefix.keys), (cache.values, prefix.values)):
        kept[:, rows, :, :length].unflatten(1, (count, -1)).copy_(given[:, :, None])


Edit = Callable[[Tensor, Stage], Tensor]  # changes a scale's embedding [B, C, p, p] before it is added to f_hat


def as_drawn(embedding: Tensor, stage: Stage) -> Tensor:
    """Return the embedding unchanged: the Edit of a generation that is not one."""
    return embedding


class Generation(Protocol):
    """One generation on its way through the scales."""

    @property
    def indices(self) -> list[Tensor]:
        """Per finished scale [B, p * p] int64."""
        ...

    @property
    def sampler(self) -> Sampler:
        """What draws the codes."""
        ...

    @property
    def f_hat(self) -> Tensor:
        """What the scales so far add up to, [B, C, P, P] fp32; the next one, or the next generation, may write to it."""
        ...

    def advance(self, stage: Stage) -> None:
        """Run the next scale."""
        ...

    def end_cache(self) -> None:
        """Free what only further scales need."""
        ...

    def drop_cache(self) -> None:
        """End it, finished or not."""
        ...


class GenerationState:
    """State of generating B images. Its rows are B conditional ones and, with guidance, B unconditional ones behind them."""

    def __init__(
        self,
        transformer: NextScaleTransformer,
        quantizer: Quantizer,
        schedule: Schedule,
        sampler: Sampler,
        prefixes: Sequence[Prefix],
        cache: KVCache,
        edit: Edit = as_drawn,
    ) -> None:
        """`prefixes`: the conditional and, with guidance, the unconditional one, both in `cache`."""
        self.transformer, self.quantizer, self.schedule, self.sampler = transformer, quantizer, schedule, sampler
        self.batch_size, self.edit = sampler.batch_size, edit
        rows = [torch.arange(len(prefix.hidden_states), device=transformer.device) for prefix in prefixes]
        index = [row.repeat_interleave(self.batch_size // len(row)) for row in rows]
        self.hidden_states = prefixes[0].hidden_states[index[0]]  # [B, 1, D]: scale 0's
        self.modulation = Modulation.cat([p.modulation.rows(i) for p, i in zip(prefixes, index, strict=True)])
        last_position = torch.cat([p.last_position[i] for p, i in zip(prefixes, index, strict=True)])
        self.tables = transformer.image_tables([stage.side for stage in schedule], last_position)
        self.scale_embeddings = transformer.embed_scales()
        side, channels = schedule.latent_side, transformer.word_embed.in_features
        self.f_hat = torch.zeros(self.batch_size, channels, side, side, device=transformer.device)  # fp32
        self.indices: list[Tensor] = []  # per finished scale [B, p * p] int64
        self.memory = Memory()
        self._cache: KVCache | None = cache

    @property
    def cache(self) -> KVCache:
        """Keys and values of the scales so far."""
        assert self._cache is not None, "the last scale has dropped the cache"
        return self._cache

    def advance(self, stage: Stage) -> None:
        """Run the next scale."""
        run_scale(self, stage)

    def end_cache(self) -> None:
        """Free the cache and the memory, once no scale needs them any more."""
        self._cache, self.memory = None, Memory()

    def drop_cache(self) -> None:
        """As `Generation.drop_cache`."""
        self.end_cache()


def run_scale(state: GenerationState, stage: Stage) -> None:
    """Advance a state by one scale: hidden states, logits, codes, and what they add to f_hat."""
    transformer, sampler, codebook = state.transformer, state.sampler, state.quantizer.codebook.weight
    hidden = state.hidden_states if stage.prefilled else _hidden(state, stage)
    if stage.ends_cache:
        state.end_cache()  # frees most of the memory, before the largest logits and the diffusion are allocated
    logits = temper(transformer.head(hidden, state.modulation.head[: len(hidden)]), stage.logit_temperature)
    indices, embedding = sampler.draw(logits, codebook, stage)
    del logits
    if stage.num_inference_steps:
        embedding = embedding + sample_residual(
            transformer.diffusion,
            transformer.residual_condition(hidden, codebook[indices]),
            settings=sampler.settings(stage, hidden.device),
            num_inference_steps=stage.num_inference_steps,
            temperature=stage.residual_temperature,
            noise=sampler.noise,
        )
    embedding = embedding.transpose(1, 2).reshape(state.batch_size, -1, stage.side, stage.side)
    state.f_hat += state.quantizer.contribution(state.edit(embedding, stage), stage.phi)
    state.indices.append(indices)


def finish(state: Generation) -> Tensor:
    """Return the latent [B, C, P, P] fp32 of the scales that were run, and free the cache."""
    state.end_cache()
    return state.f_hat


def _hidden(state: GenerationState, stage: Stage) -> Tensor:
    """Run one scale through the transformer -> [R, p * p, D]; R = 2B if the stage is guided, else B."""
    rows = state.batch_size * (2 if stage.guided else 1)
    latent = state.quantizer.next_input(state.f_hat, stage.side)
    x = state.transformer.embed_tokens(latent, state.scale_embeddings[stage.index]).repeat(rows // state.batch_size, 1, 1)
    cos, sin = state.tables[stage.index]
    place = state.cache.at(stage.offset, stage.length, cached=stage.cached, rows=slice(0, rows))
    inputs = BlockInputs(x, state.modulation.rows(slice(0, rows)), (cos[:rows], sin[:rows]), place)
    return stage.run(state.transformer, inputs, state.memory)

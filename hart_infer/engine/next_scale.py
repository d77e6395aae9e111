"""Execute next-scale models: allocate key/value caches, and keep the unconditional prefix, which calls share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from ..generation.next_scale import (
    Edit,
    Generation,
    GenerationState,
    Prefix,
    as_drawn,
    copy_prefix,
    new_cache,
    prefill,
    prefill_alone,
)
from ..generation.sampling import PhiloxSampler, Sampler
from ..generation.schedule import Schedule, Stage
from ..models.next_scale import Condition, NextScaleTransformer
from ..models.parts.cache import KVCache
from ..models.parts.quantizer import Quantizer
from ..models.parts.stamp import Stamp
from .graphs import CacheKey, CapturedGeneration, Graphs, PlanKey, Recorder, shapes_of

TransformerT = TypeVar("TransformerT", bound=NextScaleTransformer)
Given = Condition | Prefix  # not prefilled yet, or so


class Engine(Generic[TransformerT]):
    """Executes one model, eagerly or, where `graphs` is set, by captured graphs. Threads may share it."""

    def __init__(self, transformer: TransformerT, quantizer: Quantizer) -> None:
        self.transformer, self.quantizer = transformer, quantizer
        self.graphs: Graphs | None = None
        self._unconditional: tuple[Stamp, Prefix] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is kept, for copies and pickles."""
        return self.__dict__ | {"_unconditional": None, "graphs": None}

    def start(
        self,
        schedule: Schedule,
        samplers: Sequence[Sampler],
        prompts: Sequence[Given],
        negatives: Sequence[Given] | None = None,
        edit: Edit = as_drawn,
    ) -> list[Generation]:
        """Return one generation per sampler, its conditions prefilled.

        `negatives` replace the unconditional condition; `edit` is applied to every scale. Conditions are shared out over the
        samplers in order: the number of samplers is a multiple of that of `prompts`, and of `negatives`.
        """
        if self.graphs is not None and len(samplers) == 1 and edit is as_drawn:
            captured = self._captured(self.graphs, schedule, samplers[0], prompts[0], negatives[0] if negatives else None)
            if captured is not None:
                return [captured]
        states: list[Generation] = []
        for index, sampler in enumerate(samplers):
            cache = self._allocate(self._cache_key(schedule, sampler.batch_size * (2 if schedule.guided else 1)))
            halves = (prompts, negatives) if schedule.guided else (prompts,)
            given = [half[index * len(half) // len(samplers)] if half else self.unconditional() for half in halves]
            chosen = [self._fill(cache, half, sampler.batch_size, one) for half, one in enumerate(given)]
            states.append(GenerationState(self.transformer, self.quantizer, schedule, sampler, chosen, cache, edit))
        return states

    def prefilled(self, conditions: Sequence[Condition]) -> list[Prefix]:
        """Prefill each condition into memory of its own, for several generations."""
        return [prefill_alone(self.transformer, condition) for condition in conditions]

    def _fill(self, cache: KVCache, half: int, batch_size: int, given: Given) -> Prefix:
        """Fill the rows of a guidance half of the cache, by sending a condition through or with one that went already."""
        rows = slice(half * batch_size, (half + 1) * batch_size)
        if isinstance(given, Condition):
            return prefill(self.transformer, given, cache, rows)
        copy_prefix(given, cache, rows)
        return given

    def _captured(
        self, graphs: Graphs, schedule: Schedule, sampler: Sampler, prompt: Given, negative: Given | None
    ) -> CapturedGeneration | None:
        """Return a generation by graphs; None if it has to run eagerly: the first of its kind, or while another one runs."""
        if not isinstance(sampler, PhiloxSampler) or isinstance(prompt, Prefix) or isinstance(negative, Prefix):
            return None
        negative = negative if schedule.guided else None
        rows = sampler.batch_size * (2 if schedule.guided else 1)
        cache_key = self._cache_key(schedule, rows)

        def capture(recorder: Recorder) -> CapturedGeneration:
            cache = graphs.cache(cache_key, self._allocate)
            known = self.unconditional() if schedule.guided and negative is None else None

            def begin(own: PhiloxSampler, prompt: Condition, negative: Condition | None) -> GenerationState:
                given = [prompt, known if negative is None else negative] if schedule.guided else [prompt]
                chosen = [self._fill(cache, half, own.batch_size, one) for half, one in enumerate(given) if one is not None]
                return GenerationState(self.transformer, self.quantizer, schedule, own, chosen, cache)

            return CapturedGeneration(recorder, begin, sampler, prompt, negative)

        vocab_size = len(self.quantizer.codebook.weight)
        key = PlanKey.of(schedule, vocab_size, cache_key, shapes_of(prompt), shapes_of(negative))
        plan = graphs.take(key, nn.ModuleList([self.transformer, self.quantizer]), capture)
        if plan is not None:
            plan.restart(sampler, prompt, negative, graphs.release)
        return plan

    def run_scale(self, states: Sequence[Generation], stage: Stage) -> None:
        """Advance every generation by one scale."""
        for state in states:
            state.advance(stage)

    def unconditional(self) -> Prefix:
        """Return the prefix of the unconditional condition, computed anew only after weights or settings have changed."""
        kept = self._unconditional
        if kept is None or not kept[0].fits(self.transformer):
            stamp = Stamp(self.transformer)
            kept = self._unconditional = (stamp, prefill_alone(self.transformer, self.transformer.unconditional()))
        return kept[1]

    def clear(self) -> None:
        """Free what is kept."""
        self._unconditional = None
        if self.graphs is not None:
            self.graphs.clear()

    def _cache_key(self, schedule: Schedule, rows: int) -> CacheKey:
        network = self.transformer
        return CacheKey(
            depth=network.depth,
            rows=rows,
            num_heads=network.num_heads,
            head_dim=network.head_dim,
            length=schedule.cached_length,
            scratch_length=schedule.scratch_length,
            dtype=network.dtype,
            device=network.device,
            is_inference=torch.is_inference_mode_enabled(),
        )

    def _allocate(self, key: CacheKey) -> KVCache:
        return new_cache(self.transformer, rows=key.rows, length=key.length, scratch_length=key.scratch_length)

"""Execute next-scale models: allocate key/value caches, and keep the unconditional prefix, which calls share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
        prompts: Sequence[Condition],
        negatives: Sequence[Condition] | None = None,
        edit: Edit = as_drawn,
        *,
        side_by_side: bool = False,
    ) -> Iterator[Generation]:
        """Yield one generation per sampler, its conditions prefilled: each is begun when it is asked for.

        `negatives` replace the unconditional condition; `edit` is applied to every scale. Conditions are shared out over the
        samplers in order: the number of samplers is a multiple of that of `prompts`, and of `negatives`. One that several
        samplers have is prefilled once and kept until the next one's turn; by graphs each generation does it anew. Of those
        that are to run `side_by_side` none is by graphs, unless it is alone.
        """
        halves, count = (prompts, negatives) if schedule.guided else (prompts,), len(samplers)
        graphs = self.graphs if edit is as_drawn and (count == 1 or not side_by_side) else None
        kept: dict[int, tuple[Condition, Prefix]] = {}  # by guidance half

        def known(half: int, condition: Condition | None) -> Prefix | None:
            if condition is None:
                return self.unconditional()
            if len(halves[half] or ()) == count:  # no other sampler has it
                return None
            if half not in kept or kept[half][0] is not condition:
                kept[half] = (condition, prefill_alone(self.transformer, condition))
            return kept[half][1]

        for index, sampler in enumerate(samplers):
            given = [half[index * len(half) // count] if half else None for half in halves]
            captured = self._captured(graphs, schedule, sampler, given) if graphs is not None else None
            yield captured or self._begun(schedule, sampler, [(one, known(half, one)) for half, one in enumerate(given)], edit)

    def _begun(
        self,
        schedule: Schedule,
        sampler: Sampler,
        given: Sequence[tuple[Condition | None, Prefix | None]],
        edit: Edit = as_drawn,
        cache: KVCache | None = None,
    ) -> GenerationState:
        """Begin a generation with a condition, or a prefix that is known, of each guidance half."""
        batch_size = sampler.batch_size
        cache = self._allocate(self._cache_key(schedule, batch_size * len(given))) if cache is None else cache
        chosen = []
        for half, (condition, prefix) in enumerate(given):
            rows = slice(half * batch_size, (half + 1) * batch_size)
            if prefix is not None:
                copy_prefix(prefix, cache, rows)
            else:
                assert condition is not None
                prefix = prefill(self.transformer, condition, cache, rows)
            chosen.append(prefix)
        return GenerationState(self.transformer, self.quantizer, schedule, sampler, chosen, cache, edit)

    def _captured(
        self, graphs: Graphs, schedule: Schedule, sampler: Sampler, given: Sequence[Condition | None]
    ) -> CapturedGeneration | None:
        """Return a generation by graphs; None if it has to run eagerly: the first of its kind, or while another one runs."""
        if not isinstance(sampler, PhiloxSampler):
            return None
        prompt, negative = given[0], given[1] if len(given) > 1 else None
        assert prompt is not None
        cache_key = self._cache_key(schedule, sampler.batch_size * len(given))

        def capture(recorder: Recorder) -> CapturedGeneration:
            cache = graphs.cache(cache_key, self._allocate)
            known = self.unconditional() if schedule.guided and negative is None else None

            def begin(own: PhiloxSampler, prompt: Condition, negative: Condition | None) -> GenerationState:
                return self._begun(schedule, own, [(prompt, None), (negative, known)][: len(given)], cache=cache)

            return CapturedGeneration(recorder, begin, sampler, prompt, negative)

        vocab_size = len(self.quantizer.codebook.weight)
        key = PlanKey.of(schedule, vocab_size, cache_key, shapes_of(prompt), shapes_of(negative))
        plan = graphs.take(key, nn.ModuleList([self.transformer, self.quantizer]), capture)
        if plan is not None:
            try:
                plan.restart(sampler, prompt, negative, graphs.release)
            except BaseException:
                plan.drop_cache()
                raise
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

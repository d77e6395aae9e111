"""Runs next-scale models: owns key/value caches and the unconditional prefix, which calls share."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from ..generation.next_scale import (
    GenerationState,
    Prefix,
    copy_prefix,
    new_cache,
    prefill,
    prefill_alone,
    run_scale,
)
from ..generation.sampling import Sampler
from ..generation.schedule import Schedule, Stage
from ..models.next_scale import Condition, NextScaleTransformer
from ..models.parts.cache import KVCache
from ..models.parts.layers import weights_key
from ..models.parts.quantizer import Quantizer

TransformerT = TypeVar("TransformerT", bound=NextScaleTransformer)
KEEPS_CACHES = ("cuda",)  # kept for the next call where memory is the device's own; main memory goes back to the system


@dataclass(frozen=True)
class CacheKey:
    """All that a cache depends on."""

    rows: int
    length: int
    scratch_length: int
    dtype: torch.dtype
    device: torch.device


class Engine(Generic[TransformerT]):
    """Executes one model, eagerly. Threads may share it: a call changes nothing that another one reads."""

    def __init__(self, transformer: TransformerT, quantizer: Quantizer) -> None:
        self.transformer, self.quantizer = transformer, quantizer
        self._lock = threading.Lock()
        self._idle: tuple[CacheKey, KVCache] | None = None
        self._unconditional: tuple[object, Prefix] | None = None

    def start(
        self,
        schedule: Schedule,
        samplers: Sequence[Sampler],
        prompts: Sequence[Condition],
        negatives: Sequence[Condition] | None = None,
    ) -> list[GenerationState]:
        """One state for each sampler, its images' conditions in the cache.

        `prompts`, and `negatives` in place of the unconditional row, serve equally many states each, in turn.
        """
        prefixes: dict[tuple[int, int], Prefix] = {}  # by half and condition: where its keys and values are already
        states = []
        for index, sampler in enumerate(samplers):
            batch_size = sampler.batch_size
            cache = self._borrow(schedule, batch_size * (2 if schedule.guided else 1))
            chosen = []
            for half, conditions in enumerate((prompts, negatives) if schedule.guided else (prompts,)):
                rows = slice(half * batch_size, (half + 1) * batch_size)
                if conditions is None:
                    chosen.append(self.unconditional())
                    copy_prefix(chosen[-1], cache, rows)
                    continue
                key = (half, index * len(conditions) // len(samplers))
                if key in prefixes:
                    copy_prefix(prefixes[key], cache, rows)
                else:
                    prefixes[key] = prefill(self.transformer, conditions[key[1]], cache, rows)
                chosen.append(prefixes[key])
            states.append(GenerationState(self.transformer, self.quantizer, schedule, sampler, chosen, cache, self))
        return states

    def run_scale(self, states: Sequence[GenerationState], stage: Stage) -> None:
        """Advance every state by one scale."""
        for state in states:
            run_scale(state, stage)

    def unconditional(self) -> Prefix:
        """The prefix of the unconditional row, encoded once for each state of the weights."""
        key = (self.transformer.device, self.transformer.dtype, weights_key(self.transformer))
        kept = self._unconditional
        if kept is None or kept[0] != key:
            kept = self._unconditional = (key, prefill_alone(self.transformer, self.transformer.unconditional()))
        return kept[1]

    def give_back(self, cache: KVCache) -> None:
        """Take a cache that a state has no more use for; keep the last one where the device's memory allows."""
        if cache.keys.device.type in KEEPS_CACHES:
            with self._lock:
                self._idle = (_key(cache), cache)

    def clear(self) -> None:
        """Forget what is kept."""
        with self._lock:
            self._idle = self._unconditional = None

    def _borrow(self, schedule: Schedule, rows: int) -> KVCache:
        wanted = CacheKey(
            rows, schedule.cached_length, schedule.scratch_length, self.transformer.dtype, self.transformer.device
        )
        with self._lock:
            idle, self._idle = self._idle, None
        if idle is not None and idle[0] == wanted:
            return idle[1]
        return new_cache(self.transformer, rows=rows, length=wanted.length, scratch_length=wanted.scratch_length)


def _key(cache: KVCache) -> CacheKey:
    _, rows, _, length, _ = cache.keys.shape
    return CacheKey(rows, length, cache.scratch.shape[3], cache.keys.dtype, cache.keys.device)

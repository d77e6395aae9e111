"""Execute next-scale models: own the key/value caches and the unconditional prefix, which calls share."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from ..generation.next_scale import (
    Edit,
    GenerationState,
    Prefix,
    as_drawn,
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
from ..models.parts.layers import WeightsStamp
from ..models.parts.quantizer import Quantizer

TransformerT = TypeVar("TransformerT", bound=NextScaleTransformer)


@dataclass(frozen=True)
class CacheKey:
    """Shapes, dtype and device of a cache: equal keys mean interchangeable caches."""

    depth: int
    rows: int
    num_heads: int
    head_dim: int
    length: int
    scratch_length: int
    dtype: torch.dtype
    device: torch.device
    is_inference: bool  # made under torch.inference_mode, outside of which it can't be written


class Engine(Generic[TransformerT]):
    """Executes one model, eagerly. Threads may share it: a call changes nothing that another one reads.

    `keep_buffers`: keep the last call's key/value cache for the next one of the same key. It then takes memory during the
    diffusion and the decoding too; PyTorch's allocator on CUDA gives a freed block back as fast.
    """

    def __init__(self, transformer: TransformerT, quantizer: Quantizer, *, keep_buffers: bool = False) -> None:
        self.transformer, self.quantizer, self.keep_buffers = transformer, quantizer, keep_buffers
        self._lock = threading.Lock()
        self._idle: tuple[CacheKey, KVCache] | None = None
        self._unconditional: tuple[WeightsStamp, Prefix] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is kept and the lock, for copies and pickles."""
        return self.__dict__ | {"_lock": None, "_idle": None, "_unconditional": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make a lock of its own."""
        self.__dict__.update(state, _lock=threading.Lock())

    def start(
        self,
        schedule: Schedule,
        samplers: Sequence[Sampler],
        prompts: Sequence[Condition],
        negatives: Sequence[Condition] | None = None,
        edit: Edit = as_drawn,
    ) -> list[GenerationState]:
        """Return one state per sampler, its conditions prefilled.

        `negatives` replace the unconditional condition; `edit` is applied to every scale. Conditions are shared out over the
        samplers in order: the number of samplers is a multiple of that of `prompts`, and of `negatives`.
        """
        prefixes: dict[tuple[int, int], Prefix] = {}  # by guidance half and index of the condition
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
            states.append(GenerationState(self.transformer, self.quantizer, schedule, sampler, chosen, cache, self, edit))
        return states

    def run_scale(self, states: Sequence[GenerationState], stage: Stage) -> None:
        """Advance every state by one scale."""
        for state in states:
            run_scale(state, stage)

    def unconditional(self) -> Prefix:
        """Return the prefix of the unconditional condition, computed anew only after the weights have changed."""
        kept = self._unconditional
        if kept is None or not kept[0].fits(self.transformer):
            stamp = WeightsStamp(self.transformer)
            kept = self._unconditional = (stamp, prefill_alone(self.transformer, self.transformer.unconditional()))
        return kept[1]

    def give_back(self, cache: KVCache) -> None:
        """Take a cache back from a state that has ended; keep it if `keep_buffers`."""
        if self.keep_buffers:
            with self._lock:
                self._idle = (_key(cache), cache)

    def clear(self) -> None:
        """Free what is kept."""
        with self._lock:
            self._idle = self._unconditional = None

    def _borrow(self, schedule: Schedule, rows: int) -> KVCache:
        network = self.transformer
        wanted = CacheKey(
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
        with self._lock:
            idle, self._idle = self._idle, None
        if idle is not None and idle[0] == wanted:
            return idle[1]
        idle = None  # freed before the new one is allocated
        return new_cache(network, rows=rows, length=wanted.length, scratch_length=wanted.scratch_length)


def _key(cache: KVCache) -> CacheKey:
    depth, rows, num_heads, length, head_dim = cache.keys.shape
    return CacheKey(
        depth=depth,
        rows=rows,
        num_heads=num_heads,
        head_dim=head_dim,
        length=length,
        scratch_length=cache.scratch.shape[3],
        dtype=cache.keys.dtype,
        device=cache.keys.device,
        is_inference=cache.keys.is_inference(),
    )

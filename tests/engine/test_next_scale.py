"""The engine: what it keeps between calls, what it shares within one, and what it never shares."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hart_infer import HartPipeline
from hart_infer.engine import next_scale
from hart_infer.engine.next_scale import Engine
from hart_infer.generation.next_scale import GenerationState, Prefix
from hart_infer.generation.sampling import GeneratorSampler
from hart_infer.generation.schedule import Schedule, Settings
from hart_infer.models.parts.cache import KVCache
from tests.generation.test_next_scale import condition_of


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def engine(pipe: HartPipeline) -> Engine:
    return Engine(pipe.transformer, pipe.autoencoder.quantizer)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[KVCache]:
    """Every cache that engines allocate."""
    caches: list[KVCache] = []
    allocate = next_scale.new_cache

    def spy(*args: Any, **kwargs: Any) -> KVCache:
        caches.append(allocate(*args, **kwargs))
        return caches[-1]

    monkeypatch.setattr(next_scale, "new_cache", spy)
    return caches


def start(pipe: HartPipeline, engine: Engine, schedule: Schedule, count: int = 1) -> list[GenerationState]:
    samplers = [GeneratorSampler([seed]) for seed in range(count)]
    return list(engine.start(schedule, samplers, [condition_of(pipe, "a cat")]))


def prefilled(pipe: HartPipeline, engine: Engine, schedule: Schedule, count: int) -> int:
    """How many times the transformer runs before the first scale."""
    calls: list[int] = []
    hook = pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    start(pipe, engine, schedule, count)
    hook.remove()
    return len(calls)


def test_the_unconditional_prefix_is_made_once_and_a_prompt_s_once_a_call(pipe: HartPipeline, engine: Engine) -> None:
    schedule = pipe._schedule(Settings())
    assert prefilled(pipe, engine, schedule, count=3) == 2
    assert prefilled(pipe, engine, schedule, count=3) == 1
    assert prefilled(pipe, engine, pipe._schedule(Settings(guidance_scale=0)), count=2) == 1
    engine.clear()
    assert prefilled(pipe, engine, schedule, count=1) == 2


def test_a_prompt_s_prefix_is_kept_until_the_next_one_s_turn(
    pipe: HartPipeline, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[weakref.ref[Prefix]] = []
    prefill_alone = next_scale.prefill_alone

    def spy(*args: Any) -> Prefix:
        prefix = prefill_alone(*args)
        seen.append(weakref.ref(prefix))
        return prefix

    monkeypatch.setattr(next_scale, "prefill_alone", spy)
    conditions = [condition_of(pipe, prompt) for prompt in ("a", "b", "c")]
    samplers = [GeneratorSampler([seed]) for seed in range(6)]
    started = engine.start(pipe._schedule(Settings(guidance_scale=0)), samplers, conditions)
    alive = [(len(seen), sum(prefix() is not None for prefix in seen)) for _ in started]
    assert alive == [(1, 1), (1, 1), (2, 1), (2, 1), (3, 1), (3, 1)]


def test_what_failed_keeps_no_cache(pipe: HartPipeline, engine: Engine, made: list[KVCache]) -> None:
    """An error's traceback, which a notebook keeps, would keep it too."""
    schedule = pipe._schedule(Settings())
    state = start(pipe, engine, schedule)[0]
    memory = weakref.ref(made[0].keys)
    made.clear()
    state.drop_cache()
    assert memory() is None

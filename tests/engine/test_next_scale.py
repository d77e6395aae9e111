"""The engine: what it keeps between calls, what it shares within one, and what it never shares."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hart_infer import HartPipeline
from hart_infer.engine import next_scale
from hart_infer.engine.next_scale import Engine
from hart_infer.generation.next_scale import GenerationState, finish
from hart_infer.generation.sampling import GeneratorSampler
from hart_infer.generation.schedule import Schedule, Settings, placed
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
def keeping(pipe: HartPipeline) -> Engine:
    return Engine(pipe.transformer, pipe.autoencoder.quantizer, keep_buffers=True)


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
    return engine.start(schedule, samplers, [condition_of(pipe, "a cat")])


def run(pipe: HartPipeline, engine: Engine, schedule: Schedule) -> Tensor:
    """The latent of one image."""
    states = start(pipe, engine, schedule)
    for stage in schedule:
        engine.run_scale(states, stage)
    return finish(states[0])


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


def test_a_cache_is_used_again_and_leaves_no_trace(pipe: HartPipeline, keeping: Engine, made: list[KVCache]) -> None:
    schedule = pipe._schedule(Settings())
    latent = run(pipe, keeping, schedule)
    for memory in (made[0].keys, made[0].values, made[0].scratch):
        memory.fill_(torch.nan)
    assert torch.equal(run(pipe, keeping, schedule), latent)
    assert len(made) == 1


def test_no_cache_is_kept_unless_asked(pipe: HartPipeline, engine: Engine, made: list[KVCache]) -> None:
    for _ in range(2):
        run(pipe, engine, pipe._schedule(Settings()))
    assert len(made) == 2


def test_two_calls_at_once_have_a_cache_each(pipe: HartPipeline, keeping: Engine) -> None:
    schedule = pipe._schedule(Settings())
    run(pipe, keeping, schedule)
    first, second = start(pipe, keeping, schedule)[0], start(pipe, keeping, schedule)[0]
    assert first.cache.keys.data_ptr() != second.cache.keys.data_ptr()


@pytest.mark.parametrize("what", ["rows", "length", "scratch"])
def test_a_cache_of_another_kind_is_not_taken(pipe: HartPipeline, keeping: Engine, made: list[KVCache], what: str) -> None:
    schedule = pipe._schedule(Settings())
    run(pipe, keeping, schedule)
    changed = {
        "rows": pipe._schedule(Settings(guidance_scale=0)),
        "length": placed([replace(stage, cached=stage.index not in (2, 5)) for stage in schedule], schedule.latent_side),
        "scratch": placed([replace(stage, cached=True) for stage in schedule], schedule.latent_side),
    }[what]
    run(pipe, keeping, changed)
    assert len(made) == 2


def test_a_cache_of_inference_mode_is_not_taken_outside(pipe: HartPipeline, keeping: Engine) -> None:
    run(pipe, keeping, pipe._schedule(Settings()))
    with torch.inference_mode(False), torch.no_grad():
        latent = run(pipe, keeping, pipe._schedule(Settings()))
    assert not latent.is_inference()


def test_a_cache_of_a_shallower_network_is_not_taken(pipe: HartPipeline, keeping: Engine) -> None:
    schedule = pipe._schedule(Settings())
    run(pipe, keeping, schedule)
    deeper = copy.deepcopy(pipe.transformer)
    deeper.depth += 1
    keeping.transformer = deeper
    assert keeping._borrow(schedule, 2).keys.shape[0] == deeper.depth


def test_what_failed_keeps_no_cache(pipe: HartPipeline, keeping: Engine, made: list[KVCache]) -> None:
    """An error's traceback, which a notebook keeps, would keep it too."""
    schedule = pipe._schedule(Settings())
    state = start(pipe, keeping, schedule)[0]
    memory = weakref.ref(made[0].keys)
    made.clear()
    state.drop_cache()
    assert memory() is None

"""The loop, stepped: what a scale reads, what it adds, and what a field of its stage changes."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hart_infer import HartPipeline
from hart_infer.generation.next_scale import GenerationState, finish, new_cache, prefill, prefill_alone, run_scale
from hart_infer.generation.sampling import GeneratorSampler
from hart_infer.generation.schedule import Schedule, Settings, placed
from hart_infer.models.next_scale import Condition


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def schedule_of(pipe: HartPipeline, **settings: object) -> Schedule:
    return pipe._schedule(Settings(**{"more_smooth": False, **settings}))


def condition_of(pipe: HartPipeline, prompt: str) -> Condition:
    embeds = pipe.encode_prompt(prompt)
    return pipe.transformer.condition(embeds.context, embeds.mask, embeds.position_ids)


def start(pipe: HartPipeline, schedule: Schedule, seeds: tuple[int, ...] = (0,)) -> GenerationState:
    """A state of one image per seed, all of one prompt, with guidance where the schedule has it."""
    rows = len(seeds) * (2 if schedule.guided else 1)
    transformer = pipe.transformer
    cache = new_cache(transformer, rows=rows, length=schedule.cached_length, scratch_length=schedule.scratch_length)
    prefixes = [prefill(transformer, condition_of(pipe, "a cat"), cache, slice(0, len(seeds)))]
    if schedule.guided:
        prefixes.append(prefill(transformer, transformer.unconditional(), cache, slice(len(seeds), rows)))
    sampler = GeneratorSampler(seeds)
    return GenerationState(transformer, pipe.autoencoder.quantizer, schedule, sampler, prefixes, cache)


def run(pipe: HartPipeline, schedule: Schedule, seeds: tuple[int, ...] = (0,)) -> tuple[Tensor, list[Tensor]]:
    """The latent and each scale's codes."""
    state = start(pipe, schedule, seeds)
    for stage in schedule:
        run_scale(state, stage)
    return finish(state), state.indices


def changed(schedule: Schedule, index: int, **fields: object) -> Schedule:
    """The schedule with some fields of one stage changed."""
    stages = [replace(stage, **fields) if stage.index == index else stage for stage in schedule]
    return placed(stages, schedule.latent_side)


def test_a_run_by_hand_is_the_pipeline_s(pipe: HartPipeline) -> None:
    latent, _ = run(pipe, schedule_of(pipe), seeds=(3,))
    assert torch.equal(latent, pipe("a cat", seed=3, more_smooth=False, output_type="latent").images)


def test_each_scale_adds_its_codes_and_changes_f_hat(pipe: HartPipeline) -> None:
    schedule = schedule_of(pipe)
    state, before = start(pipe, schedule), torch.zeros(())
    for count, stage in enumerate(schedule, 1):
        run_scale(state, stage)
        assert len(state.indices) == count
        assert state.indices[-1].shape == (1, stage.tokens)
        assert not torch.equal(state.f_hat, before)
        before = state.f_hat.clone()


def test_the_cache_is_freed_before_the_last_scale_draws(pipe: HartPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = schedule_of(pipe)
    state = start(pipe, schedule)
    keys, freed, draw = weakref.ref(state.cache.keys), [], state.sampler.draw

    def look(*args: Any) -> Any:
        freed.append(keys() is None)
        return draw(*args)

    monkeypatch.setattr(state.sampler, "draw", look)
    for stage in schedule:
        run_scale(state, stage)
    assert freed == [False] * 5 + [True]


def test_a_run_that_stops_early_frees_the_cache_too(pipe: HartPipeline) -> None:
    schedule = schedule_of(pipe)
    state = start(pipe, schedule)
    keys = weakref.ref(state.cache.keys)
    for stage in schedule.stages[:3]:
        run_scale(state, stage)
    assert finish(state).isfinite().all()
    assert keys() is None


def test_whether_the_last_scale_is_cached_changes_no_number(pipe: HartPipeline) -> None:
    schedule = schedule_of(pipe)
    cached = changed(schedule, len(schedule) - 1, cached=True)
    assert (cached.cached_length, cached.scratch_length) == (schedule.scratch_length, 0)
    assert torch.equal(run(pipe, cached)[0], run(pipe, schedule)[0])


@pytest.mark.parametrize("index", [1, 3])
def test_a_scale_that_is_not_cached_is_seen_by_no_later_one(pipe: HartPipeline, index: int) -> None:
    """Wrong keys of its own change nothing later: only what it drew does."""
    schedule = changed(schedule_of(pipe), index, cached=False)

    def latent(spoil: bool) -> Tensor:
        state = start(pipe, schedule)
        for stage in schedule:
            run_scale(state, stage)
            if spoil and stage.index == index:
                state.cache.scratch.fill_(torch.nan)
                state.cache.keys[:, :, :, stage.offset :].fill_(torch.nan)
        return finish(state)

    assert torch.equal(latent(spoil=True), latent(spoil=False))
    assert not torch.equal(latent(spoil=False), run(pipe, schedule_of(pipe))[0])


@pytest.mark.parametrize("index", [2, 5])
def test_a_scale_without_guidance_runs_the_conditional_half(pipe: HartPipeline, index: int) -> None:
    schedule = changed(schedule_of(pipe), index, guided=False)
    rows: list[int] = []
    hook = pipe.transformer.register_forward_pre_hook(lambda _module, args: rows.append(len(args[0])))
    state = start(pipe, schedule)
    rows.clear()
    for stage in schedule.stages[: index + 1]:  # a later guided one would find no unconditional keys of this one
        run_scale(state, stage)
    hook.remove()
    assert rows == [1 if stage.index == index else 2 for stage in schedule.stages[1 : index + 1]]


@pytest.mark.parametrize("index", [0, 4])
def test_a_scale_that_is_not_refined_adds_its_codes_as_they_are(pipe: HartPipeline, index: int) -> None:
    schedule = changed(schedule_of(pipe), index, phi=None)
    state = start(pipe, schedule)
    for stage in schedule.stages[: index + 1]:
        before = state.f_hat.clone()
        run_scale(state, stage)
    codes = pipe.autoencoder.quantizer.codebook.weight[state.indices[-1]].transpose(1, 2)
    grid = codes.unflatten(2, (stage.side, stage.side))
    expected = pipe.autoencoder.quantizer.contribution(grid, None)
    torch.testing.assert_close(state.f_hat - before, expected, rtol=1e-5, atol=1e-5)


def test_images_of_a_state_are_those_of_states_of_their_own(pipe: HartPipeline) -> None:
    """The same codes; the latents differ by rounding."""
    together, codes = run(pipe, schedule_of(pipe), seeds=(1, 2, 3))
    for i, seed in enumerate((1, 2, 3)):
        alone, own_codes = run(pipe, schedule_of(pipe), seeds=(seed,))
        assert all(torch.equal(a[i], b[0]) for a, b in zip(codes, own_codes, strict=True))
        torch.testing.assert_close(together[i], alone[0], rtol=1e-4, atol=1e-4)


def test_a_prefix_alone_is_the_one_in_a_cache(pipe: HartPipeline, text_tiny: Path) -> None:
    condition = condition_of(pipe, "a cat")
    length = condition.inputs.shape[1]
    cache = new_cache(pipe.transformer, rows=3, length=length + 5)
    prefix, alone = prefill(pipe.transformer, condition, cache, slice(0, 3)), prefill_alone(pipe.transformer, condition)
    assert torch.equal(prefix.hidden_states, alone.hidden_states)
    for kept, other in ((cache.keys, alone.keys), (cache.values, alone.values)):
        assert torch.equal(kept[:, :, :, :length], other.expand(-1, 3, -1, -1, -1))

"""Fast modes in the loop: what each knob leaves alone, bit for bit, and what it changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hart_infer import HartPipeline, VarPipeline
from hart_infer.engine.next_scale import Engine
from hart_infer.generation import sampling
from hart_infer.generation.fast import apply, prune, set_inference_steps, stop_after, stop_guidance
from hart_infer.generation.next_scale import GenerationState, finish
from hart_infer.generation.pruning import Pruned, PrunedOnce
from hart_infer.generation.sampling import GeneratorSampler
from hart_infer.generation.schedule import Schedule, Settings, hart_schedule, var_schedule
from hart_infer.generation.speed import SPEEDS, Knobs, Prune
from hart_infer.models.next_scale import Condition
from tests.generation.test_next_scale import condition_of

RELEASED = (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)
DEPTH = 24


@dataclass(frozen=True)
class Model:
    """One family's model and its exact schedule."""

    engine: Engine[Any]
    schedule: Schedule
    condition: Condition

    @property
    def sides(self) -> tuple[int, ...]:
        return tuple(stage.side for stage in self.schedule)

    def knobs(self, **given: Any) -> Knobs:
        """Knobs as a call makes them, `prune` completed."""
        how = given.pop("prune", None)
        return Knobs(prune=how.on(self.sides, self.engine.transformer.depth) if how else None, **given)

    def start(self, schedule: Schedule, seeds: tuple[int, ...] = (0,)) -> GenerationState:
        return next(self.engine.start(schedule, [GeneratorSampler(seeds)], [self.condition]))

    def run(self, schedule: Schedule, seeds: tuple[int, ...] = (0,)) -> tuple[Tensor, list[Tensor]]:
        """The latent and each scale's codes."""
        state = self.start(schedule, seeds)
        for stage in schedule:
            self.engine.run_scale([state], stage)
        return finish(state), state.indices


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def var(whole_var_tiny: Path) -> VarPipeline:
    return VarPipeline.from_pretrained(whole_var_tiny, device="cpu")


@pytest.fixture(params=["HART", "VAR"])
def model(request: pytest.FixtureRequest, pipe: HartPipeline, var: VarPipeline) -> Model:
    if request.param == "HART":
        engine: Engine[Any] = Engine(pipe.transformer, pipe.autoencoder.quantizer)
        return Model(engine, pipe._schedule(Settings(more_smooth=False)), condition_of(pipe, "a cat"))
    config, settings = var.transformer.config, Settings(num_inference_steps=0, more_smooth=False, top_p=0.95)
    schedule = var_schedule(config.patch_nums, share_quant_resi=var.autoencoder.config.share_quant_resi, settings=settings)
    engine = Engine(var.transformer, var.autoencoder.quantizer)
    return Model(engine, schedule, var.transformer.condition(torch.tensor([3])))


def same(a: tuple[Tensor, list[Tensor]], b: tuple[Tensor, list[Tensor]]) -> bool:
    """Whether two runs have the same latents, bit for bit, and the same codes."""
    return torch.equal(a[0], b[0]) and all(map(torch.equal, a[1], b[1]))


# What leaves the numbers alone.


@pytest.mark.parametrize("once", [False, True])
def test_pruning_nothing_is_exact_bit_for_bit(model: Model, once: bool) -> None:
    pruned = apply(model.knobs(prune=Prune(drop=(0, 0.0), once=once)), model.schedule)
    assert [type(stage.run).__name__ for stage in pruned][-3:] == (
        ["RememberOnce", "PrunedOnce", "PrunedOnce"] if once else ["Remember", "Pruned", "Pruned"]
    )
    for seeds in ((3,), (4, 5)):
        assert same(model.run(pruned, seeds), model.run(model.schedule, seeds))


def test_without_guidance_there_is_none_to_stop(model: Model) -> None:
    unguided = stop_guidance(model.schedule, 1, 1.0)
    assert not unguided.guided
    assert stop_guidance(unguided, model.sides[-1], 0.5) == unguided


@pytest.mark.parametrize("left_out", [1, 3])
def test_stopping_gives_what_exact_has_so_far(model: Model, left_out: int) -> None:
    stopped = stop_after(model.schedule, model.sides[-1 - left_out])
    state = model.start(model.schedule, (3,))
    for stage in model.schedule.stages[:-left_out]:
        model.engine.run_scale([state], stage)
    latent, codes = model.run(stopped, (3,))
    assert torch.equal(latent, state.f_hat)
    assert all(map(torch.equal, codes, state.indices))
    assert latent.shape[-1] == model.sides[-1]


@pytest.mark.parametrize("speed", [name for name in SPEEDS if name != "exact"])
def test_scales_before_the_first_changed_one_draw_the_same_codes(
    model: Model, speed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hart_infer.generation.speed.FINE", 4)
    knobs = replace(SPEEDS[speed].knobs(model.sides), late_temperature=0.7)
    assert knobs.prune is not None and knobs.prune.at is not None and knobs.guidance_stops_at is not None
    fast = apply(replace(knobs, prune=knobs.prune.on(model.sides, model.engine.transformer.depth)), model.schedule)
    changed = model.sides.index(min(knobs.guidance_stops_at, *knobs.prune.at))
    (_, codes), (_, exact) = model.run(fast), model.run(model.schedule)
    assert changed > 1
    assert all(map(torch.equal, codes[:changed], exact[:changed]))
    assert not all(map(torch.equal, codes[changed:], exact[changed:]))


@pytest.mark.parametrize("more_smooth", [False, True])
def test_random_numbers_are_those_of_exact(model: Model, monkeypatch: pytest.MonkeyPatch, more_smooth: bool) -> None:
    """Of the codes, the mixtures and the residual: with every knob but those that leave draws out at the end."""
    smooth = replace(model.schedule, stages=tuple(replace(stage, more_smooth=more_smooth) for stage in model.schedule))
    drawn: list[Tensor] = []

    def recorded(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def draw(*args: Any, **kwargs: Any) -> Tensor:
            result = function(*args, **kwargs)
            drawn.append(result.clone())
            return result

        return draw

    monkeypatch.setattr(sampling, "_exponential", recorded(sampling._exponential))
    monkeypatch.setattr(sampling.torch, "randn", recorded(torch.randn))

    def numbers(schedule: Schedule) -> list[Tensor]:
        drawn.clear()
        model.run(schedule, (3, 4))
        return list(drawn)

    exact = numbers(smooth)
    fast = numbers(apply(model.knobs(guidance_stops_at=model.sides[-3], late_temperature=0.5, prune=Prune()), smooth))
    assert len(fast) == len(exact) and all(map(torch.equal, fast, exact))
    draft = numbers(stop_after(smooth, model.sides[-2]))
    assert 0 < len(draft) < len(exact) and all(map(torch.equal, draft, exact))
    few = numbers(set_inference_steps(smooth, 4))
    assert all(map(torch.equal, few, exact))


# Guidance.


def test_late_scales_run_the_conditional_half_and_divide_its_logits(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first of them, where the state before is exact's; and the residual diffusion loses its guidance."""
    seen: list[tuple[Tensor, float]] = []
    draw = GeneratorSampler.draw

    def listen(self: GeneratorSampler, logits: Tensor, codebook: Tensor, stage: Any) -> tuple[Tensor, Tensor]:
        seen.append((logits.clone(), stage.guidance))
        return draw(self, logits, codebook, stage)

    monkeypatch.setattr(GeneratorSampler, "draw", listen)
    model.run(model.schedule, (3, 4))
    exact = list(seen)
    seen.clear()
    model.run(stop_guidance(model.schedule, model.sides[-2], 0.5), (3, 4))
    assert [len(logits) for logits, _ in seen[1:]] == [4] * (len(exact) - 3) + [2, 2]
    torch.testing.assert_close(seen[-2][0], exact[-2][0][:2] / 0.5, rtol=1e-4, atol=1e-4)
    assert [guidance for _, guidance in seen[-2:]] == [0, 0]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(seen[:-2], exact[:-2], strict=True))


def test_pruned_scales_without_guidance_take_the_conditional_rows_memory(model: Model) -> None:
    """G after the cached scale: rows of the other half must not be read."""
    knobs = model.knobs(guidance_stops_at=model.sides[-1], prune=Prune())
    schedule = apply(knobs, model.schedule)
    latents = []
    for spoil in (False, True):
        state = model.start(schedule)
        for stage in schedule:
            if spoil and stage.ends_cache:
                for update in state.memory.updates:
                    update[1:].fill_(torch.nan)
                state.cache.keys[:, 1:].fill_(torch.nan)
                state.cache.values[:, 1:].fill_(torch.nan)
            model.engine.run_scale([state], stage)
        latents.append(finish(state))
    assert latents[0].isfinite().all() and torch.equal(*latents)


# Pruning.


def area(grid: Tensor, side: int) -> Tensor:
    """[c, c, D] -> [side, side, D], as fast.md says it: output i averages inputs floor(c i / p) to ceil(c (i + 1) / p) - 1."""
    c = len(grid)
    spans = [(c * i // side, -(-c * (i + 1) // side)) for i in range(side)]
    rows = torch.stack([grid[a:b].mean(dim=0) for a, b in spans])
    return torch.stack([rows[:, a:b].mean(dim=1) for a, b in spans], dim=1)


def hidden_states(model: Model, schedule: Schedule) -> dict[int, list[Tensor]]:
    """Of each scale but the first: what goes into the blocks and what comes out."""
    seen: dict[int, list[Tensor]] = {}
    state = model.start(schedule)
    for stage in schedule:

        def watch(*args: Any, run: Any = stage.run, index: int = stage.index) -> Tensor:
            hidden: Tensor = run(*args)
            seen[index] = [args[1].x.clone(), hidden.clone()]
            return hidden

        model.engine.run_scale([state], replace(stage, run=watch))
    return seen


@pytest.mark.parametrize("once", [False, True])
def test_pruning_everything_adds_resized_memory_only(model: Model, once: bool) -> None:
    schedule = apply(model.knobs(prune=Prune(drop=(1, 1.0), once=once)), model.schedule)
    assert [stage.length for stage in schedule][-2:] == [0, 0]
    seen = hidden_states(model, schedule)
    last = len(schedule) - 1
    before, after = seen[last - 2]
    for index in (last - 1, last):
        for row in range(2):
            memory = (after - before)[row].unflatten(0, (model.sides[-3], -1))
            expected = seen[index][0][row] + area(memory, model.sides[index]).flatten(0, 1)
            torch.testing.assert_close(seen[index][1][row], expected, rtol=1e-4, atol=1e-4)


def positions(x: Tensor) -> Tensor:
    """A score that chooses the same tokens everywhere, spread over the grid, whatever they hold."""
    return (torch.arange(x.shape[1]) * 7919 % 1009).float().expand(len(x), -1)


def test_once_a_scale_is_every_sublayer_for_equal_choices(model: Model) -> None:
    schedules = [
        apply(model.knobs(prune=Prune(drop=(0.4, 0.7), once=once, score=positions)), model.schedule) for once in (False, True)
    ]
    assert [type(schedule.stages[-1].run) for schedule in schedules] == [Pruned, PrunedOnce]
    each, once = (hidden_states(model, schedule) for schedule in schedules)
    last = len(model.schedule) - 1
    for index in (last - 1, last):
        torch.testing.assert_close(once[index][1], each[index][1], rtol=1e-4, atol=1e-4)
        assert not torch.equal(each[index][1], hidden_states(model, model.schedule)[index][1])
    (latent, codes), (other, other_codes) = (model.run(schedule) for schedule in schedules)
    assert all(map(torch.equal, codes, other_codes))
    torch.testing.assert_close(latent, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("once", [False, True])
def test_an_image_s_choices_do_not_depend_on_its_batch(model: Model, once: bool) -> None:
    schedule = apply(model.knobs(prune=Prune(once=once), guidance_stops_at=model.sides[-1]), model.schedule)
    together, codes = model.run(schedule, (1, 2, 3))
    for i, seed in enumerate((1, 2, 3)):
        alone, own_codes = model.run(schedule, (seed,))
        assert all(torch.equal(a[i], b[0]) for a, b in zip(codes, own_codes, strict=True))
        torch.testing.assert_close(together[i], alone[0], rtol=1e-4, atol=1e-4)


def test_a_share_for_every_layer(model: Model) -> None:
    """Equal ones are one for all; layers may keep different numbers of tokens, none included."""
    depth = model.engine.transformer.depth
    plain = apply(model.knobs(prune=Prune(drop=(0.5,))), model.schedule)
    layered = apply(model.knobs(prune=Prune(drop=((0.5,) * depth,))), model.schedule)
    assert same(model.run(plain), model.run(layered))
    shares = tuple(layer / depth for layer in range(depth, 0, -1))  # from all to few
    uneven = apply(model.knobs(prune=Prune(drop=(shares,))), model.schedule)
    tokens = model.sides[-1] ** 2
    assert uneven.stages[-1].length == tokens - int(tokens / depth)
    latent, _ = model.run(uneven)
    assert latent.isfinite().all() and not torch.equal(latent, model.run(plain)[0])


def test_only_kept_tokens_enter_the_cache(model: Model) -> None:
    """The last scale sees the keys that the one before kept, at their places; nothing else of the cache is read."""
    schedule = apply(model.knobs(prune=Prune(drop=(0.5, 0.75))), model.schedule)
    before, last = schedule.stages[-2:]
    assert (before.length, last.offset) == (model.sides[-2] ** 2 - model.sides[-2] ** 2 // 2, before.offset + before.length)
    state = model.start(schedule)
    for stage in schedule.stages[:-1]:
        model.engine.run_scale([state], stage)
    keys = state.cache.keys[:, :, :, : last.offset]
    assert keys.isfinite().all() and (keys[:, :, :, before.offset :].abs().sum(dim=-1) > 0).all()


def test_the_memory_is_freed_with_the_cache(model: Model) -> None:
    schedule = apply(model.knobs(prune=Prune()), model.schedule)
    state = model.start(schedule)
    for stage in schedule.stages[:-1]:
        model.engine.run_scale([state], stage)
    assert len(state.memory.updates) == 2 * model.engine.transformer.depth
    model.engine.run_scale([state], schedule.stages[-1])
    assert not state.memory.updates
    failed = model.start(schedule)
    failed.memory.updates.append(torch.zeros(1))
    failed.drop_cache()
    assert not failed.memory.updates


# Schedules.


@pytest.fixture
def released() -> Schedule:
    return hart_schedule(RELEASED, context_tokens=300, share_quant_resi=4)


def completed(speed: str) -> Knobs:
    knobs = SPEEDS[speed].knobs(RELEASED)
    return replace(knobs, prune=knobs.prune and knobs.prune.on(RELEASED, DEPTH), late_temperature=0.6)


@pytest.mark.parametrize(
    ("speed", "unguided", "lengths", "steps"),
    [
        ("exact", [], [1296, 2304, 4096], 8),
        ("fast", [64], [1296, 1152, 1024], 8),
        ("turbo", [36, 48, 64], [1296, 1152, 1024], 4),
        ("draft", [36, 48], [1296, 1152], 0),
    ],
)
def test_named_modes_on_the_released_scales(
    released: Schedule, speed: str, unguided: list[int], lengths: list[int], steps: int
) -> None:
    schedule = apply(completed(speed), released)
    late = schedule.stages[11:]
    assert [stage.side for stage in schedule.stages[1:] if not stage.guided] == unguided
    assert {stage.side for stage in schedule if stage.logit_temperature == 0.6} == set(unguided)
    assert [stage.length for stage in late] == lengths
    assert schedule.stages[-1].num_inference_steps == steps
    assert schedule.stages[:11] == released.stages[:11]
    if speed == "exact":
        assert schedule == released


def test_keys_that_the_last_pruned_scale_sees(released: Schedule) -> None:
    """300 of the context, 3050 of the scales to 36, 1152 of 48 and its own 1024, where exact has 9750."""
    last = apply(completed("fast"), released).stages[-1]
    assert last.offset + last.length == 300 + 3050 + 1152 + 1024 == 5526
    assert released.stages[-1].offset + released.stages[-1].length == 9750


def test_bytes_of_the_memory(released: Schedule) -> None:
    """382 MB in bf16 for both halves of one image, as fast.md counts; one vector a token with `once`."""
    schedule = apply(completed("fast"), released)
    assert schedule.remembered_vectors(DEPTH) * 2 * 1536 * 2 == pytest.approx(382e6, rel=1e-3)
    once = prune(released, Prune(once=True).on(RELEASED, DEPTH))
    assert once.remembered_vectors(DEPTH) == 36 * 36
    assert released.remembered_vectors(DEPTH) == 0


def test_maps_commute(released: Schedule) -> None:
    how = Prune().on(RELEASED, DEPTH)
    pruned_first = stop_guidance(prune(released, how), 48, 0.5)
    assert pruned_first == prune(stop_guidance(released, 48, 0.5), how)
    assert stop_after(pruned_first, 48).stages[-1] == prune(stop_guidance(stop_after(released, 48), 48, 0.5), how).stages[-1]


def test_a_schedule_that_stops_before_all_that_prunes_remembers_nothing(released: Schedule) -> None:
    assert apply(replace(completed("fast"), stop_after=36, guidance_stops_at=None), released) == stop_after(released, 36)


def test_steps_are_set_where_there_are_any(released: Schedule) -> None:
    assert [stage.num_inference_steps for stage in set_inference_steps(released, 4)] == [0] * 13 + [4]
    without = set_inference_steps(released, 0)
    assert set_inference_steps(without, 4) == without

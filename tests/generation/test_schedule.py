"""The schedule as data: every quirk a field."""

from __future__ import annotations

import dataclasses

import pytest

from hart_infer.generation.schedule import Settings, hart_schedule, placed, var_schedule

RELEASED = (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)


@pytest.fixture
def stages():
    return hart_schedule(RELEASED, context_tokens=300, share_quant_resi=4).stages


def test_offsets_of_the_cache(stages):
    """The context takes scale 0's place; every other scale one position per token."""
    assert [stage.length for stage in stages] == [300] + [side * side for side in RELEASED[1:]]
    assert [stage.offset for stage in stages[1:]] == [stage.offset + stage.length for stage in stages[:-1]]
    assert stages[0].tokens == 1
    assert stages[-1].offset + stages[-1].length == 300 + sum(side * side for side in RELEASED[1:])


def test_progress_repeats_at_the_last_scale(stages):
    assert [stage.progress * 13 for stage in stages] == pytest.approx([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 12])


def test_guidance_grows_with_progress(stages):
    assert stages[0].guidance == 0
    assert stages[-1].guidance == stages[-2].guidance == pytest.approx(4.5 * 12 / 13)
    assert [stage.guided for stage in stages] == [False] + [True] * 13


def test_without_guidance_no_scale_needs_the_unconditional_half():
    settings = Settings(guidance_scale=0)
    schedule = hart_schedule(RELEASED, context_tokens=300, share_quant_resi=4, settings=settings)
    assert not schedule.guided
    assert not any(stage.guided for stage in schedule)


def test_temperature_and_gain(stages):
    assert stages[0].temperature == pytest.approx(0.27)
    assert stages[-1].temperature == pytest.approx(0.27 * (1 - 0.95 * 12 / 13))
    assert [stage.logit_gain for stage in stages] == [1 + stage.progress for stage in stages]


def test_the_temperature_s_released_floor_is_out_of_reach(stages):
    """0.005, and the formula gives 0.0135 at the most progress that there is."""
    assert dataclasses.replace(stages[0], progress=1.0).temperature == pytest.approx(0.0135)


def test_the_last_scale_alone_is_not_cached_not_refined_and_has_a_residual(stages):
    assert [stage.cached for stage in stages] == [True] * 13 + [False]
    assert [stage.ends_cache for stage in stages] == [False] * 13 + [True]
    assert [stage.num_inference_steps for stage in stages] == [0] * 13 + [8]
    assert [stage.prefilled for stage in stages] == [True] + [False] * 13
    assert [stage.phi is None for stage in stages] == [False] * 13 + [True]


def test_lengths_of_the_cache_and_its_scratch():
    schedule = hart_schedule(RELEASED, context_tokens=300, share_quant_resi=4)
    kept = 300 + sum(side * side for side in RELEASED[1:-1])
    assert (schedule.cached_length, schedule.scratch_length) == (kept, kept + 64 * 64)


@pytest.mark.parametrize("index", [3, 13])
def test_a_scale_that_is_not_cached_takes_no_place(stages, index):
    """Later scales attend to what is before it, as if it had not been."""
    changed = placed([dataclasses.replace(s, cached=s.index != index) for s in stages], 64)
    offsets = [stage.offset for stage in changed]
    assert offsets[: index + 1] == [stage.offset for stage in stages[: index + 1]]
    assert offsets[index + 1 :] == [stage.offset - stages[index].length for stage in stages[index + 1 :]]
    assert changed.scratch_length == stages[index].offset + stages[index].length


def test_a_schedule_may_stop_early(stages):
    """The latent keeps its side, and the new last scale ends the cache."""
    schedule = placed(stages[:-1], 64)
    assert [stage.ends_cache for stage in schedule] == [False] * 12 + [True]
    assert schedule.latent_side == 64


def test_released_top_k_changes_at_scale_seven(stages):
    assert [stage.top_k for stage in stages] == [600] * 7 + [300] * 7


@pytest.mark.parametrize("top_k", [0, 50])
def test_given_top_k_holds_at_every_scale(top_k):
    schedule = hart_schedule(RELEASED, context_tokens=300, share_quant_resi=4, settings=Settings(top_k=top_k))
    assert {stage.top_k for stage in schedule} == {top_k}


def test_settings_are_every_stage_s():
    settings = Settings(guidance_scale=3, num_inference_steps=4, residual_temperature=0.5, top_p=0.9, more_smooth=False)
    schedule = hart_schedule(RELEASED, context_tokens=300, share_quant_resi=4, settings=settings)
    assert {(stage.top_p, stage.more_smooth) for stage in schedule} == {(0.9, False)}
    assert [stage.guidance for stage in schedule] == [3 * stage.progress for stage in schedule]
    assert (schedule.stages[-1].num_inference_steps, schedule.stages[-1].residual_temperature) == (4, 0.5)


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (4, [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3]),
        (1, [0] * 13),
        (0, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]),
    ],
)
def test_residual_convolution_is_the_nearest_tick_and_none_at_the_end(share, expected):
    """Four have their ticks at 1/12, 13/36, ...; evenly spaced from 1/8 they would give scale 3 to the first."""
    schedule = hart_schedule(RELEASED, context_tokens=300, share_quant_resi=share)
    assert [stage.phi for stage in schedule] == [*expected, None]


# VAR.

VAR_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
VAR_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)


def var_stages(sides=VAR_256, share=4, **settings):
    return var_schedule(sides, share_quant_resi=share, settings=Settings(**{"num_inference_steps": 0, **settings})).stages


@pytest.mark.parametrize("sides", [VAR_256, VAR_512])
def test_var_feeds_a_token_per_code_and_caches_every_scale(sides):
    schedule = var_schedule(sides, share_quant_resi=4, settings=Settings())
    lengths = [stage.length for stage in schedule]
    assert lengths == [side * side for side in sides] == [stage.tokens for stage in schedule]
    assert [stage.offset for stage in schedule] == [sum(lengths[:i]) for i in range(10)]
    assert (schedule.cached_length, schedule.scratch_length) == (sum(lengths), 0)
    assert [stage.ends_cache for stage in schedule] == [False] * 9 + [True]
    assert [stage.prefilled for stage in schedule] == [True] + [False] * 9
    assert schedule.latent_side == sides[-1]


def test_var_reaches_all_of_its_guidance_and_progress_at_the_last_scale():
    """HART repeats the scale before."""
    stages = var_stages(guidance_scale=3.0)
    assert [stage.guidance for stage in stages] == pytest.approx([3 * i / 9 for i in range(10)])
    assert [stage.progress for stage in stages] == pytest.approx([i / 9 for i in range(10)])
    assert stages[-1].guidance == 3.0
    assert [stage.guided for stage in stages] == [False] + [True] * 9


def test_var_without_guidance_needs_no_unconditional_half():
    schedule = var_schedule(VAR_256, share_quant_resi=4, settings=Settings(guidance_scale=0.0))
    assert not schedule.guided
    assert {stage.guidance for stage in schedule} == {0.0}


def test_var_s_temperature_stays_above_the_released_floor():
    """max(0.27 (1 - 0.95 r), 0.005): at the last scale, where r is 1, it is 0.0135, so the floor has no line of code."""
    assert [stage.temperature for stage in var_stages()] == pytest.approx(
        [max(0.27 * (1 - 0.95 * i / 9), 0.005) for i in range(10)]
    )
    assert min(stage.temperature for stage in var_stages()) == pytest.approx(0.0135)
    assert var_stages()[-1].logit_gain == 2.0


@pytest.mark.parametrize(
    ("share", "expected"), [(4, [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]), (1, [0] * 10), (0, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])]
)
def test_var_refines_every_scale_the_last_one_too(share, expected):
    """Scales 2 and 7 lie midway between two ticks of four; rounding decides as released."""
    assert [stage.phi for stage in var_stages(share=share)] == expected


def test_var_has_no_residual_and_one_top_k():
    stages = var_stages(num_inference_steps=8)
    assert {stage.num_inference_steps for stage in stages} == {0}
    assert {stage.top_k for stage in stages} == {900}
    assert {stage.top_k for stage in var_stages(top_k=0)} == {0}
    assert {(stage.top_p, stage.more_smooth) for stage in var_stages(top_p=0.9, more_smooth=False)} == {(0.9, False)}

"""The schedule as data: every quirk a field."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hart_infer.generation.schedule import build_schedule, phi_index

RELEASED = (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)


@pytest.fixture
def stages():
    return build_schedule(RELEASED, context_tokens=300, share_quant_resi=4)


def test_offsets_of_the_cache(stages):
    """The context takes scale 0's place; every other scale one position per token."""
    assert [stage.length for stage in stages] == [300] + [side * side for side in RELEASED[1:]]
    assert [stage.offset for stage in stages[1:]] == [stage.offset + stage.length for stage in stages[:-1]]
    assert stages[0].tokens == 1
    assert stages[-1].offset + stages[-1].length == 300 + sum(side * side for side in RELEASED[1:])


def test_progress_repeats_at_the_last_scale(stages):
    assert [stage.progress * 13 for stage in stages] == pytest.approx([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 12])
    assert [stage.is_last for stage in stages] == [False] * 13 + [True]


def test_guidance_grows_with_progress(stages):
    assert stages[0].guidance(4.5) == 0
    assert stages[-1].guidance(4.5) == stages[-2].guidance(4.5) == pytest.approx(4.5 * 12 / 13)


def test_temperature_and_gain(stages):
    assert stages[0].temperature == pytest.approx(0.27)
    assert stages[-1].temperature == pytest.approx(0.27 * (1 - 0.95 * 12 / 13))
    assert [stage.logit_gain for stage in stages] == [1 + stage.progress for stage in stages]


def test_temperature_has_a_floor(stages):
    """No schedule reaches it: at progress 1 the formula gives 0.0135."""
    assert replace(stages[0], progress=1.04).temperature == 0.005


def test_released_top_k_changes_at_scale_seven(stages):
    assert [stage.top_k for stage in stages] == [600] * 7 + [300] * 7


@pytest.mark.parametrize("top_k", [0, 50])
def test_given_top_k_holds_at_every_scale(top_k):
    stages = build_schedule(RELEASED, context_tokens=300, share_quant_resi=4, top_k=top_k)
    assert {stage.top_k for stage in stages} == {top_k}


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
    stages = build_schedule(RELEASED, context_tokens=300, share_quant_resi=share)
    assert [stage.phi for stage in stages] == [*expected, None]


def test_last_scale_has_a_convolution_in_the_tokenizer():
    assert phi_index(13, 14, 4) == 3
    assert phi_index(13, 14, 0) == 13

"""Knobs and named modes: completed for a model, refused where they don't fit it, said in words, kept as JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hart_infer.errors import InputError
from hart_infer.generation.speed import SPEEDS, Knobs, Prune, resolve

SIDES = (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)


def completed(speed: str = "exact", sides: tuple[int, ...] = SIDES, **given: Any) -> Knobs:
    return resolve(speed, Knobs(**given), sides=sides, depth=4, late_temperature=0.8)


def test_exact_changes_nothing() -> None:
    assert completed("exact") == Knobs()
    assert not completed("exact").given()


def test_named_modes() -> None:
    late = {"late_temperature": 0.8}
    pruned = Prune(at=(48, 64), drop=(0.5, 0.75), cache_at=36)
    assert completed("fast") == Knobs(guidance_stops_at=64, prune=pruned, **late)
    assert completed("turbo") == Knobs(guidance_stops_at=36, prune=pruned, num_inference_steps=4, **late)
    assert completed("draft") == Knobs(
        guidance_stops_at=36, prune=Prune(at=(48,), drop=(0.5,), cache_at=36), stop_after=48, num_inference_steps=0, **late
    )


def test_coarse_scales_are_neither_pruned_nor_left_out() -> None:
    """Of a 256 px model none; of one of 512 px the last two; where the last alone is fine, it alone."""
    coarse, late = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), {"late_temperature": 0.8}
    assert completed("fast", coarse) == Knobs(guidance_stops_at=16, **late)
    assert completed("turbo", coarse) == Knobs(guidance_stops_at=10, num_inference_steps=4, **late)
    assert completed("draft", coarse) == Knobs(guidance_stops_at=10, num_inference_steps=0, **late)
    assert completed("fast", (*coarse, 24, 32)).prune == Prune(at=(24, 32), drop=(0.5, 0.75), cache_at=16)
    assert completed("fast", (*coarse, 23, 32)).prune == Prune(at=(32,), drop=(0.75,), cache_at=23)
    assert completed("draft", (*coarse, 23, 32)) == Knobs(guidance_stops_at=16, stop_after=23, num_inference_steps=0, **late)
    assert completed("exact", coarse) == Knobs()


def test_what_is_given_takes_the_mode_s_place() -> None:
    knobs = completed("turbo", guidance_stops_at=48, late_temperature=0.3, prune=Prune(drop=(0.9,)), num_inference_steps=8)
    assert knobs == Knobs(
        guidance_stops_at=48,
        late_temperature=0.3,
        prune=Prune(at=(64,), drop=(0.9,), cache_at=48),
        num_inference_steps=8,
    )


def test_the_model_s_late_temperature_is_of_late_scales_only() -> None:
    assert completed(stop_after=48).late_temperature is None
    assert completed(guidance_stops_at=16).late_temperature == 0.8


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"speed": "warp"}, "speed must be one of exact, fast, turbo, draft, not 'warp'."),
        ({"speed": None}, "speed must be one of"),
        ({"speed": ["fast"]}, "speed must be one of"),
        ({"guidance_stops_at": 65}, "guidance_stops_at must be the side of one of the model's scales, 1 2 3 .* 64, not 65."),
        ({"guidance_stops_at": True}, "guidance_stops_at must be the side"),
        ({"guidance_stops_at": "64"}, "guidance_stops_at must be the side"),
        ({"stop_after": 0}, "stop_after must be the side"),
        ({"late_temperature": 0.5}, "late_temperature is of scales that lost their guidance; give guidance_stops_at"),
        ({"prune": Prune(at=(48, 65))}, "prune.at must be the side .* not 65."),
        ({"prune": Prune(cache_at=35)}, "prune.cache_at must be the side .* not 35."),
        ({"prune": Prune(cache_at=48)}, "prune needs a scale before 48, and not the first"),
        ({"prune": Prune(cache_at=1)}, "prune needs a scale before 48, and not the first"),
        ({"prune": Prune(at=(2,), drop=(0.5,))}, "prune needs a scale before 2, and not the first"),
        ({"prune": Prune(drop=((0.5, 0.5),))}, "prune.drop per layer goes with the last scale, 64, and needs 4 shares."),
        ({"prune": Prune(at=(48,), drop=((0.5,) * 4,))}, "prune.drop per layer goes with the last scale, 64"),
    ],
)
def test_what_does_not_fit_the_model(given: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        completed(**given)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"drop": 0.5}, "prune.drop must list a share from 0 to 1 for each scale that prunes, not 0.5."),
        ({"drop": ()}, "prune.drop must list"),
        ({"drop": (0.5, 1.5)}, r"prune.drop must be shares from 0 to 1, not \(0.5, 1.5\)."),
        ({"drop": (0.5, float("nan"))}, "prune.drop must be shares"),
        ({"drop": ("0.5",)}, "prune.drop must be shares"),
        ({"drop": ((),)}, "prune.drop must be shares"),
        ({"drop": ((0.5, 0.5), 0.5)}, "prune.drop may have a share per layer at the last scale only"),
        ({"drop": ((0.5, 0.5),), "once": True}, "and not with once=True"),
        ({"at": (64, 48)}, r"prune.at must be 2 rising sides, one for each of drop, not \(64, 48\)."),
        ({"at": (48,)}, "prune.at must be 2 rising sides"),
        ({"at": 48}, "prune.at must be 2 rising sides"),
        ({"once": "yes"}, "prune.once must be True or False, not 'yes'."),
    ],
)
def test_what_no_model_prunes_by(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        Prune(**fields)


@pytest.mark.parametrize("speed", SPEEDS)
def test_a_mode_fits_every_model_of_enough_scales(speed: str) -> None:
    least = SPEEDS[speed].min_scales
    assert completed(speed, SIDES[:least])
    if least > 1:
        with pytest.raises(
            InputError, match=f"speed '{speed}' needs a model of {least} scales or more; this one has {least - 1}."
        ):
            completed(speed, SIDES[: least - 1])


def test_json_brings_a_prune_back() -> None:
    how = Prune(drop=(0.4, (0.5, 0.6, 0.7, 0.8)), once=False).on(SIDES, 4)
    assert Prune(**json.loads(json.dumps(how.to_dict()))) == how


def test_in_words() -> None:
    assert str(completed("exact")) == "the model as released"
    assert str(completed("fast")) == (
        "no guidance from scale 64 on, logits divided by 0.8; prunes 50 % at scale 48 and 75 % at scale 64"
    )
    assert str(completed("draft", late_temperature=1.0)) == (
        "no guidance from scale 36 on; prunes 50 % at scale 48; stops after scale 48; no steps of the residual diffusion"
    )
    assert str(Prune(drop=((0.25, 0.75, 0.5, 0.5),)).on(SIDES, 4)) == "prunes 50 % at scale 64"
    assert str(Prune(drop=(0.5,), once=True).on(SIDES, 4)).endswith(", chosen once a scale")

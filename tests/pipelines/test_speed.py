"""Speeds and their knobs as arguments of a call, of HART and of VAR alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hart_infer import HartPipeline, Prune, VarPipeline
from hart_infer.checkpoints.hart import Defaults

SPEEDS = ("fast", "turbo", "draft")


@pytest.fixture(autouse=True)
def fine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The modes do to these small models what they do to large ones."""
    monkeypatch.setattr("hart_infer.generation.speed.FINE", 5)


@pytest.fixture(scope="module")
def var(whole_var_tiny: Path) -> VarPipeline:
    loaded = VarPipeline.from_pretrained(whole_var_tiny, device="cpu")
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(params=["HART", "VAR"])
def either(request: pytest.FixtureRequest, pipe: HartPipeline, var: VarPipeline) -> Any:
    return pipe if request.param == "HART" else var


def drawn(pipe: Any, **options: Any) -> Tensor:
    latents: Tensor = pipe("a cat" if isinstance(pipe, HartPipeline) else 3, seed=7, output_type="latent", **options).images
    return latents


def test_exact_is_the_default(either: Any) -> None:
    exact = drawn(either)
    assert torch.equal(drawn(either, speed="exact"), exact)
    assert all(not torch.equal(drawn(either, speed=speed), exact) for speed in SPEEDS)


@pytest.mark.parametrize("speed", SPEEDS)
def test_a_speed_is_its_knobs(either: Any, speed: str) -> None:
    knobs = either.knobs(speed).given()
    expected = drawn(either, speed=speed)
    assert torch.equal(drawn(either, **knobs), expected)
    assert torch.equal(drawn(either, speed=speed, **knobs), expected)
    assert torch.equal(drawn(either, **{**knobs, "prune": knobs["prune"].to_dict()}), expected)


def test_a_knob_takes_the_place_of_the_speed_s_own(either: Any) -> None:
    last = either.autoencoder.config.v_patch_nums[-1]
    given: dict[str, Any] = {"guidance_stops_at": last, "late_temperature": 0.5, "prune": Prune(drop=(0.3,), once=True)}
    turbo = either.knobs("turbo", **given)
    assert (turbo.guidance_stops_at, turbo.late_temperature) == (last, 0.5)
    assert turbo.prune == Prune(at=(last,), drop=(0.3,), cache_at=either.autoencoder.config.v_patch_nums[-2], once=True)
    steps = {"num_inference_steps": 4} if isinstance(either, HartPipeline) else {}
    assert torch.equal(drawn(either, speed="turbo", **given), drawn(either, **given, **steps))


def test_var_has_no_steps_to_set(var: VarPipeline) -> None:
    assert var.knobs("turbo").num_inference_steps is None
    assert "steps" not in var.describe()


def test_a_speed_without_guidance(either: Any) -> None:
    """There is none to stop: pruning remains."""
    assert torch.equal(
        drawn(either, speed="fast", guidance_scale=0), drawn(either, prune=either.knobs("fast").prune, guidance_scale=0)
    )


def test_a_negative_prompt_steers_until_guidance_stops(pipe: HartPipeline) -> None:
    assert not torch.equal(drawn(pipe, speed="fast", negative_prompt="a dog"), drawn(pipe, speed="fast"))
    assert torch.equal(drawn(pipe, guidance_stops_at=1, negative_prompt="a dog"), drawn(pipe, guidance_stops_at=1))
    assert torch.equal(drawn(pipe, guidance_stops_at=1), drawn(pipe, guidance_scale=0))


@pytest.mark.parametrize("speed", SPEEDS)
def test_editing_keeps_what_is_kept(either: Any, speed: str) -> None:
    picture = either(*["a cat"] if isinstance(either, HartPipeline) else [3], seed=1, output_type="pt").images
    box = (0.0, 0.5, 1.0, 1.0)
    edited = either.inpaint(picture, box, None, seed=2, speed=speed, output_type="pt").images
    assert torch.equal(edited[..., : picture.shape[-1] // 4], picture[..., : picture.shape[-1] // 4])
    assert not torch.equal(edited, picture)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(hart_tiny: Path, text_tiny: Path, dtype: torch.dtype) -> None:
    pipe = HartPipeline.from_pretrained(hart_tiny, text_encoder=text_tiny, dtype=dtype, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    assert all(drawn(pipe, speed=speed).isfinite().all() for speed in SPEEDS)
    assert torch.equal(drawn(pipe, prune=Prune(drop=(0, 0))), drawn(pipe))


@pytest.mark.parametrize("reproducible", [True, False])
def test_a_picture_in_a_batch(either: Any, reproducible: bool) -> None:
    subject = "a cat" if isinstance(either, HartPipeline) else 3
    options: dict[str, Any] = {"speed": "turbo", "output_type": "latent", "reproducible": reproducible, "more_smooth": False}
    together = either([subject] * 3, seed=5, **options).images
    alone = either(subject, seed=6, **options).images
    torch.testing.assert_close(together[1:2], alone, rtol=0 if reproducible else 1e-3, atol=0 if reproducible else 1e-3)


def test_the_checkpoint_s_late_temperature(pipe: HartPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe, "defaults", Defaults(late_temperature=0.5))
    assert pipe.knobs("fast").late_temperature == 0.5
    assert pipe.knobs().late_temperature is None
    fitted = drawn(pipe, speed="fast")
    assert torch.equal(fitted, drawn(pipe, speed="fast", late_temperature=0.5))
    assert not torch.equal(fitted, drawn(pipe, speed="fast", late_temperature=1.0))
    pipe.save_pretrained(tmp_path / "saved")
    again = HartPipeline.from_pretrained(tmp_path / "saved", device="cpu")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(drawn(again, speed="fast"), fitted)


def test_describe_says_what_the_speeds_are(either: Any) -> None:
    lines = either.describe().splitlines()
    *_, third, second, last = either.autoencoder.config.v_patch_nums
    assert "  speed exact: the model as released" in lines
    assert f"  speed fast: no guidance from scale {last} on; prunes 50 % at scale {second} and 75 % at scale {last}" in lines
    (draft,) = [line for line in lines if line.startswith("  speed draft")]
    assert draft.startswith(f"  speed draft: no guidance from scale {third} on; prunes 50 % at scale {second}; stops after")


def test_steps_of_a_callback_are_those_that_are_run(either: Any) -> None:
    seen: list[tuple[int, int]] = []
    drawn(either, speed="draft", callback_on_step_end=lambda step: seen.append((step.side, step.num_scales)))
    sides = either.autoencoder.config.v_patch_nums[:-1]
    assert seen == [(side, len(sides)) for side in sides]


def test_the_memory_counts(pipe: HartPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every token of the cached scale, both halves: one vector a sublayer, or one in all."""
    needed: list[int] = []
    monkeypatch.setattr("hart_infer.pipelines.next_scale.check_memory", lambda *_, bytes_once: needed.append(bytes_once))
    for how in (None, Prune(cache_at=4, at=(6,), drop=(0.0,)), Prune(cache_at=4, at=(6,), drop=(0.0,), once=True)):
        drawn(pipe, prune=how)
    vectors = [(size - needed[0]) // (2 * pipe.transformer.width * 4) for size in needed]
    assert vectors == [0, 2 * pipe.transformer.depth * 16, 16]

"""VarPipeline's call: classes, seeds, settings, guidance, what comes back; on a small random checkpoint."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from hart_infer import ImageOutput, InputError, OutOfMemoryError, Step, VarPipeline, WeightsError
from hart_infer.generation.schedule import Settings
from hart_infer.pipelines import var as var_pipeline
from hart_infer.pipelines.labels import Labels
from tests.released_var import CHANNELS, CLASSES, PIXELS, SIDES, VOCABULARY, transformer_state, write_checkpoint

NAMES = [["dog", "hound"], "cat", "tram", "lion", "tree"]
LATENT = (CHANNELS, SIDES[-1], SIDES[-1])
HARD = 2e-4  # relative: how rounding may grow in a run without `more_smooth`


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint whose classes have names. Read only."""
    folder = write_checkpoint(tmp_path_factory.mktemp("released"))
    (folder / "classes.json").write_text(json.dumps(NAMES))
    return folder


def load(folder: Path, **options: Any) -> VarPipeline:
    pipe = VarPipeline.from_pretrained(folder, device="cpu", **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def var(released: Path) -> VarPipeline:
    """Loaded once; leave dtype and weights alone."""
    return load(released)


@pytest.fixture
def own(released: Path) -> VarPipeline:
    """One of the test's own, to cast and to set."""
    return load(released)


def latent(pipe: VarPipeline, label: Any = 1, **options: Any) -> Tensor:
    return pipe(label, **{"seed": 0, "output_type": "latent", **options}).images


def relative(given: Tensor, expected: Tensor) -> float:
    return ((given - expected).abs().max() / expected.abs().max()).item()


# What comes back.


def test_pictures_are_pil_images_unless_asked_otherwise(var: VarPipeline) -> None:
    output = var(3)
    assert isinstance(output, ImageOutput)
    (picture,) = output.images
    assert isinstance(picture, Image.Image)
    assert (picture.mode, picture.size) == ("RGB", (PIXELS, PIXELS))


@pytest.mark.parametrize(
    ("output_type", "kind", "shape"),
    [
        ("np", np.ndarray, (4, PIXELS, PIXELS, 3)),
        ("pt", Tensor, (4, 3, PIXELS, PIXELS)),
        ("latent", Tensor, (4, *LATENT)),
    ],
)
def test_arrays_have_their_shape_and_are_fp32(var: VarPipeline, output_type: Any, kind: type, shape: tuple[int, ...]) -> None:
    images = var([0, 1], num_images_per_prompt=2, output_type=output_type).images
    assert isinstance(images, kind)
    assert tuple(images.shape) == shape
    assert str(images.dtype).removeprefix("torch.") == "float32"
    assert output_type == "latent" or (images.min() >= 0 and images.max() <= 1)


def test_all_forms_are_of_one_picture(var: VarPipeline) -> None:
    pt, array, pil = (var(2, seed=3, output_type=form).images for form in ("pt", "np", "pil"))
    assert np.array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    assert np.array_equal(np.asarray(pil[0]), np.round(array[0] * 255).astype(np.uint8))
    assert torch.equal((var.autoencoder.decode(latent(var, 2, seed=3)) + 1) / 2, pt)


def test_a_tuple_if_asked(var: VarPipeline) -> None:
    (images,) = var(2, seed=3, return_dict=False)
    assert images[0].tobytes() == var(2, seed=3).images[0].tobytes()


def test_the_one_size_may_be_named(var: VarPipeline) -> None:
    assert var.sizes == (PIXELS,)
    assert torch.equal(latent(var, size=PIXELS, height=PIXELS, width=PIXELS), latent(var))
    with pytest.raises(InputError, match="it has 32"):
        var(1, size=256)


# Classes.


@pytest.mark.parametrize(
    "label", [0, "0", " 0 ", "dog", "Dog", "HOUND", np.int64(0), torch.tensor(0), ["dog"], torch.tensor([0])]
)
def test_a_class_by_number_or_name(var: VarPipeline, label: Any) -> None:
    assert torch.equal(latent(var, label), latent(var, 0))


def test_classes_are_mixed_and_repeated_in_order(var: VarPipeline) -> None:
    output = var([2, "hound", "cat"], num_images_per_prompt=2, seed=7, output_type="latent")
    assert output.seeds == [7, 8, 9, 10, 11, 12]
    alone = [latent(var, label, seed=7 + i) for i, label in enumerate((2, 2, 0, 0, 1, 1))]
    assert torch.equal(output.images, torch.cat(alone))
    assert not torch.equal(latent(var, 0), latent(var, 1))


@pytest.mark.parametrize(
    ("label", "words"),
    [
        (CLASSES, "from 0 to 4"),  # "no class" is not for callers
        (-1, "from 0 to 4"),
        (1000, "from 0 to 4"),
        (10**40, "from 0 to 4"),
        (2.0, "number or name"),
        (True, "whole number"),
        ("lyon", r"did you mean lion \(3\)\?"),
        ("", "label"),
        ([], "is an empty list"),
        ([0, "nothing like it"], r"label\[1\]"),
        ([[0, 1]], "whole number"),
        (None, "Give a class"),
        ({"a": 1}, "a list of those, not dict"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_classes_that_are_none(var: VarPipeline, label: Any, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        var(label)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_without_names_classes_are_numbers(var: VarPipeline) -> None:
    bare = VarPipeline(var.transformer, var.autoencoder)
    bare.set_progress_bar_config(disable=True)
    assert torch.equal(latent(bare, "1"), latent(var, "cat"))
    with pytest.raises(InputError, match="no names"):
        bare("cat")
    assert "classes: 5, numbers only" in bare.describe()


# Seeds.


def test_a_seed_redraws_its_picture_and_another_does_not(var: VarPipeline) -> None:
    assert torch.equal(latent(var, seed=5), latent(var, seed=5))
    assert not torch.equal(latent(var, seed=5), latent(var, seed=6))


def test_reported_seeds_redraw_the_pictures(var: VarPipeline) -> None:
    output = var(1, num_images_per_prompt=2, output_type="latent")
    assert output.seeds != var(1, num_images_per_prompt=2).seeds
    assert torch.equal(latent(var, num_images_per_prompt=2, seed=output.seeds), output.images)


def test_generators_are_seeds(var: VarPipeline) -> None:
    output = var(1, generator=torch.Generator().manual_seed(5), output_type="latent")
    assert output.seeds == [5]
    assert torch.equal(output.images, latent(var, seed=5))
    both = var([0, 1], generator=[torch.Generator().manual_seed(seed) for seed in (9, 4)], output_type="latent")
    assert torch.equal(both.images, latent(var, [0, 1], seed=[9, 4]))
    with pytest.raises(InputError, match="contradict"):
        var(1, seed=1, generator=torch.Generator())


def test_no_global_randomness_is_used_or_touched(var: VarPipeline) -> None:
    torch.manual_seed(0)
    first, before = latent(var), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(latent(var), first)
    torch.manual_seed(0)
    latent(var)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("options", [{}, {"more_smooth": True}, {"guidance_scale": 0.0}, {"top_k": 5, "top_p": 0.5}], ids=str)
def test_an_image_does_not_depend_on_its_batch(var: VarPipeline, options: dict[str, Any]) -> None:
    labels = [4, 0, 2]
    batch = latent(var, labels, num_images_per_prompt=2, seed=5, **options)
    for i in range(6):
        assert torch.equal(latent(var, labels[i // 2], seed=5 + i, **options), batch[i : i + 1])


def test_all_together_differs_by_rounding_only(var: VarPipeline) -> None:
    options = {"num_images_per_prompt": 2, "seed": 3}
    together, alone = (latent(var, [0, 3], reproducible=flag, **options) for flag in (False, True))
    assert relative(together, alone) <= HARD
    assert torch.equal(alone, latent(var, [0, 3], **options))  # as on a CPU by default


# Settings.


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """The settings of every schedule that is made."""
    seen: list[Settings] = []
    make = var_pipeline.var_schedule

    def spy(*args: Any, settings: Settings, **options: Any) -> Any:
        seen.append(settings)
        return make(*args, settings=settings, **options)

    monkeypatch.setattr(var_pipeline, "var_schedule", spy)
    return seen


@pytest.fixture
def large(var: VarPipeline, monkeypatch: pytest.MonkeyPatch) -> VarPipeline:
    """One that says that it has the released vocabulary: what a call then asks for."""
    monkeypatch.setattr(var_pipeline.VarPipeline, "_draw", lambda *_: torch.zeros(1))
    config = var.autoencoder.config
    monkeypatch.setattr(var.autoencoder, "config", type(config)(**{**vars(config), "vocab_size": 4096}))
    return var


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (4.0, 900, 0.95, False)),
        ({"preset": None}, (4.0, 900, 0.95, False)),
        ({"preset": "fid"}, (1.5, 900, 0.96, False)),
        ({"preset": "fid", "top_p": 0.5}, (1.5, 900, 0.5, False)),
        ({"preset": "fid", "guidance_scale": 0, "more_smooth": True}, (0.0, 900, 0.96, True)),
        ({"guidance_scale": 2, "top_k": 0, "top_p": 0}, (2.0, 0, 0.0, False)),
    ],
    ids=str,
)
def test_defaults_and_the_preset(large: VarPipeline, asked: list[Settings], options: Any, expected: tuple[Any, ...]) -> None:
    large(1, **options)
    (settings,) = asked
    assert (settings.guidance_scale, settings.top_k, settings.top_p, settings.more_smooth) == expected


def test_a_checkpoint_s_defaults_are_those_of_a_call(own: VarPipeline, asked: list[Settings]) -> None:
    own.defaults = type(own.defaults)(guidance_scale=2.5, top_k=7, top_p=0.5)
    own(1)
    assert (asked[-1].guidance_scale, asked[-1].top_k, asked[-1].top_p) == (2.5, 7, 0.5)


@pytest.mark.parametrize("preset", [None, "fid"])
def test_released_settings_fit_a_smaller_vocabulary(var: VarPipeline, preset: Any) -> None:
    """Top-k of 900 among 64 codes keeps all of them."""
    assert var.autoencoder.config.vocab_size == VOCABULARY
    settings = {"guidance_scale": 1.5, "top_p": 0.96} if preset else {}
    assert torch.equal(latent(var, preset=preset), latent(var, top_k=0, **settings))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"preset": "FID"}, "preset must be one of fid, not 'FID'"),
        ({"top_k": -1}, "top_k must be a whole number from 0 to 64"),
        ({"top_k": 65}, "top_k must be a whole number from 0 to 64"),
        ({"top_p": 1.1}, "top_p must be a number from 0 to 1"),
        ({"top_p": float("nan")}, "top_p must be a number"),
        ({"guidance_scale": -1}, "guidance_scale must be a number from 0"),
        ({"guidance_scale": "4"}, "guidance_scale must be a number"),
        ({"more_smooth": "yes"}, "more_smooth must be True or False"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be a whole number of 1 or more"),
        ({"output_type": "jpeg"}, "output_type must be one of"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"seed": [1, 2]}, "seed has 2 entries for 1 images"),
        ({"reproducible": "no"}, "reproducible must be True or False"),
        ({"callback_on_step_end": 3}, "must be a function"),
        ({"edit": "photo.png"}, "edit"),
    ],
    ids=str,
)
def test_arguments_that_are_refused(var: VarPipeline, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        var(1, **options)


def test_a_prompt_of_hart_s_is_no_argument(var: VarPipeline) -> None:
    for name in ("negative_prompt", "num_inference_steps", "prompt_embeds"):
        with pytest.raises(TypeError, match=name):
            var(1, **{name: None})


def test_more_pictures_than_memory_holds(var: VarPipeline) -> None:
    with pytest.raises(OutOfMemoryError, match="num_images_per_prompt"):
        var(1, num_images_per_prompt=10**9)


# Guidance.


def rows_run(pipe: VarPipeline, **options: Any) -> int:
    """Rows of the transformer's batch in all, at the last scale, of a call for two images."""
    seen: list[tuple[int, int]] = []
    hook = pipe.transformer.register_forward_pre_hook(lambda _module, args: seen.append(args[0].shape[:2]))
    latent(pipe, [0, 1], **options)
    hook.remove()
    return sum(rows for rows, tokens in seen if tokens == SIDES[-1] ** 2)


def test_without_guidance_half_the_rows_run(var: VarPipeline) -> None:
    assert rows_run(var) == 4
    assert rows_run(var, guidance_scale=0) == 2
    assert rows_run(var, guidance_scale=0, reproducible=False) == 2


def test_no_guidance_is_the_limit_of_little_guidance(var: VarPipeline) -> None:
    assert relative(latent(var, guidance_scale=1e-9), latent(var, guidance_scale=0)) <= HARD
    assert not torch.equal(latent(var, guidance_scale=0), latent(var))


def test_the_first_scale_is_not_guided_and_the_last_fully(var: VarPipeline) -> None:
    """Guidance doesn't change what scale 0 draws."""
    first: list[Tensor] = []

    def look(step: Step) -> None:
        first.append(step.f_hat.clone())
        step.stop()

    for guidance in (0, 4, 100):
        latent(var, guidance_scale=guidance, callback_on_step_end=look)
    assert torch.equal(first[0], first[1])
    assert torch.equal(first[0], first[2])


def test_the_best_code_only_needs_no_seed(var: VarPipeline) -> None:
    for options in ({"top_k": 1}, {"top_p": 1e-6}):
        assert torch.equal(*latent(var, seed=[1, 2], num_images_per_prompt=2, **options).split(1))


# The callback.


def test_the_callback_sees_every_scale_in_order(var: VarPipeline) -> None:
    seen: list[tuple[int, int, int]] = []
    latents: list[Tensor] = []

    def look(step: Step) -> None:
        seen.append((step.index, step.side, step.num_scales))
        latents.append(step.f_hat.clone())

    final = latent(var, num_images_per_prompt=2, callback_on_step_end=look)
    assert seen == [(index, side, len(SIDES)) for index, side in enumerate(SIDES)]
    assert torch.equal(latents[-1], final)
    assert not any(torch.equal(a, b) for a, b in zip(latents, latents[1:], strict=False))


def test_previews_are_full_size_and_the_last_is_the_picture(var: VarPipeline) -> None:
    previews: list[list[Image.Image]] = []
    images = var([0, 1], seed=0, callback_on_step_end=lambda step: previews.append(step.preview())).images
    assert [len(pictures) for pictures in previews] == [2] * len(SIDES)
    assert [picture.tobytes() for picture in previews[-1]] == [image.tobytes() for image in images]


@pytest.mark.parametrize("last", [0, 3, len(SIDES) - 1])
def test_stop_ends_with_that_scale_s_preview(var: VarPipeline, last: int) -> None:
    previews: list[Image.Image] = []

    def stop(step: Step) -> None:
        previews[:] = step.preview()
        if step.index == last:
            step.stop()
        assert step.index <= last

    assert var(1, seed=4, callback_on_step_end=stop).images[0].tobytes() == previews[0].tobytes()


def test_a_callback_in_diffusers_form(var: VarPipeline) -> None:
    seen: list[tuple[Any, ...]] = []
    var(1, callback_on_step_end=lambda pipe, index, timestep, kwargs: seen.append((pipe, index, set(kwargs))))
    assert seen == [(var, index, {"latents", "step"}) for index in range(len(SIDES))]


def test_an_error_of_the_callback_passes_and_leaves_the_pipeline_whole(own: VarPipeline) -> None:
    before, error = latent(own), KeyError("mine")

    def fail(step: Step) -> None:
        raise error

    with pytest.raises(KeyError) as caught:
        own(1, callback_on_step_end=fail)
    assert caught.value is error
    assert torch.equal(latent(own), before)


# Dtypes, threads, saving, words.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_end_to_end(own: VarPipeline, released: Path, dtype: torch.dtype) -> None:
    before = own(1, seed=0, output_type="pt").images
    assert own.to(dtype) is own
    assert own.dtype == own.autoencoder.post_quant_conv.weight.dtype == dtype
    assert {parameter.dtype for parameter in own.autoencoder.quantizer.parameters()} == {torch.float32}
    images = own([1, 2], seed=0, output_type="pt", guidance_scale=4).images
    assert images.dtype == torch.float32
    assert images.isfinite().all()
    assert torch.equal(images, load(released, dtype=dtype)([1, 2], seed=0, output_type="pt").images)
    assert not torch.equal(images[:1], before)


def test_threads_may_share_a_pipeline(var: VarPipeline) -> None:
    seeds = range(6)
    expected = [latent(var, seed % 5, seed=seed) for seed in seeds]
    with ThreadPoolExecutor(max_workers=3) as threads:
        found = list(threads.map(lambda seed: latent(var, seed % 5, seed=seed), seeds))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("shared", [False, True])
def test_a_saved_pipeline_draws_the_same(tmp_path: Path, shared: bool) -> None:
    pipe = load(write_checkpoint(tmp_path / "released", transformer=transformer_state(shared=shared)))
    pipe.defaults = type(pipe.defaults)(guidance_scale=1.0, top_k=9, top_p=0.5)
    again = load(pipe.save_pretrained(tmp_path / "saved"))
    assert again.defaults == pipe.defaults
    assert torch.equal(latent(again), latent(pipe))


def test_only_safetensors_are_written(var: VarPipeline, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="never as pickles"):
        var.save_pretrained(tmp_path / "saved", safe_serialization=False)
    assert not list(tmp_path.iterdir())


def test_describe(var: VarPipeline, released: Path) -> None:
    lines = var.describe().splitlines()
    assert lines[0] == f"{released} on cpu, float32"
    assert "  sizes: 32 px; scales: 1 2 3 4 6 8" in lines
    assert "  classes: 5, with names" in lines
    assert any(line.startswith("  transformer: 0.") for line in lines)


def test_the_bar_says_how_many_scales(own: VarPipeline, capfd: pytest.CaptureFixture[str]) -> None:
    own(1)
    assert capfd.readouterr() == ("", "")
    own.set_progress_bar_config(disable=False)
    own(1)
    assert "6/6" in capfd.readouterr().err


def test_weights_that_overflow_are_named(own: VarPipeline) -> None:
    own.transformer.head.linear.weight.data.fill_(torch.inf)
    with pytest.raises(WeightsError, match="not finite"):
        own(1)


@pytest.mark.parametrize("mode", ["discrete", "hybrid"])
def test_reconstruct(var: VarPipeline, mode: Any) -> None:
    picture = torch.rand(2, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(0))
    rebuilt = var.reconstruct(picture, mode)
    expected = torch.cat([var.autoencoder.reconstruct(one * 2 - 1, mode) for one in picture.split(1)])
    assert torch.equal(rebuilt, (expected + 1) / 2)
    assert isinstance(var.reconstruct(Image.new("RGB", (50, 40)), mode), Image.Image)


def test_imagenet_s_names_are_those_of_1000_classes() -> None:
    labels = Labels.for_checkpoint(1000)
    assert labels.index("golden retriever") == 207
    assert Labels.for_checkpoint(10).names is None

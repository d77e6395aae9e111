"""The call: what comes back, what each argument does, and what is left behind when it doesn't end well."""

from __future__ import annotations

import gc
import hashlib
import io
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from hart_infer import HartOutput, HartPipeline, InputError, OutOfMemoryError, PromptEmbeds, Step
from hart_infer.engine.next_scale import Engine
from hart_infer.generation.schedule import Stage
from hart_infer.models.parts import tiling
from hart_infer.models.parts.cache import KVCache
from hart_infer.ops.registry import use_backend
from tests.golden.data import REPOSITORY

SIDES = (1, 2, 3, 4, 6, 8)  # of hart-tiny
CHANNELS, PIXELS = 8, 32
HARD = 2e-4  # relative to the largest entry: the bound on how rounding grows in a run without `more_smooth`


@dataclass(frozen=True)
class Scale:
    """One scale that was generated."""

    stage: Stage
    indices: Tensor  # [B, p * p]
    f_hat: Tensor  # [B, C, P, P]


@pytest.fixture
def scales(monkeypatch: pytest.MonkeyPatch) -> list[Scale]:
    """Every scale that any pipeline generates, code indices included."""
    seen: list[Scale] = []
    run_scale = Engine.run_scale

    def spy(self: Engine, states: Any, stage: Stage) -> None:
        run_scale(self, states, stage)
        indices, f_hat = (torch.cat(parts) for parts in zip(*((s.indices[-1], s.f_hat) for s in states), strict=True))
        seen.append(Scale(stage, indices, f_hat))

    monkeypatch.setattr(Engine, "run_scale", spy)
    return seen


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch) -> list[StorageWeakRef]:
    """Weak references to the memory of the key/value caches that hold all scales."""
    seen: list[StorageWeakRef] = []
    allocate = KVCache.__init__

    def spy(self: KVCache, **kwargs: Any) -> None:
        allocate(self, **kwargs)
        if kwargs.get("scratch_length"):
            seen.append(StorageWeakRef(self.keys.untyped_storage()))

    monkeypatch.setattr(KVCache, "__init__", spy)
    return seen


@pytest.fixture
def own(hart_tiny: Path, text_tiny: Path) -> HartPipeline:
    """A pipeline of the test's own, to cast and to set."""
    return load(hart_tiny, text_tiny, torch.float32)


def load(checkpoint: Path, text: Path, dtype: torch.dtype) -> HartPipeline:
    return HartPipeline.from_pretrained(checkpoint, text_encoder=text, torch_dtype=dtype, device="cpu")


def latent(pipe: HartPipeline, prompt: Any = "a cat", **options: Any) -> Tensor:
    return pipe(prompt, **{"seed": 0, "output_type": "latent", **options}).images


def relative(given: Tensor, expected: Tensor) -> float:
    return ((given - expected).abs().max() / expected.abs().max()).item()


def indices_of(scales: list[Scale]) -> Tensor:
    """All scales' codes [B, tokens]."""
    of_stage: dict[int, list[Tensor]] = {}  # in the order of the images, whether they run side by side or one after the other
    for scale in scales:
        of_stage.setdefault(scale.stage.index, []).append(scale.indices)
    return torch.cat([torch.cat(parts) for parts in of_stage.values()], dim=1)


def interrupt_at(module: nn.Module, call: int, error: BaseException) -> Any:
    """Raise `error` when `module` is run for the `call`-th time; returns the hook."""
    calls = iter(range(1, 1000))

    def hook(_module: nn.Module, _args: Any) -> None:
        if next(calls) == call:
            raise error

    return module.register_forward_pre_hook(hook)


# What comes back.


def test_pictures_are_pil_images_unless_asked_otherwise(pipe: HartPipeline) -> None:
    output = pipe("a cat")
    assert isinstance(output, HartOutput)
    (picture,) = output.images
    assert isinstance(picture, Image.Image)
    assert (picture.mode, picture.size) == ("RGB", (PIXELS, PIXELS))


@pytest.mark.parametrize(
    ("output_type", "kind", "shape"),
    [
        ("np", np.ndarray, (4, PIXELS, PIXELS, 3)),
        ("pt", Tensor, (4, 3, PIXELS, PIXELS)),
        ("latent", Tensor, (4, CHANNELS, SIDES[-1], SIDES[-1])),
    ],
)
def test_arrays_have_their_shape_and_are_fp32(pipe: HartPipeline, output_type: Any, kind: type, shape: tuple[int, ...]) -> None:
    images = pipe(["a", "b"], num_images_per_prompt=2, output_type=output_type).images
    assert isinstance(images, kind)
    assert tuple(images.shape) == shape
    assert str(images.dtype).removeprefix("torch.") == "float32"
    assert np.isfinite(np.asarray(images)).all()
    assert output_type == "latent" or (images.min() >= 0 and images.max() <= 1)


def test_all_forms_are_of_one_picture(pipe: HartPipeline) -> None:
    pt, array, pil = (pipe("a cat", seed=3, output_type=form).images for form in ("pt", "np", "pil"))
    assert np.array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    assert np.array_equal(np.asarray(pil[0]), np.round(array[0] * 255).astype(np.uint8))
    decoded = pipe.autoencoder.decode(latent(pipe, seed=3))
    assert torch.equal((decoded + 1) / 2, pt)


@pytest.mark.parametrize("output_type", ["pt", "latent"])
def test_tensors_are_the_caller_s_to_change(pipe: HartPipeline, output_type: Any) -> None:
    images = pipe("a cat", output_type=output_type).images
    images.mul_(2)  # an inference tensor would refuse
    assert images.requires_grad_().sum().requires_grad


def test_a_tuple_if_asked(pipe: HartPipeline) -> None:
    result = pipe("a cat", seed=3, return_dict=False)
    assert isinstance(result, tuple)
    (images,) = result
    assert images[0].tobytes() == pipe("a cat", seed=3).images[0].tobytes()


def test_the_one_size_may_be_named(pipe: HartPipeline) -> None:
    assert pipe.sizes == (PIXELS,)
    assert torch.equal(latent(pipe, size=PIXELS), latent(pipe))


# Seeds.


def test_a_seed_redraws_its_picture_and_another_does_not(pipe: HartPipeline) -> None:
    assert torch.equal(latent(pipe, seed=5), latent(pipe, seed=5))
    assert not torch.equal(latent(pipe, seed=5), latent(pipe, seed=6))


def test_reported_seeds_redraw_the_pictures(pipe: HartPipeline) -> None:
    output = pipe("a cat", num_images_per_prompt=2, output_type="latent")
    assert output.seeds != pipe("a cat", num_images_per_prompt=2).seeds
    assert torch.equal(latent(pipe, num_images_per_prompt=2, seed=output.seeds), output.images)


def test_a_fresh_generator_is_its_seed_and_a_used_one_goes_on(pipe: HartPipeline) -> None:
    generator = torch.Generator().manual_seed(5)
    first = pipe("a cat", generator=generator, output_type="latent")
    second = pipe("a cat", generator=generator, output_type="latent")
    assert first.seeds == [5]
    assert torch.equal(first.images, latent(pipe, seed=5))
    assert not torch.equal(second.images, first.images)
    assert torch.equal(second.images, latent(pipe, seed=second.seeds))


def test_a_list_of_generators_is_a_list_of_seeds(pipe: HartPipeline) -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in (9, 4)]
    output = pipe(["a", "b"], generator=generators, output_type="latent")
    assert output.seeds == [9, 4]
    assert torch.equal(output.images, latent(pipe, ["a", "b"], seed=[9, 4]))


def test_no_global_randomness_is_used_or_touched(pipe: HartPipeline) -> None:
    torch.manual_seed(0)
    first = latent(pipe)
    before = torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(latent(pipe), first)
    torch.manual_seed(0)
    pipe("a cat")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_seed_reproduces_in_another_process(pipe: HartPipeline, hart_tiny: Path, text_tiny: Path) -> None:
    code = (  # what torch and transformers, or torchao through them, say as they are imported is not ours
        "import hashlib, sys, torch; from transformers import Qwen2Model; print('imported', file=sys.stderr, flush=True);"
        "from hart_infer import HartPipeline;"
        f"torch.set_num_threads({torch.get_num_threads()});"
        "pipe = HartPipeline.from_pretrained(sys.argv[1], text_encoder=sys.argv[2], torch_dtype=torch.float32, device='cpu');"
        "images = pipe(['a cat', 'b'], seed=5, num_images_per_prompt=2).images;"
        "print([hashlib.sha256(image.tobytes()).hexdigest() for image in images])"
    )
    command = [sys.executable, "-c", code, str(hart_tiny), str(text_tiny)]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    here = pipe(["a cat", "b"], seed=5, num_images_per_prompt=2).images
    assert run.stdout.strip() == str([hashlib.sha256(image.tobytes()).hexdigest() for image in here])
    assert run.stderr.partition("imported\n")[1:] == ("imported\n", "")


@pytest.mark.parametrize(
    "settings",
    [lambda: torch.autocast("cpu", torch.bfloat16), lambda: use_backend("torch")],
    ids=["autocast", "backend"],
)
def test_a_call_leaves_nothing_of_its_settings_to_the_next(
    hart_tiny: Path, text_tiny: Path, settings: Callable[[], AbstractContextManager[None]]
) -> None:
    def pictures(pipe: HartPipeline) -> Tensor:
        return pipe("a cat", seed=1, output_type="latent").images

    pipe, other = (load(hart_tiny, text_tiny, torch.float32) for _ in range(2))
    with settings():
        pictures(pipe)
        kept = pipe.engine.unconditional()
        assert pipe.engine.unconditional() is kept
    assert torch.equal(pictures(pipe), pictures(other))
    assert pipe.engine.unconditional() is not kept


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="PyTorch has only the older settings")
def test_the_newer_settings_of_precision_are_no_hindrance(pipe: HartPipeline) -> None:
    """PyTorch's older getter raises once they were used."""
    matmul, expected = torch.backends.cuda.matmul, pipe("a cat", seed=1, output_type="latent").images
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        assert torch.equal(pipe("a cat", seed=1, output_type="latent").images, expected)
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize("more_smooth", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"guidance_scale": 0.0}, {"negative_prompt": "ugly"}, {"top_k": 50, "top_p": 0.9}],
    ids=lambda o: ",".join(o),
)
def test_an_image_does_not_depend_on_its_batch(
    pipe: HartPipeline, scales: list[Scale], more_smooth: bool, options: dict[str, Any]
) -> None:
    prompts = ["a cat", "a photo of a fox", "zz"]
    batch = pipe(prompts, num_images_per_prompt=2, seed=5, output_type="latent", more_smooth=more_smooth, **options)
    codes = indices_of(scales)
    assert batch.seeds == [5, 6, 7, 8, 9, 10]
    for i, seed in enumerate(batch.seeds):
        scales.clear()
        alone = latent(pipe, prompts[i // 2], seed=seed, more_smooth=more_smooth, **options)
        assert torch.equal(indices_of(scales), codes[i : i + 1])
        assert torch.equal(alone, batch.images[i : i + 1])


# Guidance, negative prompts, steps.


def rows_run(pipe: HartPipeline, **options: Any) -> int:
    """Rows of the transformer's batch in all, at the last scale, of a call for two images."""
    seen: list[tuple[int, int]] = []
    hook = pipe.transformer.register_forward_pre_hook(lambda _module, args: seen.append(args[0].shape[:2]))
    latent(pipe)  # the unconditional context is encoded once per load, so before
    seen.clear()
    latent(pipe, ["a", "b"], **options)
    hook.remove()
    return sum(rows for rows, tokens in seen if tokens == SIDES[-1] ** 2)


def test_without_guidance_half_the_rows_run(pipe: HartPipeline) -> None:
    assert rows_run(pipe) == 4
    assert rows_run(pipe, negative_prompt="ugly") == 4
    assert rows_run(pipe, guidance_scale=0) == 2
    assert rows_run(pipe, guidance_scale=0, negative_prompt="ugly") == 2


def test_no_guidance_is_the_limit_of_little_guidance(pipe: HartPipeline, scales: list[Scale]) -> None:
    none = latent(pipe, guidance_scale=0, more_smooth=False)
    codes = indices_of(scales)
    scales.clear()
    little = latent(pipe, guidance_scale=1e-9, more_smooth=False)  # moves an fp32 logit by its rounding at most
    assert torch.equal(indices_of(scales), codes)
    assert relative(little, none) <= HARD


def test_guidance_matters(pipe: HartPipeline) -> None:
    assert not torch.equal(latent(pipe, guidance_scale=0), latent(pipe))
    assert not torch.equal(latent(pipe, guidance_scale=9), latent(pipe))


def test_a_negative_prompt_changes_the_picture_where_there_is_guidance(pipe: HartPipeline) -> None:
    assert not torch.equal(latent(pipe, negative_prompt="ugly"), latent(pipe))
    assert not torch.equal(latent(pipe, negative_prompt="ugly"), latent(pipe, negative_prompt="a dog"))
    assert torch.equal(latent(pipe, negative_prompt="ugly", guidance_scale=0), latent(pipe, guidance_scale=0))


@pytest.mark.parametrize("nothing", [None, ""])
def test_no_negative_prompt_is_the_unconditional_context(pipe: HartPipeline, nothing: str | None) -> None:
    assert torch.equal(latent(pipe, negative_prompt=nothing), latent(pipe))


def test_one_negative_prompt_serves_all(pipe: HartPipeline) -> None:
    one, each = (latent(pipe, ["a", "b"], negative_prompt=given) for given in ("ugly", ["ugly", "ugly"]))
    assert torch.equal(one, each)
    assert torch.equal(one, latent(pipe, ["a", "b"], negative_prompt=["ugly"]))


def test_every_prompt_gets_its_own_negative_one(pipe: HartPipeline) -> None:
    options = {"num_images_per_prompt": 2, "more_smooth": False, "seed": [1, 1, 1, 1]}
    both = latent(pipe, ["a", "b"], negative_prompt=["ugly", "blurred"], **options)
    swapped = latent(pipe, ["b", "a"], negative_prompt=["blurred", "ugly"], **options)
    assert torch.equal(both, swapped[[2, 3, 0, 1]])


def test_the_kept_unconditional_context_survives(pipe: HartPipeline) -> None:
    before = latent(pipe)
    kept = pipe.engine.unconditional()
    keys = kept.keys.clone()
    latent(pipe, negative_prompt="ugly")
    latent(pipe, ["a", "b"], num_images_per_prompt=2)
    latent(pipe, guidance_scale=0)
    assert pipe.engine.unconditional() is kept
    assert torch.equal(kept.keys, keys)
    assert torch.equal(latent(pipe), before)


@pytest.mark.parametrize("more_smooth", [True, False])
def test_no_steps_leave_the_residual_out(pipe: HartPipeline, scales: list[Scale], more_smooth: bool) -> None:
    latent(pipe, num_inference_steps=8, more_smooth=more_smooth)
    with_residual, codes = scales[-1].f_hat, indices_of(scales)
    scales.clear()
    latent(pipe, num_inference_steps=0, more_smooth=more_smooth)
    assert torch.equal(indices_of(scales), codes)
    assert not torch.equal(scales[-1].f_hat, with_residual)
    if not more_smooth:  # the codes alone make up the latent
        quantizer, f_hat = pipe.autoencoder.quantizer, torch.zeros(1, CHANNELS, SIDES[-1], SIDES[-1])
        for scale in scales:
            f_hat = f_hat + quantizer.contribution(quantizer.embed(scale.indices), scale.stage.phi)
            assert torch.equal(scale.f_hat, f_hat)


def test_the_steps_only_change_the_residual(pipe: HartPipeline, scales: list[Scale]) -> None:
    _differ_in_the_residual_alone(pipe, scales, {"num_inference_steps": 2}, {"num_inference_steps": 20})


def test_the_residual_temperature_only_changes_the_residual(pipe: HartPipeline, scales: list[Scale]) -> None:
    _differ_in_the_residual_alone(pipe, scales, {"residual_temperature": 0}, {"residual_temperature": 1.0})
    assert torch.equal(latent(pipe), latent(pipe, residual_temperature=1.0))


def test_the_residual_temperature_is_the_checkpoint_s(pipe: HartPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    calm = latent(pipe, residual_temperature=0.25)
    monkeypatch.setattr(pipe, "defaults", replace(pipe.defaults, residual_temperature=0.25))
    assert torch.equal(latent(pipe), calm)


def _differ_in_the_residual_alone(pipe: HartPipeline, scales: list[Scale], one: dict[str, Any], other: dict[str, Any]) -> None:
    few, many = latent(pipe, **one), latent(pipe, **other)
    first, second = scales[: len(SIDES)], scales[len(SIDES) :]
    assert torch.equal(indices_of(first), indices_of(second))
    assert torch.equal(first[-2].f_hat, second[-2].f_hat)
    assert not torch.equal(few, many)


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}])
def test_the_best_code_only_needs_no_seed(pipe: HartPipeline, scales: list[Scale], options: dict[str, Any]) -> None:
    latent(pipe, seed=[1, 2], num_images_per_prompt=2, more_smooth=False, **options)
    assert torch.equal(*indices_of(scales).split(1))


# Prompts encoded before.


@pytest.mark.parametrize("use_system_prompt", [True, False])
def test_encoded_prompts_give_the_same_picture(pipe: HartPipeline, use_system_prompt: bool) -> None:
    embeds = pipe.encode_prompt(["a cat", "b"], use_system_prompt=use_system_prompt)
    from_embeds = latent(pipe, None, prompt_embeds=embeds, num_images_per_prompt=2)
    assert torch.equal(from_embeds, latent(pipe, ["a cat", "b"], num_images_per_prompt=2, use_system_prompt=use_system_prompt))


def test_the_system_prompt_changes_the_picture(pipe: HartPipeline) -> None:
    assert not torch.equal(latent(pipe), latent(pipe, use_system_prompt=False))


@pytest.mark.filterwarnings("ignore:Prompt 0 has")
def test_a_plain_tensor_is_a_context_without_padding(pipe: HartPipeline) -> None:
    filled = "a photo of a red fox in the snow"
    embeds = pipe.encode_prompt(filled)
    assert embeds.mask.all()
    expected = latent(pipe, filled)
    for given in (embeds.context, embeds.context.clone().double(), PromptEmbeds(embeds.context, embeds.mask)):
        assert torch.equal(latent(pipe, None, prompt_embeds=given), expected)


# The callback.


@pytest.mark.parametrize("count", [1, 2])
def test_the_callback_sees_every_scale_in_order(pipe: HartPipeline, count: int) -> None:
    seen: list[tuple[int, int, int]] = []
    latents: list[Tensor] = []

    def look(step: Step) -> None:
        seen.append((step.index, step.side, step.num_scales))
        latents.append(step.f_hat.clone())

    final = latent(pipe, num_images_per_prompt=count, callback_on_step_end=look)
    assert seen == [(index, side, len(SIDES)) for index, side in enumerate(SIDES)]
    assert {(f_hat.shape, f_hat.dtype) for f_hat in latents} == {((count, CHANNELS, SIDES[-1], SIDES[-1]), torch.float32)}
    assert torch.equal(latents[-1], final)
    assert not any(torch.equal(a, b) for a, b in zip(latents, latents[1:], strict=False))


def test_looking_changes_nothing(pipe: HartPipeline) -> None:
    assert torch.equal(latent(pipe, callback_on_step_end=Step.preview), latent(pipe))


def test_previews_are_full_size_and_the_last_is_the_picture(pipe: HartPipeline) -> None:
    previews: list[list[Image.Image]] = []
    images = pipe(["a", "b"], seed=0, callback_on_step_end=lambda step: previews.append(step.preview())).images
    assert [len(pictures) for pictures in previews] == [2] * len(SIDES)
    assert {picture.size for pictures in previews for picture in pictures} == {(PIXELS, PIXELS)}
    assert [picture.tobytes() for picture in previews[-1]] == [image.tobytes() for image in images]


@pytest.mark.parametrize("last", [0, 3, len(SIDES) - 1])
def test_stop_ends_with_that_scale_s_preview(pipe: HartPipeline, caches: list[StorageWeakRef], last: int) -> None:
    previews: list[Image.Image] = []

    def stop(step: Step) -> None:
        previews[:] = step.preview()
        if step.index == last:
            step.stop()
        assert step.index <= last

    output = pipe("a cat", seed=4, callback_on_step_end=stop)
    assert output.seeds == [4]
    assert output.images[0].tobytes() == previews[0].tobytes()
    assert all(cache.expired() for cache in caches)


@pytest.mark.parametrize(("options", "at_once"), [({}, 1), ({"callback_on_step_end": lambda step: None}, 4)], ids=["", "seen"])
def test_images_take_turns_with_one_cache_unless_a_callback_sees_them_all(
    pipe: HartPipeline, caches: list[StorageWeakRef], monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], at_once: int
) -> None:
    given = {"negative_prompt": "ugly", **options}
    expected = torch.cat([latent(pipe, prompt, seed=3 + i, **given) for i, prompt in enumerate(["a", "a", "b", "b"])])
    held: list[int] = []
    allocate = Engine._allocate

    def spy(*args: Any) -> KVCache:
        held.append(1 + sum(not cache.expired() for cache in caches))
        return allocate(*args)

    monkeypatch.setattr(Engine, "_allocate", spy)
    assert torch.equal(latent(pipe, ["a", "b"], seed=3, num_images_per_prompt=2, **given), expected)
    assert max(held) == at_once


def test_a_prompt_goes_through_the_transformer_once_whatever_the_number_of_its_images(pipe: HartPipeline) -> None:
    seen: list[int] = []
    hook = pipe.transformer.register_forward_pre_hook(lambda _module, args: seen.append(args[0].shape[1]))
    try:
        latent(pipe)  # the unconditional context goes through once per load, so before
        for options, times in (
            ({}, 2),
            ({"guidance_scale": 0}, 2),
            ({"negative_prompt": "ugly"}, 3),
            ({"negative_prompt": ["x", "y"]}, 4),
        ):
            seen.clear()
            latent(pipe, ["a", "b"], num_images_per_prompt=3, **options)
            assert seen.count(pipe.transformer.config.context_token) == times
    finally:
        hook.remove()


def test_an_interruption_leaves_black_what_is_not_begun(own: HartPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    run_scale = Engine.run_scale

    def interrupting(self: Engine, states: Any, stage: Stage) -> None:
        run_scale(self, states, stage)
        ran.append(stage.index)
        own._interrupt = len(ran) == len(SIDES) + 2

    monkeypatch.setattr(Engine, "run_scale", interrupting)
    whole, cut, black = own("a cat", seed=0, num_images_per_prompt=3, output_type="pt").images
    assert ran == [*range(len(SIDES)), 0, 1]
    assert torch.equal(whole, own("a cat", seed=0, output_type="pt").images[0])
    assert cut.any() and not black.any()


# When it doesn't end well.


@pytest.mark.parametrize("bar", [False, True])
@pytest.mark.parametrize("error", [KeyError("mine"), KeyboardInterrupt(), RuntimeError("mine"), SystemExit(3)], ids=repr)
def test_an_error_of_the_callback_passes_and_frees_the_cache(
    own: HartPipeline, caches: list[StorageWeakRef], error: BaseException, bar: bool
) -> None:
    own.set_progress_bar_config(disable=not bar, file=io.StringIO())
    before = latent(own)

    def fail(step: Step) -> None:
        if step.index == 3:
            assert not caches[-1].expired()  # the references do see a live cache
            raise error

    with pytest.raises(type(error)) as caught:
        own("a cat", callback_on_step_end=fail)
    assert caught.value is error  # still held, with its traceback, as a notebook would
    assert len(caches) == 2
    assert all(cache.expired() for cache in caches)
    assert torch.equal(latent(own), before)


@pytest.mark.parametrize("bar", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_ctrl_c_within_the_model_frees_the_caches(
    own: HartPipeline, caches: list[StorageWeakRef], count: int, bar: bool
) -> None:
    own.set_progress_bar_config(disable=not bar, file=io.StringIO())
    before = latent(own)
    hook = interrupt_at(own.transformer.blocks[1].mlp, 5 * count, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt) as caught:
        own("a cat", num_images_per_prompt=count)
    assert caught.tb is not None  # held while we look
    assert len(caches) > 1
    assert all(cache.expired() for cache in caches)
    hook.remove()
    assert torch.equal(latent(own), before)


@pytest.mark.parametrize("call", [1, 2])
def test_ctrl_c_before_the_unconditional_context_is_kept_keeps_none_of_it(own: HartPipeline, call: int) -> None:
    hook = interrupt_at(own.transformer.blocks[2], call, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        own("a cat")
    hook.remove()
    interrupted = latent(own)
    own.engine.clear()  # the unconditional context is encoded anew
    assert torch.equal(latent(own), interrupted)


def cpu_allocator_s_error() -> RuntimeError:
    """What torch raises on this machine for more memory than there is."""
    try:
        torch.empty(2**58, dtype=torch.uint8)
    except RuntimeError as error:
        return error
    raise AssertionError("2^58 bytes were allocated")


OUT_OF_MEMORY: list[Callable[[], BaseException]] = [
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    lambda: RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)."),
    cpu_allocator_s_error,
    MemoryError,
]


@pytest.mark.parametrize("make", OUT_OF_MEMORY, ids=["cuda", "cublas", "mps", "cpu", "python"])
@pytest.mark.parametrize("where", ["text", "scales", "decoder", "preview", "reconstruct"])
def test_out_of_memory_says_what_to_turn_down_and_frees(
    own: HartPipeline, caches: list[StorageWeakRef], make: Callable[[], BaseException], where: str
) -> None:
    before = latent(own)
    error = make()
    decoder = own.autoencoder.post_quant_conv
    module = {"text": own.text_encoder.model.layers[0], "scales": own.transformer.blocks[1].mlp}.get(where, decoder)
    hook = interrupt_at(module, 3 if where == "scales" else 1, error)
    with pytest.raises(OutOfMemoryError, match=r"num_images_per_prompt.*bfloat16.*enable_decoder_tiling.*\.$") as caught:
        if where == "reconstruct":
            own.reconstruct(torch.zeros(1, 3, PIXELS, PIXELS))
        else:
            own("a cat", callback_on_step_end=Step.preview if where == "preview" else None)
    assert caught.value.__cause__ is error
    assert all(cache.expired() for cache in caches)
    hook.remove()
    assert torch.equal(latent(own), before)


def test_other_runtime_errors_pass_unchanged(own: HartPipeline) -> None:
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    interrupt_at(own.transformer.blocks[1].mlp, 3, error)
    with pytest.raises(RuntimeError) as caught:
        own("a cat")
    assert caught.value is error


def test_nothing_stays_after_a_call(pipe: HartPipeline, caches: list[StorageWeakRef]) -> None:
    gc.disable()
    try:
        output = pipe("a cat", output_type="latent", num_images_per_prompt=2)
        assert caches
        assert all(cache.expired() for cache in caches)  # by themselves, without the collector of cycles
    finally:
        gc.enable()
    assert output.images.untyped_storage().nbytes() == output.images.nbytes


def test_threads_may_share_a_pipeline(pipe: HartPipeline) -> None:
    seeds = range(6)
    expected = [latent(pipe, seed=seed) for seed in seeds]
    with ThreadPoolExecutor(max_workers=3) as threads:
        found = list(threads.map(lambda seed: latent(pipe, seed=seed), seeds))
    assert all(torch.equal(found[seed], expected[seed]) for seed in seeds)


# The bar, and silence.


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "options", "shows"),
    [
        (Terminal, {}, True),
        (io.StringIO, {}, False),
        (Terminal, {"disable": True}, False),
        (io.StringIO, {"disable": False}, True),
    ],
)
def test_the_bar_shows_on_terminals_unless_told(
    own: HartPipeline, stream: type[io.StringIO], options: Any, shows: bool
) -> None:
    own.set_progress_bar_config(file=(written := stream()), **options)
    own("a cat")
    assert ("6/6" in written.getvalue()) == shows
    assert shows or written.getvalue() == ""


@pytest.mark.parametrize(
    ("callback", "shown"), [(None, "18/18"), (lambda step: None, "6/6"), (lambda step: step.index == 2 and step.stop(), "3/6")]
)
def test_the_bar_counts_the_scales_that_run(own: HartPipeline, callback: Any, shown: str) -> None:
    """Of all images where they take turns."""
    own.set_progress_bar_config(file=(written := io.StringIO()), disable=False)
    own("a cat", num_images_per_prompt=3, callback_on_step_end=callback)
    assert f" {shown} " in written.getvalue().split("\r")[-1]


def test_the_bar_takes_tqdm_s_options_one_by_one(own: HartPipeline) -> None:
    own.set_progress_bar_config(file=(written := io.StringIO()), disable=False)
    own.set_progress_bar_config(desc="painting", bar_format="{desc}: {n_fmt} of {total_fmt}")
    own("a cat")
    assert "painting: 6 of 6" in written.getvalue()


@pytest.mark.filterwarnings("ignore:Prompt")
def test_the_library_is_silent_and_keeps_prompts_to_itself(
    hart_tiny: Path, text_tiny: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    secret = "zebrafish quokka marzipan"
    logging.getLogger("hart_infer").setLevel(logging.DEBUG)
    with caplog.at_level(logging.DEBUG), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        own = load(hart_tiny, text_tiny, torch.float32)
        own(secret, negative_prompt=f"{secret}, ugly", callback_on_step_end=Step.preview)
        own.encode_prompt([secret, secret])
        own.reconstruct(Image.new("RGB", (PIXELS, PIXELS)))
        with pytest.raises(ValueError) as caught:
            own([secret, 3])
        with pytest.raises(RuntimeError) as failed:
            interrupt_at(own.transformer.blocks[0], 1, MemoryError())
            own(secret)
    assert capfd.readouterr() == ("", "")
    said = [caplog.text, str(caught.value), str(failed.value), own.describe(), *(str(warning.message) for warning in warned)]
    assert any("was cut" in line for line in said)
    for word in secret.split():
        assert not any(word in line for line in said)


# Devices and dtypes.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_end_to_end(hart_tiny: Path, text_tiny: Path, dtype: torch.dtype) -> None:
    half = load(hart_tiny, text_tiny, dtype)
    assert half.dtype == half.autoencoder.post_quant_conv.weight.dtype == half.text_encoder.model.dtype == dtype
    previews: list[Tensor] = []
    images = half(
        ["a", "b"], seed=0, negative_prompt="c", output_type="pt", callback_on_step_end=lambda step: previews.append(step.f_hat)
    ).images
    assert images.dtype == torch.float32
    assert images.isfinite().all()
    assert images.std() > 0.05
    assert {f_hat.dtype for f_hat in previews} == {torch.float32}
    again = half(["a", "b"], seed=0, negative_prompt="c", output_type="pt").images
    assert torch.equal(images, again)
    assert half.reconstruct(images).dtype == torch.float32


def dtypes(pipe: HartPipeline) -> set[torch.dtype]:
    """Of everything that may be cast."""
    parts = [pipe.transformer, pipe.text_encoder.model, pipe.autoencoder.encoder, pipe.autoencoder.decoder]
    return {parameter.dtype for part in parts for parameter in part.parameters()} | {pipe.dtype}


def devices(pipe: HartPipeline) -> set[str]:
    parts = [pipe.transformer, pipe.text_encoder.model, pipe.autoencoder]
    return {parameter.device.type for part in parts for parameter in part.parameters()} | {pipe.device.type}


@pytest.mark.parametrize(
    ("args", "kwargs", "device", "dtype"),
    [
        ((), {}, "cpu", torch.float32),
        (("meta",), {}, "meta", torch.float32),
        ((torch.device("meta"),), {}, "meta", torch.float32),
        ((torch.bfloat16,), {}, "cpu", torch.bfloat16),
        (("meta", torch.float16), {}, "meta", torch.float16),
        ((torch.float16, "meta"), {}, "meta", torch.float16),
        (("meta",), {"dtype": torch.float16}, "meta", torch.float16),
        ((), {"device": "meta", "dtype": torch.bfloat16}, "meta", torch.bfloat16),
        ((), {"device": "meta"}, "meta", torch.float32),
        ((), {"dtype": torch.bfloat16}, "cpu", torch.bfloat16),
    ],
)
def test_to_moves_and_casts(
    own: HartPipeline, args: Any, kwargs: Any, device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hart_infer.pipelines.base.check_device", torch.device)  # a device of another kind, on this machine
    assert own.to(*args, **kwargs) is own
    assert devices(own) == {device}
    assert dtypes(own) == {dtype}
    assert {parameter.dtype for parameter in own.autoencoder.quantizer.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.int8, r"must be one of .*float16, not torch.int8\.$"),
        (torch.float64, r"not torch.float64\.$"),
        (torch.complex64, r"not torch.complex64\.$"),
        ("nope", r"'nope' is not a device; .*\.$"),
        ("meta", r"'meta' is not a device that hart_infer runs on; cpu, cuda, mps are\.$"),
        ("xpu", r"'xpu' is not a device that hart_infer runs on; "),
        ("vulkan", r"'vulkan' is not a device that hart_infer runs on; "),
        ("cuda:99", r"cuda:99 is not here: torch .* sees .* CUDA devices\.$"),
    ],
)
def test_to_refuses_what_is_not_there_and_leaves_all_as_it_was(own: HartPipeline, wrong: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        own.to(wrong)
    assert (devices(own), dtypes(own)) == ({"cpu"}, {torch.float32})


def test_to_takes_no_other_options(own: HartPipeline) -> None:
    with pytest.raises(TypeError, match="dtyp"):
        own.to(dtyp=torch.bfloat16)  # type: ignore[call-arg]


def test_what_was_cast_is_what_was_loaded_so(own: HartPipeline, hart_tiny: Path, text_tiny: Path) -> None:
    latent(own)  # so that there is an unconditional context and a system prompt to forget
    own.to(torch.bfloat16)
    assert torch.equal(latent(own), latent(load(hart_tiny, text_tiny, torch.bfloat16)))


# Decoding in tiles.


def large_latent(pipe: HartPipeline) -> Tensor:
    """Sixteen generated latents side by side: [1, C, 32, 32]."""
    grid = latent(pipe, ["a", "b"], num_images_per_prompt=8).view(4, 4, CHANNELS, 8, 8)
    return grid.permute(2, 0, 3, 1, 4).reshape(1, CHANNELS, 32, 32)


@pytest.mark.parametrize("tile", [32, 33, 1000])
def test_a_tile_that_covers_the_picture_changes_nothing(pipe: HartPipeline, tile: int) -> None:
    whole = large_latent(pipe)
    assert torch.equal(pipe.autoencoder.decode(whole, tile=tile), pipe.autoencoder.decode(whole))


def test_smaller_tiles_come_near_the_nearer_the_larger(pipe: HartPipeline) -> None:
    given = large_latent(pipe)
    whole = pipe.autoencoder.decode(given)
    tiled = [pipe.autoencoder.decode(given, tile=tile) for tile in (8, 16, 24)]
    errors = [(picture - whole).square().mean().sqrt().item() for picture in tiled]
    assert all(picture.shape == whole.shape and picture.abs().max() <= 1 for picture in tiled)
    assert 0 < errors[2] < errors[1] < errors[0]
    # Group norms make the error, so it has no bound of its own. A wrong place or order would make another picture of the
    # same spread: sqrt(2) standard deviations.
    assert errors[0] < 2**0.5 / 2 * whole.std()


@pytest.mark.parametrize(("height", "width", "tile"), [(32, 32, 8), (32, 32, 12), (20, 33, 8), (9, 9, 8), (64, 16, 17)])
def test_tiles_of_a_local_map_make_the_whole(height: int, width: int, tile: int) -> None:
    given = torch.randn(2, 3, height, width)
    enlarge = nn.Upsample(scale_factor=2, mode="nearest")
    # A weighted mean of equal numbers: two roundings in each of up to four weights and sums.
    torch.testing.assert_close(tiling.tiled(enlarge, given, tile), enlarge(given), rtol=16 * 2**-24, atol=1e-6)


@pytest.mark.parametrize(("side", "tile"), [(32, 8), (32, 12), (64, 20)])
def test_tiles_that_differ_blend_without_a_seam(side: int, tile: int) -> None:
    levels = iter(torch.rand(1000, generator=torch.Generator().manual_seed(0)).tolist())

    def one_level_per_tile(part: Tensor) -> Tensor:
        return torch.full_like(part, next(levels))

    blended = tiling.tiled(one_level_per_tile, torch.empty(1, 1, side, side), tile)
    # Over the overlap the share moves from one tile to the next by at most 1 / (overlap + 1) a pixel; the levels are 0..1.
    overlap = tile // tiling.OVERLAP
    for steps in (blended.diff(dim=-1), blended.diff(dim=-2)):
        assert steps.abs().max() <= 1 / (overlap + 1) + 1e-6
    assert 0 <= blended.min() < blended.max() <= 1


def test_tiles_of_a_convolution_are_exact_inside(pipe: HartPipeline) -> None:
    torch.manual_seed(0)
    stack = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Upsample(scale_factor=2), nn.Conv2d(4, 2, 3, padding=1))
    given = torch.randn(1, 2, 32, 32)
    with torch.no_grad():
        difference = (tiling.tiled(stack, given, 16) - stack(given)).abs().amax(dim=(0, 1))
    reach = 3  # pixels: 1 of the second convolution and 2 of the first, enlarged
    starts = tiling._starts(32, 16)
    borders = [2 * edge for start in starts for edge in (start, start + 16) if 0 < edge < 32]
    near = torch.tensor([min(abs(pixel + 0.5 - border) for border in borders) < reach for pixel in range(64)])
    assert difference[~near][:, ~near].max() <= 1e-5
    assert difference.max() > 1e-3  # at the borders the tiles see zeros instead of the neighbour


def test_tiling_is_turned_on_and_off(pipe: HartPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int | None] = []
    decode = pipe.autoencoder.decode

    def spy(given: Tensor, *, tile: int | None = None) -> Tensor:
        asked.append(tile)
        return decode(given, tile=tile)

    monkeypatch.setattr(pipe.autoencoder, "decode", spy)
    for tile in (None, 16, None):
        pipe.enable_decoder_tiling(tile)
        pipe("a cat")
    pipe.enable_decoder_tiling()
    pipe("a cat")
    assert asked == [None, 16, None, 32]


def test_a_batch_is_decoded_one_by_one_on_the_cpu(pipe: HartPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    decode = pipe.autoencoder.decode
    monkeypatch.setattr(pipe.autoencoder, "decode", lambda given, tile: sizes.append(len(given)) or decode(given, tile=tile))
    together = pipe(["a", "b"], seed=3, output_type="pt").images
    assert sizes == [1, 1]
    assert torch.equal(together[1:], pipe("b", seed=4, output_type="pt").images)


@pytest.mark.parametrize(
    ("device", "reproducible", "limit", "together"),
    [
        ("cpu", None, 8, 1),
        ("cpu", True, 8, 1),
        ("cpu", False, 8, 8),
        ("cuda", None, 8, 8),
        ("cuda", True, 8, 1),
        ("mps", None, 1, 1),
        ("cuda", None, 0, 1),
    ],
)
def test_how_many_images_go_together(
    own: HartPipeline, monkeypatch: pytest.MonkeyPatch, device: str, reproducible: bool | None, limit: int, together: int
) -> None:
    monkeypatch.setattr(type(own), "device", torch.device(device))
    assert own._batch_size(reproducible, limit) == together


def test_a_batch_may_go_together_on_the_cpu(pipe: HartPipeline, scales: list[Scale]) -> None:
    """Not to the bit what each is alone, but its codes where nothing is near a tie."""
    options = {"seed": [4, 5, 6], "more_smooth": False, "negative_prompt": ["x", "y", "z"]}
    alone = latent(pipe, ["a", "b", "c"], **options)
    codes = indices_of(scales)
    scales.clear()
    together = latent(pipe, ["a", "b", "c"], reproducible=False, **options)
    assert rows_run_together(scales) == 3
    assert torch.equal(indices_of(scales), codes)
    assert relative(together, alone) <= HARD


def rows_run_together(scales: list[Scale]) -> int:
    return len(scales[-1].indices)


def test_several_images_of_several_prompts_go_together(pipe: HartPipeline) -> None:
    """Each prompt is encoded once, and its rows repeated."""
    options = {"num_images_per_prompt": 2, "more_smooth": False}
    alone, together = (latent(pipe, ["a", "b"], reproducible=r, **options) for r in (True, False))
    assert relative(together, alone) <= HARD
    one_by_one = latent(pipe, ["a", "a", "b", "b"], reproducible=False, more_smooth=False)
    assert relative(together, one_by_one) <= HARD


# Weights that change.


def change(pipe: HartPipeline, how: str) -> None:
    """Other weights, in the ways in which weights change."""
    weight = pipe.transformer.blocks[0].mlp.gate.weight
    if how == "in place":
        with torch.no_grad():
            weight.mul_(1.5)
    elif how == "loaded":
        state = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
        state["blocks.0.mlp.gate.weight"] *= 1.5
        pipe.transformer.load_state_dict(state)
    else:
        weight.data = weight.data * 1.5


@pytest.mark.parametrize("how", ["in place", "loaded", "assigned"])
def test_the_kept_unconditional_context_does_not_outlive_the_weights(own: HartPipeline, how: str) -> None:
    before = latent(own)
    change(own, how)
    changed = latent(own)
    own.engine.clear()
    assert torch.equal(latent(own), changed)
    assert not torch.equal(changed, before)


# Image to tokens and back.


def picture(width: int = PIXELS, height: int = PIXELS) -> Image.Image:
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([across, down, 255 - across], axis=-1).astype(np.uint8))


@pytest.mark.parametrize("mode", ["hybrid", "discrete"])
def test_reconstruct_answers_in_kind(pipe: HartPipeline, mode: Any) -> None:
    one = pipe.reconstruct(picture(), mode)
    assert isinstance(one, Image.Image)
    assert one.size == (PIXELS, PIXELS)
    several = pipe.reconstruct([picture(), picture().rotate(90)], mode)
    assert [image.size for image in several] == [(PIXELS, PIXELS)] * 2
    assert several[0].tobytes() == one.tobytes()
    pixels = torch.from_numpy(np.asarray(picture()).astype(np.float32) / 255).permute(2, 0, 1)[None]
    tensor = pipe.reconstruct(pixels, mode)
    assert (tensor.shape, tensor.dtype) == ((1, 3, PIXELS, PIXELS), torch.float32)
    assert 0 <= tensor.min() <= tensor.max() <= 1
    assert np.array_equal(np.asarray(one), (tensor[0].permute(1, 2, 0) * 255).round().byte().numpy())


def test_the_two_reconstructions_differ(pipe: HartPipeline) -> None:
    assert pipe.reconstruct(picture(), "hybrid").tobytes() != pipe.reconstruct(picture(), "discrete").tobytes()
    assert pipe.reconstruct(picture()).tobytes() == pipe.reconstruct(picture(), "hybrid").tobytes()


def test_what_is_not_square_is_cropped(pipe: HartPipeline) -> None:
    wide = picture(2 * PIXELS, PIXELS)
    middle = wide.crop((PIXELS // 2, 0, PIXELS // 2 + PIXELS, PIXELS))
    assert pipe.reconstruct(wide).tobytes() == pipe.reconstruct(middle).tobytes()


def test_the_hybrid_reconstruction_decodes_the_encoder_s_latent(pipe: HartPipeline) -> None:
    pixels = torch.rand(2, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        direct = [(pipe.autoencoder.decode(pipe.autoencoder.encode_latent(one * 2 - 1)) + 1) / 2 for one in pixels.split(1)]
    assert torch.equal(pipe.reconstruct(pixels), torch.cat(direct))

"""VilaUPipeline draws, films and looks: seeds, settings, guidance, callbacks, pictures in; on a small random checkpoint."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import sys
import typing
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hart_infer import ImageOutput, InputError, OutOfMemoryError, OutputError, Step, VideoOutput, VilaUPipeline, WeightsError
from hart_infer.generation import next_token
from hart_infer.images.preprocess import pad, resize
from hart_infer.pipelines.conversation import ConversationPipeline
from tests.released_vila_u import CODES, DEPTH, GRID, SIGLIP, WIDTH, configs, write_checkpoint

SIDE = 8  # of drawn pictures
SEEN = SIGLIP["vision_config"]["image_size"]  # of pictures that are looked at
pytest.importorskip("sentencepiece", reason="the extra vila-u is not installed")  # by `make newest` and `make oldest`

LATENT = (GRID, GRID, WIDTH)
FRAMES = 3
PROMPTS = ["a cat", "two tall trees on a hill", "car"]


def released_checkpoint(folder: Path, root: dict[str, Any] | None = None, llm: dict[str, Any] | None = None) -> Path:
    """A random checkpoint, its weights so large that prompts and pictures matter, with some keys of its configs changed."""
    write_checkpoint(folder)
    for part in ("llm", "vision_tower", "mm_projector"):
        state = load_file(folder / part / "model.safetensors")
        for name, tensor in state.items():
            if not name.startswith(("rqvaesiglip.decoder", "rqvaesiglip.post_quant_conv")):
                tensor.mul_(4) if tensor.ndim > 1 else tensor.add_(name.endswith("weight"))
        save_file(state, folder / part / "model.safetensors")
    for name, changed in {"config.json": root, "llm/config.json": llm}.items():
        (folder / name).write_text(json.dumps({**configs()[name], **(changed or {})}))
    return folder


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that films few frames. Read only."""
    return released_checkpoint(tmp_path_factory.mktemp("released"), {"num_video_frames": FRAMES})


def load(folder: Path, **options: Any) -> VilaUPipeline:
    pipe = VilaUPipeline.from_pretrained(folder, device="cpu", **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe(released: Path) -> VilaUPipeline:
    """Loaded once; leave dtype, weights and settings alone."""
    return load(released)


@pytest.fixture
def own(released: Path) -> VilaUPipeline:
    """One of the test's own, to cast and to set."""
    return load(released)


def latent(pipe: VilaUPipeline, prompt: Any = "a cat", **options: Any) -> Tensor:
    images: Tensor = pipe(prompt, **{"seed": 0, "output_type": "latent", **options}).images
    return images


def noise(size: tuple[int, int] = (23, 17), mode: str = "RGB", seed: int = 0) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(levels).convert(mode)


# What comes back.


def test_pictures_are_pil_images_unless_asked_otherwise(pipe: VilaUPipeline) -> None:
    output = pipe("a cat")
    assert isinstance(output, ImageOutput)
    (picture,) = output.images
    assert (picture.mode, picture.size) == ("RGB", (SIDE, SIDE))


@pytest.mark.parametrize(
    ("output_type", "kind", "shape"),
    [("np", np.ndarray, (4, SIDE, SIDE, 3)), ("pt", Tensor, (4, 3, SIDE, SIDE)), ("latent", Tensor, (4, *LATENT))],
)
def test_arrays_have_their_shape_and_are_fp32(pipe: VilaUPipeline, output_type: Any, kind: type, shape: Any) -> None:
    images = pipe(PROMPTS[:2], num_images_per_prompt=2, output_type=output_type).images
    assert isinstance(images, kind)
    assert tuple(images.shape) == shape
    assert str(images.dtype).removeprefix("torch.") == "float32"
    assert output_type == "latent" or (images.min() >= 0 and images.max() <= 1)


def test_all_forms_are_of_one_picture_and_bytes_are_truncated(pipe: VilaUPipeline) -> None:
    pt, array, pil = (pipe("a cat", seed=3, output_type=form).images for form in ("pt", "np", "pil"))
    assert np.array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    assert np.array_equal(np.asarray(pil[0]), np.floor(array[0] * np.float32(255)).astype(np.uint8))
    decoded = pipe.vision_tower.decode(latent(pipe, seed=3))
    assert torch.equal(((decoded + 1) / 2).clamp(0, 1), pt)


def test_a_latent_is_the_sum_of_its_codes_rows(pipe: VilaUPipeline) -> None:
    """Nothing else is drawn than codes below the padding row."""
    books = [pipe.vision_tower.quantizer.codebook(depth) for depth in range(DEPTH)]
    assert len(books[0]) == CODES
    sums = (books[0][:, None, None] + books[1][:, None] + books[2]).flatten(0, 2)  # [K^3, C]
    position = latent(pipe)[0, 1, 2]
    assert (sums - position).abs().amax(dim=1).min() < 1e-6


def test_a_tuple_if_asked(pipe: VilaUPipeline) -> None:
    (images,) = pipe("a cat", seed=3, return_dict=False)
    assert images[0].tobytes() == pipe("a cat", seed=3).images[0].tobytes()


def test_the_one_size_may_be_named(pipe: VilaUPipeline) -> None:
    assert pipe.sizes == (SIDE,)
    assert torch.equal(latent(pipe, size=SIDE, height=SIDE, width=np.int64(SIDE)), latent(pipe))
    for name in ("size", "height", "width"):
        with pytest.raises(InputError, match=f"{name} 256 is not one .* it has 8"):
            pipe("a cat", **{name: 256})


# Seeds and batches.


def test_a_seed_redraws_its_picture_and_another_does_not(pipe: VilaUPipeline) -> None:
    assert torch.equal(latent(pipe, seed=5), latent(pipe, seed=5))
    assert not torch.equal(latent(pipe, seed=5), latent(pipe, seed=6))
    assert not torch.equal(latent(pipe, seed=5), latent(pipe, "a dog", seed=5))


def test_reported_seeds_redraw_the_pictures(pipe: VilaUPipeline) -> None:
    output = pipe("a cat", num_images_per_prompt=2, output_type="latent")
    assert output.seeds != pipe("a cat", num_images_per_prompt=2).seeds
    assert torch.equal(latent(pipe, num_images_per_prompt=2, seed=output.seeds), output.images)


def test_generators_are_seeds(pipe: VilaUPipeline) -> None:
    output = pipe("a cat", generator=torch.Generator().manual_seed(5), output_type="latent")
    assert output.seeds == [5]
    assert torch.equal(output.images, latent(pipe, seed=5))
    both = pipe(PROMPTS[:2], generator=[torch.Generator().manual_seed(seed) for seed in (9, 4)], output_type="latent")
    assert torch.equal(both.images, latent(pipe, PROMPTS[:2], seed=[9, 4]))
    with pytest.raises(InputError, match="contradict"):
        pipe("a cat", seed=1, generator=torch.Generator())


def test_a_refused_call_leaves_the_generator_alone(pipe: VilaUPipeline) -> None:
    generator = torch.Generator().manual_seed(5)
    before = generator.get_state()
    for options in ({"negative_prompt": "a " * 900}, {"callback_on_step_end": 3}, {"num_images_per_prompt": 10**9}):
        with pytest.raises((InputError, OutOfMemoryError)):
            pipe("a cat", generator=generator, **options)
    assert torch.equal(generator.get_state(), before)


def test_no_global_randomness_is_used_or_touched(pipe: VilaUPipeline) -> None:
    torch.manual_seed(0)
    first, before = latent(pipe), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(latent(pipe), first)
    torch.manual_seed(0)
    latent(pipe)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "options",
    [{}, {"guidance_scale": 1.0}, {"guidance_scale": 0.0}, {"top_k": 5, "top_p": 0.5}, {"negative_prompt": "x y"}],
    ids=str,
)
def test_an_image_does_not_depend_on_its_batch(pipe: VilaUPipeline, options: dict[str, Any]) -> None:
    batch = pipe(PROMPTS[:2], num_images_per_prompt=2, seed=5, output_type="latent", **options)
    assert batch.seeds == [5, 6, 7, 8]
    for i in range(4):
        assert torch.equal(latent(pipe, PROMPTS[i // 2], seed=5 + i, **options), batch.images[i : i + 1])


def hidden_states(pipe: VilaUPipeline, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[Tensor]:
    """What draws each position's codes, of each state that is run, [R, H]."""
    seen: list[Tensor] = []
    monkeypatch.setattr(
        "hart_infer.pipelines.vila_u.run_position",
        lambda state: (next_token.run_position(state), seen.append(state.hidden_states)),
    )
    latent(pipe, **options)
    return seen


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_all_together_differs_by_rounding_only(
    pipe: VilaUPipeline, monkeypatch: pytest.MonkeyPatch, guidance_scale: float
) -> None:
    options = {"num_images_per_prompt": 2, "seed": 3, "prompt": PROMPTS[:2], "guidance_scale": guidance_scale}
    together, alone = (latent(pipe, reproducible=flag, **options) for flag in (False, True))
    assert torch.equal(together, alone)  # codes are the same, and so are their sums
    assert torch.equal(alone, latent(pipe, **options))  # as on a CPU by default
    rows = hidden_states(pipe, monkeypatch, reproducible=False, **options)
    each = hidden_states(pipe, monkeypatch, reproducible=True, **options)
    assert (len(rows), len(each)) == (GRID**2, 4 * GRID**2)
    conditional = torch.stack([hidden[0] for hidden in each[-4:]])
    assert torch.allclose(rows[-1][:4], conditional, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [2, 4, 5, 9])
def test_pictures_may_be_shared_out_unevenly(own: VilaUPipeline, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    prompts = PROMPTS[:2]
    expected = latent(own, prompts, num_images_per_prompt=3, seed=2)
    monkeypatch.setattr(own, "_batch_size", lambda reproducible, limit: size)
    assert torch.equal(latent(own, prompts, num_images_per_prompt=3, seed=2), expected)


# Settings.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top_k": -1}, f"top_k must be a whole number from 0 to {CODES}"),
        ({"top_k": CODES + 1}, f"top_k must be a whole number from 0 to {CODES}"),
        ({"top_p": 1.1}, "top_p must be a number from 0 to 1"),
        ({"top_p": float("nan")}, "top_p must be a number"),
        ({"guidance_scale": -1}, "guidance_scale must be a number from 0"),
        ({"guidance_scale": "4"}, "guidance_scale must be a number"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be a whole number of 1 or more"),
        ({"output_type": "jpeg"}, "output_type must be one of"),
        ({"return_dict": "no"}, "return_dict must be True or False"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"seed": [1, 2]}, "seed has 2 entries for 1 images"),
        ({"reproducible": "no"}, "reproducible must be True or False"),
        ({"callback_on_step_end": 3}, "must be a function"),
        ({"callback_on_step_end": lambda a, b: None}, "must take one argument, a Step, or diffusers' four"),
        ({"negative_prompt": 3}, "negative_prompt must be a string, for all pictures, not int"),
        ({"negative_prompt": ["a"]}, "negative_prompt must be a string, for all pictures, not list"),
        ({"negative_prompt": ["a"], "guidance_scale": 1}, "negative_prompt must be a string"),
        ({"negative_prompt": "\ud800"}, "not valid Unicode"),
        ({"negative_prompt": "a " * 900}, "takes 600"),
        ({"prompt": ""}, r"prompt\[0\] is empty"),
        ({"prompt": []}, "empty list"),
        ({"prompt": ["a", 3]}, r"prompt\[1\] must be a string"),
        ({"prompt": "\ud800"}, "not valid Unicode"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_arguments_that_are_refused(pipe: VilaUPipeline, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        pipe(**{"prompt": "a cat", **options})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_prompt_that_leaves_no_room_for_the_picture_is_counted(pipe: VilaUPipeline) -> None:
    with pytest.raises(InputError, match=r"The prompt has 640 tokens and 16 new ones are asked for; the model takes 600"):
        pipe("a " * 500)
    with pytest.raises(InputError, match=f"and {FRAMES * GRID**2} new ones are asked for"):
        pipe.video("a " * 500)


def test_a_checkpoint_s_defaults_are_those_of_a_call(own: VilaUPipeline) -> None:
    assert (own.defaults.guidance_scale, own.defaults.top_k, own.defaults.top_p) == (3.0, 900, 0.96)
    assert torch.equal(latent(own), latent(own, guidance_scale=3, top_k=0, top_p=0.96))  # 900 are more than there are
    own.defaults = type(own.defaults)(guidance_scale=1.5, top_k=7, top_p=0.5)
    assert torch.equal(latent(own), latent(own, guidance_scale=1.5, top_k=7, top_p=0.5))


def test_the_best_code_only_needs_no_seed(pipe: VilaUPipeline) -> None:
    for options in ({"top_k": 1}, {"top_p": 1e-6}):
        assert torch.equal(*latent(pipe, seed=[1, 2], num_images_per_prompt=2, **options).split(1))
    assert torch.equal(latent(pipe, top_k=1), latent(pipe, top_p=1e-6))
    assert not torch.equal(*latent(pipe, seed=[1, 2], num_images_per_prompt=2, top_k=2).split(1))


def test_special_tokens_in_a_prompt_are_plain_text(pipe: VilaUPipeline) -> None:
    for text in ("<image>", "</s>", "a <im_start> b", "<vi_start>"):
        ids = pipe.tokenizer.encode(text, kind="image")
        assert sum(token >= pipe.tokenizer.image_start for token in ids) == 1  # the one that asks for a picture
        latent(pipe, text)


# Guidance.


def rows_run(pipe: VilaUPipeline, **options: Any) -> int:
    """Rows of the Llama's last position, in all, of a call for two pictures."""
    seen: list[int] = []
    hook = pipe.llama.register_forward_pre_hook(lambda _module, args: seen.append(len(args[0]) * (args[0].shape[1] == 1)))
    latent(pipe, PROMPTS[:2], **options)
    hook.remove()
    return sum(seen) // (GRID**2 - 1)


def test_without_guidance_half_the_rows_run(pipe: VilaUPipeline) -> None:
    assert rows_run(pipe) == rows_run(pipe, reproducible=False) == 4
    assert rows_run(pipe, guidance_scale=1) == rows_run(pipe, guidance_scale=1, reproducible=False) == 2


def test_the_conditional_alone_is_the_limit_of_guidance(pipe: VilaUPipeline) -> None:
    assert torch.equal(latent(pipe, guidance_scale=1 + 1e-7), latent(pipe, guidance_scale=1))
    assert not torch.equal(latent(pipe, guidance_scale=1), latent(pipe, guidance_scale=8))


def test_guidance_of_0_draws_the_unconditional(pipe: VilaUPipeline) -> None:
    assert torch.equal(latent(pipe, "a cat", guidance_scale=0), latent(pipe, "a dog", guidance_scale=0))
    assert not torch.equal(latent(pipe, "a cat", guidance_scale=1), latent(pipe, "a dog", guidance_scale=1))


def test_a_negative_prompt_replaces_the_empty_one(pipe: VilaUPipeline) -> None:
    assert torch.equal(latent(pipe, negative_prompt="a dog", guidance_scale=0), latent(pipe, "a dog", guidance_scale=1))
    assert torch.equal(latent(pipe, negative_prompt="a cat"), latent(pipe, guidance_scale=1))
    assert not torch.equal(latent(pipe, negative_prompt="a dog"), latent(pipe))
    for empty in (None, "", "  "):
        assert torch.equal(latent(pipe, negative_prompt=empty), latent(pipe))


def test_the_empty_prompt_is_prefilled_once(own: VilaUPipeline) -> None:
    prefills: list[bool] = []
    own.llama.register_forward_pre_hook(lambda _module, args: prefills.append(args[0].shape[1] > 1))
    latent(own, guidance_scale=1)
    assert sum(prefills) == 1
    prefills.clear()
    first = latent(own)
    assert sum(prefills) == 2
    latent(own, negative_prompt="a dog")  # takes two, and leaves what is kept
    assert torch.equal(latent(own, negative_prompt=" "), first)
    assert sum(prefills) == 5
    own.video("a cat", callback_on_step_end=Step.stop)  # another empty prompt
    latent(own)
    assert sum(prefills) == 8


def test_new_weights_are_noticed(own: VilaUPipeline) -> None:
    before = latent(own, guidance_scale=0)
    with torch.no_grad():
        own.llama.layers[0].mlp_norm.weight.mul_(-3)
    after = latent(own, guidance_scale=0)
    assert not torch.equal(after, before)
    assert torch.equal(copy.deepcopy(own)("x", seed=0, guidance_scale=0, output_type="latent").images, after)


# Callbacks.


def test_the_callback_sees_every_row_in_order(pipe: VilaUPipeline) -> None:
    seen: list[tuple[int, int, int]] = []
    latents: list[Tensor] = []

    def look(step: Step) -> None:
        seen.append((step.index, step.side, step.num_scales))
        latents.append(step.f_hat.clone())

    final = latent(pipe, num_images_per_prompt=2, callback_on_step_end=look)
    assert seen == [(row, GRID, GRID) for row in range(GRID)]
    for row, so_far in enumerate(latents):
        assert torch.equal(so_far[:, : row + 1], final[:, : row + 1])
        assert not so_far[:, row + 1 :].any()


def test_previews_are_full_size_and_the_last_is_the_picture(pipe: VilaUPipeline) -> None:
    previews: list[list[Image.Image]] = []
    images = pipe(PROMPTS, seed=0, callback_on_step_end=lambda step: previews.append(step.preview())).images
    assert [len(pictures) for pictures in previews] == [3] * GRID
    assert {picture.size for pictures in previews for picture in pictures} == {(SIDE, SIDE)}
    assert [picture.tobytes() for picture in previews[-1]] == [image.tobytes() for image in images]


@pytest.mark.parametrize("last", [0, 2, GRID - 1])
def test_stop_ends_with_that_row_s_preview(pipe: VilaUPipeline, last: int) -> None:
    previews: list[Image.Image] = []

    def stop(step: Step) -> None:
        previews[:] = step.preview()
        if step.index == last:
            step.stop()
        assert step.index <= last

    assert pipe("a cat", seed=4, callback_on_step_end=stop).images[0].tobytes() == previews[0].tobytes()


def test_a_callback_in_diffusers_form(pipe: VilaUPipeline) -> None:
    seen: list[tuple[Any, ...]] = []

    def watch(given: Any, index: int, timestep: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        seen.append((given, index, timestep, set(kwargs)))
        assert torch.equal(kwargs["latents"], kwargs["step"].f_hat)
        return kwargs

    latent(pipe, callback_on_step_end=watch)
    assert seen == [(pipe, row, row, {"latents", "step"}) for row in range(GRID)]


def test_an_interruption_before_the_first_row_is_not_lost(pipe: VilaUPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix, seen = pipe._prefix, []

    def slow(request: Any) -> Any:
        pipe._interrupt = True
        return prefix(request)

    monkeypatch.setattr(pipe, "_prefix", slow)
    latent(pipe, callback_on_step_end=lambda step: seen.append(step.index))
    assert seen == [0]


def test_an_interruption_ends_the_call_after_its_row(pipe: VilaUPipeline) -> None:
    seen: list[int] = []

    def watch(step: Step) -> None:
        seen.append(step.index)
        pipe._interrupt = step.index == 1

    interrupted = latent(pipe, callback_on_step_end=watch)
    assert seen == [0, 1]
    assert torch.equal(interrupted, latent(pipe, callback_on_step_end=lambda step: step.index == 1 and step.stop()))
    pipe._interrupt = True
    latent(pipe, callback_on_step_end=lambda step: seen.append(step.index))
    assert seen == [0, 1, *range(GRID)]


def test_an_error_of_the_callback_passes_and_frees_the_caches(own: VilaUPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    before, error = latent(own), KeyError("mine")
    states: list[next_token.GenerationState] = []

    def spy(*args: Any, **options: Any) -> next_token.GenerationState:
        states.append(next_token.start(*args, **options))
        return states[-1]

    def fail(step: Step) -> None:
        raise error

    monkeypatch.setattr("hart_infer.pipelines.vila_u.start", spy)
    with pytest.raises(KeyError) as caught:
        own(PROMPTS, callback_on_step_end=fail)
    assert caught.value is error
    assert [state.cache for state in states] == [None] * 3
    assert torch.equal(latent(own), before)


def test_the_bar_counts_rows(own: VilaUPipeline, capfd: pytest.CaptureFixture[str]) -> None:
    own("a cat")
    assert capfd.readouterr() == ("", "")
    own.set_progress_bar_config(disable=False)
    own("a cat")
    shown = capfd.readouterr().err
    assert f"{GRID}/{GRID}" in shown and "rows" in shown and "scales" not in shown


# Videos.


def test_a_video(pipe: VilaUPipeline) -> None:
    output = pipe.video(PROMPTS[:2], num_images_per_prompt=2, seed=3)
    assert isinstance(output, VideoOutput)
    assert output.seeds == output[1] == output["seeds"] == [3, 4, 5, 6]
    assert output[0] is output["frames"] is output.frames
    assert [len(frames) for frames in output.frames] == [FRAMES] * 4
    assert {frame.size for frames in output.frames for frame in frames} == {(SIDE, SIDE)}
    alone = pipe.video(PROMPTS[1], seed=6).frames[0]
    assert [frame.tobytes() for frame in alone] == [frame.tobytes() for frame in output.frames[3]]
    assert alone[0].tobytes() != pipe(PROMPTS[1], seed=6).images[0].tobytes()  # another token asks for it


@pytest.mark.parametrize(
    ("output_type", "shape"), [("np", (SIDE, SIDE, 3)), ("pt", (3, SIDE, SIDE)), ("latent", LATENT)], ids=str
)
def test_a_video_in_other_forms(pipe: VilaUPipeline, tmp_path: Path, output_type: Any, shape: tuple[int, ...]) -> None:
    output = pipe.video(PROMPTS[:2], seed=3, output_type=output_type)
    assert tuple(output.frames.shape) == (2, FRAMES, *shape)
    assert str(output.frames.dtype).removeprefix("torch.") == "float32"
    pixels = {
        "np": lambda frames: frames,
        "pt": lambda frames: frames.permute(0, 1, 3, 4, 2).numpy(),
        "latent": lambda frames: np.stack([pipe._decode(each).permute(0, 2, 3, 1).numpy() for each in frames]),
    }[output_type](output.frames)
    expected = [[np.asarray(frame) for frame in frames] for frames in pipe.video(PROMPTS[:2], seed=3).frames]
    assert np.array_equal(np.floor(pixels * np.float32(255)).astype(np.uint8), expected)
    assert output._repr_html_() is None
    with pytest.raises(InputError, match='output_type="pil"'):
        output.save(tmp_path / "cat.webp")
    with pytest.raises(InputError, match="output_type must be one of"):
        pipe.video("a cat", output_type="gif")  # type: ignore[arg-type]


def test_a_video_s_rows_are_of_all_frames(pipe: VilaUPipeline) -> None:
    seen: list[tuple[int, int]] = []
    previews: list[bytes] = []

    def look(step: Step) -> None:
        seen.append((step.index, step.num_scales))
        assert step.f_hat.shape == (1, *LATENT)
        if step.index % GRID == GRID - 1:
            previews.append(step.preview()[0].tobytes())

    (frames,) = pipe.video("a cat", seed=3, callback_on_step_end=look).frames
    assert seen == [(row, FRAMES * GRID) for row in range(FRAMES * GRID)]
    assert previews == [frame.tobytes() for frame in frames]


@pytest.mark.parametrize(("last", "count"), [(0, 1), (GRID - 1, 1), (GRID, 2), (FRAMES * GRID - 1, FRAMES)])
def test_a_stopped_video_ends_with_the_frame_that_was_drawn(pipe: VilaUPipeline, last: int, count: int) -> None:
    previews: list[Image.Image] = []

    def stop(step: Step) -> None:
        previews[:] = step.preview()
        if step.index == last:
            step.stop()

    whole, stopped = (pipe.video("a cat", seed=3, callback_on_step_end=callback).frames[0] for callback in (None, stop))
    assert len(stopped) == count
    assert [frame.tobytes() for frame in stopped[:-1]] == [frame.tobytes() for frame in whole[: count - 1]]
    assert stopped[-1].tobytes() == previews[0].tobytes()


@pytest.mark.parametrize("suffix", [".webp", ".gif", ".png"])
def test_a_saved_video(pipe: VilaUPipeline, tmp_path: Path, suffix: str) -> None:
    output = pipe.video("a cat", num_images_per_prompt=2, seed=3)
    path = output.save(tmp_path / f"cat{suffix}", 1, fps=4)
    assert path == tmp_path / f"cat{suffix}"
    with Image.open(path) as file:
        assert getattr(file, "n_frames", 1) == (1 if suffix == ".png" else FRAMES)
        assert file.size == ((FRAMES * SIDE, SIDE) if suffix == ".png" else (SIDE, SIDE))
        if suffix == ".png":
            assert file.crop((0, 0, SIDE, SIDE)).tobytes() == output.frames[1][0].tobytes()


def test_a_saved_film(pipe: VilaUPipeline, tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    path = pipe.video("a cat", seed=3).save(tmp_path / "cat.mp4")
    with av.open(str(path)) as container:
        assert sum(1 for _ in container.decode(video=0)) == FRAMES


@pytest.mark.parametrize(
    ("path", "options", "words"),
    [
        ("cat.mov", {}, "has the extension .mov"),
        ("cat", {}, "has no extension"),
        ("cat.gif", {"fps": 0}, "fps must be above 0"),
        ("cat.gif", {"fps": "4"}, "fps must be a number"),
        ("cat.gif", {"index": 1}, "index must be a whole number from 0 to 0, not 1"),
        ("cat.gif", {"index": "0"}, "index must be a whole number"),
    ],
    ids=str,
)
def test_videos_that_are_not_saved(tmp_path: Path, path: str, options: dict[str, Any], words: str) -> None:
    output = VideoOutput([[noise(), noise(seed=1)]], [0])
    with pytest.raises(InputError, match=words):
        output.save(tmp_path / path, **options)
    assert not list(tmp_path.iterdir())


def test_a_video_that_can_t_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cat.gif"):
        VideoOutput([[noise(), noise(seed=1)]], [0]).save(tmp_path / "file" / "cat.gif")


def test_a_notebook_shows_the_videos() -> None:
    html = VideoOutput([[noise(), noise(seed=1)]] * 18, list(range(18)))._repr_html_()
    assert html.count('src="data:image/webp;base64,UklGR') == 16
    assert "seed 3" in html and "and 2 more" in html


def test_a_checkpoint_without_videos(tmp_path: Path) -> None:
    folder = released_checkpoint(tmp_path, {"mm_use_vi_start_end": False})
    (folder / "llm/added_tokens.json").unlink()
    pipe = load(folder)
    assert "no videos" in pipe.describe()
    with pytest.raises(InputError, match="has no <vi_start> token, so it draws no videos"):
        pipe.video("a cat")
    pipe("a cat")
    assert isinstance(pipe.answer(None, "What?", max_new_tokens=2), str)


# Looking.


def test_pictures_are_encoded_alone(pipe: VilaUPipeline) -> None:
    pictures = [noise(seed=seed) for seed in range(3)]
    both = pipe.encode(pictures)
    assert both.codes.shape == (3, GRID, GRID, DEPTH)
    assert both.codes.dtype == torch.int64 and both.codes.min() >= 0 and both.codes.max() < CODES
    assert both.features.shape == (3, *LATENT)
    assert torch.equal(both.features, pipe.vision_tower.embed(both.codes))
    assert not torch.equal(both.codes[0], both.codes[1])
    for i, picture in enumerate(pictures):
        alone = pipe.encode(picture)
        assert torch.equal(alone.codes, both.codes[i : i + 1])
        assert torch.equal(alone.features, both.features[i : i + 1])


def with_exif(picture: Image.Image, orientation: int) -> Image.Image:
    picture = picture.copy()
    picture.getexif()[0x0112] = orientation
    return picture


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (noise(mode="L"), noise(mode="L").convert("RGB")),
        (noise(mode="P"), noise(mode="P").convert("RGB")),
        (noise(mode="CMYK"), noise(mode="CMYK").convert("RGB")),
        (with_exif(noise(), 6), noise().transpose(Image.Transpose.ROTATE_270)),
        (Image.new("RGBA", (9, 9), (5, 5, 5, 0)), Image.new("RGB", (9, 9), "white")),
        (Image.fromarray(np.full((9, 9), 0x8080, np.uint16)), Image.new("RGB", (9, 9), (128,) * 3)),
    ],
    ids=["grey", "palette", "cmyk", "exif", "alpha", "16-bit"],
)
def test_pictures_of_any_kind_are_made_rgb_first(pipe: VilaUPipeline, given: Image.Image, meant: Image.Image) -> None:
    assert torch.equal(pipe.encode(given).codes, pipe.encode(meant).codes)
    assert pipe.reconstruct(given).tobytes() == pipe.reconstruct(meant).tobytes()


@pytest.mark.parametrize(("kind", "fitted"), [("resize", resize), ("pad", pad)])
def test_pictures_are_made_square_as_the_checkpoint_says(tmp_path: Path, kind: str, fitted: Any) -> None:
    pipe = load(released_checkpoint(tmp_path, {"image_aspect_ratio": kind}))
    wide = noise((60, 21))
    square = torch.from_numpy(np.array(fitted(wide, SEEN))).permute(2, 0, 1)[None] / 255
    assert torch.equal(pipe.encode(wide).codes, pipe.encode(square).codes)


def test_tensors_are_taken_as_they_are(pipe: VilaUPipeline) -> None:
    pixels = torch.rand(2, 3, SEEN, SEEN, generator=torch.Generator().manual_seed(0))
    codes, features = pipe.vision_tower.encode(pixels[1:] * 2 - 1)
    encoded = pipe.encode(pixels)
    assert torch.equal(encoded.codes[1:], codes)
    rebuilt = pipe.reconstruct(pixels)
    assert rebuilt.shape == (2, 3, SIDE, SIDE) and rebuilt.dtype == torch.float32
    assert torch.equal(rebuilt[1:], ((pipe.vision_tower.decode(features) + 1) / 2).clamp(0, 1))


def test_a_picture_is_rebuilt_as_it_was_given(pipe: VilaUPipeline) -> None:
    picture = noise()
    alone = pipe.reconstruct(picture)
    assert (alone.mode, alone.size) == ("RGB", (SIDE, SIDE))
    (listed,) = pipe.reconstruct([picture])
    assert listed.tobytes() == alone.tobytes()


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (torch.zeros(3, SEEN, SEEN), r"must have shape \[N, 3, 35, 35\], not \[3, 35, 35\]"),  # as in the other pipelines
        (torch.zeros(1, 3, SIDE, SIDE), r"must have shape \[N, 3, 35, 35\]"),
        (torch.zeros(0, 3, SEEN, SEEN), "must have shape"),
        (torch.zeros(1, 3, SEEN, SEEN, dtype=torch.uint8), "floating-point"),
        (torch.full((1, 3, SEEN, SEEN), -0.5), "values in 0..1"),
        ([], "The list of images is empty"),
        ("no-such-cat.png", "no-such-cat.png cannot be read"),
        (None, "must be a PIL image or a tensor, not NoneType"),
        ([noise(), 3], "must be a PIL image or a tensor, not int"),
    ],
    ids=lambda value: str(value)[:30].replace("\n", " "),
)
def test_pictures_that_are_none(pipe: VilaUPipeline, image: Any, words: str) -> None:
    for look in (pipe.encode, pipe.reconstruct):
        with pytest.raises(InputError, match=words):
            look(image)


# Dtypes, copies, threads, memory, saving, words.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_end_to_end(own: VilaUPipeline, released: Path, dtype: torch.dtype) -> None:
    latent(own)  # keeps a prefix in fp32
    assert own.to(dtype) is own
    assert own._kept["image"]._kept is None  # freed at once
    assert own.dtype == dtype
    assert {each.dtype for part in own.components.values() for each in part.parameters()} == {dtype}
    images = own(PROMPTS, seed=0, output_type="pt").images
    assert images.dtype == torch.float32 and images.isfinite().all()
    other = load(released, dtype=dtype)
    assert torch.equal(images, other(PROMPTS, seed=0, output_type="pt").images)
    assert own.encode(noise()).features.dtype == dtype
    assert own.reconstruct(noise()).size == (SIDE, SIDE)
    assert own.answer(noise(), "What?", seed=0) == other.answer(noise(), "What?", seed=0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))], ids=["copy", "pickle"])
def test_a_copy_does_the_same(pipe: VilaUPipeline, copied: Any) -> None:
    expected = latent(pipe, PROMPTS), pipe.answer(noise(), "What?", seed=1)
    assert pipe._kept["image"]._kept is not None
    other = copied(pipe)
    assert other._kept["image"]._kept is None  # its weights are others
    assert torch.equal(latent(other, PROMPTS), expected[0])
    assert other.answer(noise(), "What?", seed=1) == expected[1]
    assert other.llama is not pipe.llama


def test_threads_may_share_a_pipeline(released: Path) -> None:
    own = load(released)
    seeds = range(6)
    expected = [latent(own, PROMPTS[seed % 3], seed=seed) for seed in seeds]
    own.to("cpu")  # forgets what is kept
    with ThreadPoolExecutor(max_workers=3) as threads:
        found = list(threads.map(lambda seed: latent(own, PROMPTS[seed % 3], seed=seed), seeds))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


PARTS = ("llama", "depth_transformer", "projector", "encoder", "quantizer", "post_quant_conv", "decoder")


@pytest.fixture
def offloading(own: VilaUPipeline, monkeypatch: pytest.MonkeyPatch) -> tuple[VilaUPipeline, set[str], list[set[str]]]:
    """One that offloads, what is on the device, and what was at each use. The CPU plays the device; a mark is kept of moves."""
    there: set[str] = set()
    uses: list[set[str]] = []
    tower: nn.Module = own.vision_tower
    for name in PARTS:
        module = getattr(own, name, None) or getattr(tower, name)

        def to(device: Any, name: str = name) -> None:
            (there.add if device == "the device" else there.discard)(name)

        def runs(module: Any, args: Any, name: str = name) -> None:
            uses.append({*there})
            assert name in there

        monkeypatch.setattr(module, "to", to)
        module.register_forward_pre_hook(runs)
    step, encode, rows = own.depth_transformer.step, own.vision_tower.quantizer.encode, own.vision_tower.quantizer.rows

    def there_for(name: str, function: Any) -> Any:
        def call(*args: Any) -> Any:
            assert name in there
            return function(*args)

        return call

    monkeypatch.setattr(own.depth_transformer, "step", there_for("depth_transformer", step))
    monkeypatch.setattr(own.vision_tower.quantizer, "encode", there_for("quantizer", encode))
    monkeypatch.setattr(own.vision_tower.quantizer, "rows", there_for("quantizer", rows))
    monkeypatch.setattr(tower, "to", None)  # it is moved part by part, so that no use takes another's away
    own._offloads_from = "the device"  # type: ignore[assignment]
    monkeypatch.setattr(ConversationPipeline, "device", torch.device("cpu"))
    return own, there, uses


def test_parts_take_turns_on_the_device(offloading: tuple[VilaUPipeline, set[str], list[set[str]]]) -> None:
    pipe, there, uses = offloading
    drawing = {"llama", "depth_transformer", "projector", "quantizer"}
    latent(pipe, negative_prompt="b", callback_on_step_end=Step.preview)
    assert drawing in uses and drawing | {"post_quant_conv", "decoder"} in uses
    assert not there
    uses.clear()
    pipe.reconstruct(noise())
    assert {frozenset(each) for each in uses} == {
        frozenset({"encoder", "quantizer"}),
        frozenset({"post_quant_conv", "decoder"}),
    }
    uses.clear()
    pipe.answer(noise(), "What?")
    assert {frozenset(each) for each in uses} == {frozenset({"encoder", "quantizer"}), frozenset({"llama", "projector"})}
    assert not there


def test_offloading_needs_another_device(own: VilaUPipeline) -> None:
    with pytest.raises(InputError, match="needs a CUDA or MPS device"):
        own.enable_model_cpu_offload("cpu")


@pytest.mark.parametrize(("call", "what"), [("__call__", "pictures"), ("video", "videos")])
@pytest.mark.parametrize("count", [10**6, 10**12])
def test_more_pictures_than_memory_are_refused_before_anything_is_made(
    pipe: VilaUPipeline, call: str, what: str, count: int
) -> None:
    with pytest.raises(
        OutOfMemoryError, match=rf"{what} in one call need at least .* GiB, and cpu has .*num_images_per_prompt"
    ):
        getattr(pipe, call)("a cat", num_images_per_prompt=count * 100)


def test_a_saved_pipeline_draws_and_answers_the_same(tmp_path: Path) -> None:
    pipe = load(released_checkpoint(tmp_path / "released", {"image_aspect_ratio": "pad", "num_video_frames": 2}))
    pipe.defaults = type(pipe.defaults)(guidance_scale=1.5, top_k=9, top_p=0.5)
    again = load(pipe.save_pretrained(tmp_path / "saved"))
    assert (again.defaults, again.settings, again.answers) == (pipe.defaults, pipe.settings, pipe.answers)
    assert torch.equal(latent(again), latent(pipe))
    assert torch.equal(again.encode(noise()).codes, pipe.encode(noise()).codes)
    assert again.answer(noise(), "What?", seed=3) == pipe.answer(noise(), "What?", seed=3)
    bytes_ = [[frame.tobytes() for frame in each.video("a", seed=1).frames[0]] for each in (pipe, again)]
    assert bytes_[0] == bytes_[1] and len(bytes_[0]) == 2


def test_only_safetensors_are_written(pipe: VilaUPipeline, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="never as pickles"):
        pipe.save_pretrained(tmp_path / "saved", safe_serialization=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["local_files_only", "strict_config"])
def test_a_string_is_no_flag_at_load(released: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"{name} must be True or False, not 'False'"):
        VilaUPipeline.from_pretrained(released, **{name: "False"})  # type: ignore[arg-type]


def test_dtype_by_both_names(released: Path) -> None:
    assert load(released, dtype=torch.bfloat16).dtype == load(released, torch_dtype=torch.bfloat16).dtype == torch.bfloat16


def test_describe(pipe: VilaUPipeline, released: Path) -> None:
    lines = pipe.describe().splitlines()
    assert lines[0] == f"{released} on cpu, float32"
    assert f"  pictures: 8 px, seen at 35 px, 4 x 4 positions of 3 codes; videos of {FRAMES} frames" in lines
    assert "  prompts: up to 600 tokens" in lines
    for part in ("llama", "depth transformer", "vision tower", "projector"):
        assert any(line.startswith(f"  {part}: 0.") for line in lines)


def test_weights_that_overflow_are_named(own: VilaUPipeline) -> None:
    own.llama.norm.weight.data.fill_(torch.inf)
    with pytest.raises(WeightsError, match="not finite"):
        own("a cat")
    for do_sample in (False, True):
        with pytest.raises(WeightsError, match="not finite"):
            own.answer(None, "a", do_sample=do_sample)


@pytest.mark.parametrize("name", ["vae", "unet", "scheduler", "load_lora_weights", "enable_vae_tiling"])
def test_what_is_not_there_says_what_is(pipe: VilaUPipeline, name: str) -> None:
    with pytest.raises(AttributeError) as caught:
        getattr(pipe, name)
    words = str(caught.value)
    assert name in words
    for part in ("pipe.transformer", "pipe.autoencoder", "pipe.text_encoder", "more_smooth"):
        assert part not in words


@pytest.mark.skipif(sys.version_info < (3, 11), reason="typing.get_overloads is new in 3.11")
@pytest.mark.parametrize("method", ["__call__", "answer"])
def test_the_overloads_have_the_call_s_arguments(method: str) -> None:
    function: Any = getattr(VilaUPipeline, method)
    given = list(inspect.signature(function).parameters)
    overloads = typing.get_overloads(function)  # type: ignore[attr-defined, unused-ignore]
    assert len(overloads) == 2
    for overload in overloads:
        assert list(inspect.signature(overload).parameters) == given


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_in_int8_take_less_and_give_nearly_the_same(released: Path, dtype: torch.dtype) -> None:
    exact, small = load(released, dtype=dtype), load(released, dtype=dtype, quantize="int8_weight_only")
    size = [sum(tensor.nbytes for tensor in each.llama.state_dict().values()) for each in (small, exact)]
    assert size[0] < size[1]

    def hidden(pipe: VilaUPipeline) -> Tensor:
        llama, ids = pipe.llama, torch.arange(12)
        place = llama.new_cache(rows=1, length=12).at(0, 12)
        return llama(llama.embed_tokens(ids)[None], ids[None], place).float()

    expected = hidden(exact.to(torch.float32))
    assert 1e-4 < float((hidden(small) - expected).norm() / expected.norm()) < 0.05
    assert small.dtype == dtype
    assert latent(small).isfinite().all()
    assert "in int8" in small.describe() and "in int8" not in exact.describe()


def test_weights_in_int8_are_not_saved(released: Path, tmp_path: Path) -> None:
    small = load(released, quantize="int8_weight_only")
    with pytest.raises(InputError, match="Weights in int8 are not saved"):
        small.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["int8", True, "int4", ["int8_weight_only"]])
def test_other_ways_to_quantise_are_refused(released: Path, kind: Any) -> None:
    with pytest.raises(InputError, match="quantize must be 'int8_weight_only' or None"):
        load(released, quantize=kind)

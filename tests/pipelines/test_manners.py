"""What users of diffusers try first: the same names where they mean the same, and a sentence where there is something else."""

from __future__ import annotations

import copy
import inspect
import os
import pickle
import subprocess
import sys
import time
import typing
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hart_infer import HartOutput, HartPipeline, InputError, OutOfMemoryError, Step, VarPipeline
from hart_infer.pipelines import out_of_memory
from hart_infer.pipelines.base import INSTEAD
from tests.golden.data import REPOSITORY
from tests.pipelines.test_hart import PIXELS, latent, load


@pytest.fixture
def own(hart_tiny: Path, text_tiny: Path) -> HartPipeline:
    pipe = load(hart_tiny, text_tiny, torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_height_and_width_are_the_size(pipe: HartPipeline) -> None:
    assert torch.equal(latent(pipe, height=PIXELS, width=np.int64(PIXELS)), latent(pipe))
    for options in ({"height": PIXELS, "width": 2 * PIXELS}, {"height": PIXELS + 1}, {"size": np.float32(PIXELS)}):
        with pytest.raises(InputError, match="is not one that this checkpoint was trained for; it has 32"):
            pipe("a", **options)


def test_dtype_by_both_names(hart_tiny: Path) -> None:
    for name in ("dtype", "torch_dtype"):
        pipe = HartPipeline.from_pretrained(hart_tiny, text_encoder=False, device="cpu", **{name: torch.bfloat16})
        assert pipe.dtype == torch.bfloat16
        assert pipe.to(**{name: torch.float32}).dtype == torch.float32


@pytest.mark.parametrize("name", ["use_ema", "local_files_only", "strict_config"])
def test_a_string_is_no_flag_at_load(hart_tiny: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"{name} must be True or False, not 'False'"):
        HartPipeline.from_pretrained(hart_tiny, text_encoder=False, **{name: "False"})


@pytest.mark.parametrize("name", ["more_smooth", "use_system_prompt", "reproducible", "return_dict"])
def test_a_string_is_no_flag_in_a_call(pipe: HartPipeline, name: str) -> None:
    with pytest.raises(InputError, match=f"{name} must be True or False, not 'no'"):
        pipe("a", **{name: "no"})
    pipe("a", **{name: np.bool_(True)})


def test_components(pipe: HartPipeline) -> None:
    assert list(pipe.components) == ["transformer", "autoencoder", "text_encoder"]
    again = HartPipeline(**pipe.components)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(latent(again), latent(pipe))


def test_the_output_by_index_and_by_name(pipe: HartPipeline) -> None:
    out = pipe(["a", "b"], seed=3)
    assert out[0] is out["images"] is out.images
    assert out[1] == out["seeds"] == [3, 4]
    assert out[:1] == (out.images,)


def test_a_notebook_shows_the_pictures(pipe: HartPipeline) -> None:
    html = pipe(["a", "b"], seed=3)._repr_html_()
    assert html is not None
    assert html.count('src="data:image/png;base64,iVBOR') == 2
    assert "seed 3" in html and "seed 4" in html
    many = HartOutput(pipe("a").images * 20, list(range(20)))._repr_html_()
    assert many is not None and many.count("<img") == 16 and "and 4 more" in many
    assert pipe("a", output_type="np")._repr_html_() is None


def test_tiling_and_slicing_by_their_names(own: HartPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int | None]] = []
    decode = own.autoencoder.decode
    monkeypatch.setattr(
        own.autoencoder, "decode", lambda given, tile: asked.append((len(given), tile)) or decode(given, tile=tile)
    )
    for prepare in (own.enable_vae_tiling, own.disable_vae_tiling, own.enable_vae_slicing, own.disable_vae_slicing):
        prepare()
        own(["a", "b"], reproducible=False)
    assert asked == [(2, 32), (2, None), (1, None), (1, None), (2, None)]


def test_pickles_are_not_written(own: HartPipeline, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="safe_serialization must be True"):
        own.save_pretrained(tmp_path / "saved", safe_serialization=False)
    assert not (tmp_path / "saved").exists()
    own.save_pretrained(tmp_path / "saved", safe_serialization=True)


@pytest.mark.parametrize("name", sorted(INSTEAD))
def test_what_is_not_there_says_what_is(pipe: HartPipeline, name: str) -> None:
    with pytest.raises(AttributeError, match=name) as caught:
        getattr(pipe, name)
    assert INSTEAD[name] in str(caught.value)


def test_what_nobody_looks_for_is_a_plain_attribute_error(pipe: HartPipeline) -> None:
    with pytest.raises(AttributeError, match="'HartPipeline' object has no attribute 'nonsense'$"):
        pipe.nonsense  # noqa: B018
    assert not hasattr(pipe, "__deepcopy__")


def test_negative_prompts_may_be_encoded_before(pipe: HartPipeline) -> None:
    embeds = pipe.encode_prompt("ugly")
    assert torch.equal(latent(pipe, negative_prompt_embeds=embeds), latent(pipe, negative_prompt="ugly"))
    with pytest.raises(InputError, match="either negative_prompt or negative_prompt_embeds"):
        pipe("a", negative_prompt="ugly", negative_prompt_embeds=embeds)
    with pytest.raises(InputError, match=r"negative_prompt_embeds must have shape \[U, 12, 48\]"):
        pipe("a", negative_prompt_embeds=torch.zeros(1, 2, 3))


# Callbacks.


def test_a_callback_of_diffusers_form(pipe: HartPipeline) -> None:
    seen: list[tuple[Any, int, int, set[str]]] = []

    def watch(given: Any, step_index: int, timestep: int, callback_kwargs: dict[str, Any]) -> dict[str, Any]:
        seen.append((given, step_index, timestep, set(callback_kwargs)))
        assert torch.equal(callback_kwargs["latents"], callback_kwargs["step"].f_hat)
        return callback_kwargs

    before = latent(pipe)
    assert torch.equal(latent(pipe, callback_on_step_end=watch), before)
    assert seen == [(pipe, index, index, {"latents", "step"}) for index in range(6)]


def test_a_callback_of_diffusers_form_interrupts(pipe: HartPipeline) -> None:
    def stop(given: Any, index: int, timestep: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        given._interrupt = index == 2
        return kwargs

    def stop_too(step: Step) -> None:
        if step.index == 2:
            step.stop()

    assert torch.equal(latent(pipe, callback_on_step_end=stop), latent(pipe, callback_on_step_end=stop_too))
    assert torch.equal(latent(pipe), latent(pipe, callback_on_step_end=lambda step: None))


def test_an_interruption_from_outside_ends_the_call_after_its_scale(pipe: HartPipeline) -> None:
    """Whoever holds the pipe may set it, whatever form the callback has; the next call starts afresh."""
    seen: list[int] = []

    def watch(step: Step) -> None:
        seen.append(step.index)
        pipe._interrupt = step.index == 1

    latent(pipe, callback_on_step_end=watch)
    assert seen == [0, 1]
    pipe._interrupt = True
    latent(pipe, callback_on_step_end=lambda step: seen.append(step.index))
    assert seen == [0, 1, 0, 1, 2, 3, 4, 5]


def test_an_interruption_before_the_first_scale_is_not_lost(own: HartPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, seen = own.text_encoder.encode, []

    def slow(*args: Any, **options: Any) -> Any:
        own._interrupt = True
        return encode(*args, **options)

    monkeypatch.setattr(own.text_encoder, "encode", slow)
    latent(own, callback_on_step_end=lambda step: seen.append(step.index))
    assert seen == [0]


@pytest.mark.parametrize("wrong", [lambda: None, lambda a, b: None, lambda a, b, c: None, lambda *, step: None])
def test_a_callback_of_another_form_is_refused_before_the_first_scale(
    pipe: HartPipeline, monkeypatch: pytest.MonkeyPatch, wrong: Any
) -> None:
    monkeypatch.setattr(pipe.transformer, "forward", None)
    with pytest.raises(InputError, match="must take one argument, a Step, or diffusers' four"):
        pipe("a", callback_on_step_end=wrong)


class Caller:
    def __call__(self, step: Step) -> None: ...


@pytest.mark.parametrize("fine", [print, [].append, lambda step, extra=1: None, lambda *steps: None, Caller()])
def test_callbacks_that_take_one_argument(pipe: HartPipeline, fine: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pipe("a", callback_on_step_end=fine)


# Memory.


@pytest.mark.parametrize("options", [{"num_images_per_prompt": 10**9}, {"num_images_per_prompt": 10**12}])
def test_more_pictures_than_memory_are_refused_before_anything_is_made(pipe: HartPipeline, options: dict[str, Any]) -> None:
    with pytest.raises(
        OutOfMemoryError, match=r"pictures in one call need at least .* GiB, and cpu has .*: at most .* could fit"
    ) as e:
        pipe("a", **options)
    assert "num_images_per_prompt" in str(e.value)


def test_what_could_fit_is_tried(pipe: HartPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(out_of_memory, "total_memory", lambda device: 3 * 2**20)
    pipe("a", num_images_per_prompt=6)  # one after the other
    with pytest.raises(OutOfMemoryError, match=r"at most [1-9]\d+ could fit"):
        pipe("a", num_images_per_prompt=10**9)
    for together in ({"callback_on_step_end": lambda step: None}, {"reproducible": False}):
        with pytest.raises(OutOfMemoryError, match="at most 4 could fit"):
            pipe("a", num_images_per_prompt=6, **together)


def test_where_no_system_tells_its_memory_absurd_calls_are_refused(pipe: HartPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sysconf")
    pipe("a")
    with pytest.raises(OutOfMemoryError, match="GiB"):
        pipe("a", num_images_per_prompt=10**9)


def test_offloading_needs_another_device(own: HartPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hart_infer.pipelines.base.check_device", lambda device: torch.device("cpu"))
    with pytest.raises(InputError, match="needs a CUDA or MPS device"):
        own.enable_model_cpu_offload()


def test_parts_take_turns_on_the_device(own: HartPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a part computes, it alone is on the device. The CPU plays the device; a mark tells where a part would be."""
    there: set[str] = set()
    most: list[set[str]] = []
    parts = {
        "text encoder": own.text_encoder.model,
        "transformer": own.transformer,
        "quantizer": own.autoencoder.quantizer,
        "post_quant_conv": own.autoencoder.post_quant_conv,
        "decoder": own.autoencoder.decoder,
    }
    for name, module in parts.items():

        def to(device: Any, name: str = name) -> None:
            (there.add if device == "the device" else there.discard)(name)

        def runs(module: Any, args: Any, name: str = name) -> None:
            most.append({name, *there})
            assert name in there

        module.to = to
        module.register_forward_pre_hook(runs)
    own._offloads_from = "the device"  # type: ignore[assignment]
    monkeypatch.setattr(type(own), "device", torch.device("cpu"))
    own("a", negative_prompt="b", callback_on_step_end=Step.preview)
    assert not there
    assert {"text encoder"} in most
    assert {"transformer", "quantizer"} in most
    assert {"post_quant_conv", "decoder"} in most or {"transformer", "quantizer", "post_quant_conv", "decoder"} in most
    assert not any("text encoder" in at_once and len(at_once) > 1 for at_once in most)


def test_a_reconstruction_in_a_callback_leaves_the_running_call_its_parts(
    own: HartPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    there: list[torch.nn.Module] = []

    def to(module: torch.nn.Module, device: Any) -> torch.nn.Module:
        for each in module.modules():
            if device == "the device":
                there.append(each)
            elif each in there:
                there.remove(each)
        return module

    monkeypatch.setattr(torch.nn.Module, "to", to)
    monkeypatch.setattr(type(own), "device", torch.device("cpu"))
    own._offloads_from = "the device"  # type: ignore[assignment]
    picture, held = torch.zeros(1, 3, own.sizes[0], own.sizes[0]), []

    def look(step: Step) -> None:
        own.reconstruct(picture)
        own.edit(picture, (0, 0, 1, 0.5))
        held.append(own.autoencoder.quantizer in there and own.transformer in there)

    own("a", callback_on_step_end=look)
    assert held and all(held)
    assert not there


def test_calls_that_offload_take_turns(own: HartPipeline) -> None:
    """A part must not leave the device while another thread computes with it."""
    inside: list[int] = []

    class Part(torch.nn.Module):
        def to(self, device: Any) -> None:  # type: ignore[override]
            inside.append(1 if device == "the device" else -1)
            assert 0 <= sum(inside) <= 1

    own._offloads_from = "the device"  # type: ignore[assignment]
    part = Part()

    def use(_: int) -> None:
        with own._using(part):
            time.sleep(0.001)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(use, range(40)))
    assert len(inside) == 80


# Attributes.


def test_a_property_s_own_error_is_shown(own: HartPipeline) -> None:
    own._autoencoder = None  # type: ignore[assignment]
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'config'"):
        _ = own.sizes


# Types.


@pytest.mark.slow
@pytest.mark.sample
def test_a_call_type_checks(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "script.py").write_text(
        "from hart_infer import HartPipeline\n"
        "pipe = HartPipeline.from_pretrained()\n"
        "seeds: list[int] = pipe('a cat', seed=3).seeds\n"
        "pipe('a cat').images[0].save('cat.png')\n"
        "images, = pipe('a cat', return_dict=False)\n"
        "pipe('a cat', seeed=3)\n"
    )
    command = [sys.executable, "-m", "mypy", "--config-file", "", str(tmp_path / "script.py")]
    environment = os.environ | {"MYPYPATH": str(REPOSITORY)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    problems = [line for line in done.stdout.splitlines() if "script.py" in line and "error" in line]
    assert problems and all(":6:" in line for line in problems), done.stdout


@pytest.mark.skipif(sys.version_info < (3, 11), reason="typing.get_overloads is new in 3.11")
@pytest.mark.parametrize("kind", [HartPipeline, VarPipeline])
def test_the_overloads_have_the_call_s_arguments(kind: Any) -> None:
    given = list(inspect.signature(kind.__call__).parameters)
    overloads = typing.get_overloads(kind.__call__.__wrapped__)  # type: ignore[attr-defined, unused-ignore]
    assert len(overloads) == 2
    for overload in overloads:
        assert list(inspect.signature(overload).parameters) == given


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))], ids=["copy", "pickle"])
def test_a_copy_draws_the_same(pipe: HartPipeline, copied: Any) -> None:
    expected = pipe("a cat", seed=3, output_type="latent").images
    other = copied(pipe)
    assert torch.equal(other("a cat", seed=3, output_type="latent").images, expected)
    other.enable_vae_slicing()
    assert pipe.engine is not other.engine and not pipe._slices


def test_calls_from_several_threads_draw_what_they_draw_alone(pipe: HartPipeline) -> None:
    def draw(seed: int) -> torch.Tensor:
        return pipe("a cat", seed=seed, output_type="latent").images

    alone = [draw(seed) for seed in range(6)]
    with ThreadPoolExecutor(3) as pool:
        assert all(map(torch.equal, pool.map(draw, range(6)), alone))


def test_a_call_does_not_undo_the_interruption_of_another(pipe: HartPipeline) -> None:
    seen = []

    def interrupt(step: Step) -> None:
        seen.append(step.index)
        pipe._interrupt = True
        pipe("a dog", seed=1, output_type="latent", callback_on_step_end=lambda step: step.stop())

    pipe("a cat", seed=1, output_type="latent", callback_on_step_end=interrupt)
    assert seen == [0]

"""VilaUPipeline draws, answers and rebuilds what was recorded, from the seed alone."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from hart_infer import Frames, VilaUPipeline
from hart_infer.generation.sampling import GeneratorTokenSampler
from hart_infer.pipelines import vila_u

from .data import golden

pytestmark = pytest.mark.golden
FOLDERS = ("vila-u-tiny", "vila-u-tiny-384")


@cache
def _load(folder) -> VilaUPipeline:
    pipe = VilaUPipeline.from_pretrained(folder, dtype=torch.float32, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load(name: str) -> VilaUPipeline:
    return _load(golden(name))


def trace(folder: str, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A recording's tensors and metadata; skips where it is not there."""
    path = golden(folder) / f"trace-{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"{folder} has no {path.name}")
    with safe_open(path, "pt") as file:
        return load_file(path), file.metadata() or {}


@pytest.fixture
def one_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    """All pictures of a call from one generator, as recorded."""

    def make(seeds: list[int], device: torch.device) -> GeneratorTokenSampler:
        return GeneratorTokenSampler(seeds[:1], images_per_seed=len(seeds))

    monkeypatch.setattr(vila_u, "make_token_sampler", make)


@pytest.mark.parametrize(("folder", "name"), [(FOLDERS[0], "image"), (FOLDERS[0], "image-cfg1"), (FOLDERS[1], "image")])
def test_pictures(folder: str, name: str, one_generator: None) -> None:
    pipe, (tensors, said) = load(folder), trace(folder, name)
    output: Any = pipe(
        said["prompt"],
        seed=int(said["seed"]),
        num_images_per_prompt=int(said["n"]),
        guidance_scale=float(said["cfg"]),
        output_type="pt",
        reproducible=False,
    )
    recorded = tensors["image"] / 255
    assert output.images.shape == recorded.shape
    assert float((output.images - recorded).abs().max()) < 1e-5


def test_a_video(one_generator: None) -> None:
    pipe, (tensors, said) = load(FOLDERS[0]), trace(FOLDERS[0], "video")
    output = pipe.video(said["prompt"], seed=int(said["seed"]), guidance_scale=float(said["cfg"]))
    (frames,) = output.frames
    bytes_ = np.stack([np.asarray(frame) for frame in frames]).transpose(0, 3, 1, 2)
    differ = np.abs(bytes_.astype(int) - tensors["image_u8"][0].numpy().astype(int))
    assert differ.max() <= 1
    assert (differ > 0).mean() <= 1e-3


@pytest.mark.parametrize(
    ("folder", "name"),
    [(FOLDERS[0], name) for name in ("image", "eos", "sampled", "two", "video")] + [(FOLDERS[1], "image")],
)
def test_answers(folder: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, (tensors, said) = load(folder), trace(folder, f"understand-{name}")
    pictures = [Image.fromarray(each) for each in tensors["media"].numpy()]
    media = iter([Frames(pictures)] if name == "video" else pictures)
    query = [next(media) if part == "<media>" else part for part in json.loads(said["query"])]
    draws = said["seed"] != "none"
    monkeypatch.setattr(
        pipe, "answers", replace(pipe.answers, eos_token_id=(int(said["eos_token_id"]),), top_k=int(said["top_k"]))
    )
    options: Any = {
        "max_new_tokens": int(said["max_new_tokens"]),
        "do_sample": draws,
        "seed": int(said["seed"]) if draws else 0,
        "temperature": float(said["temperature"]),
        "top_p": float(said["top_p"]),
    }
    assert pipe.answer(None, query, **options) == said["text"]
    assert "".join(pipe.answer(None, query, stream=True, **options)) == said["text"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_codes_and_reconstruction(folder: str) -> None:
    pipe, (tensors, _) = load(folder), trace(folder, "tokenizer")
    pixels = (tensors["pixel_values"] + 1) / 2
    encoded = pipe.encode(pixels)
    assert torch.equal(encoded.codes, tensors["codes"])
    rebuilt = pipe.reconstruct(pixels)
    recorded = ((tensors["image"] + 1) / 2).clamp(0, 1)
    assert float((rebuilt - recorded).abs().max()) < 1e-5

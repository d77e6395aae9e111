"""Pictures to VILA-U's codes and features, and back."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from hart_infer.checkpoints.vila_u import find_checkpoint
from hart_infer.images.preprocess import to_pixel_values
from hart_infer.images.tensors import to_uint8
from hart_infer.models.vila_u.vision import VisionTower

from .data import golden
from .recorded import FED, relative

pytestmark = pytest.mark.golden

SMALL, LARGE = "vila-u-tiny", "vila-u-tiny-384"
every_tower = pytest.mark.parametrize("checkpoint", [SMALL, LARGE])
every_picture = pytest.mark.parametrize(
    ("checkpoint", "name"), [(SMALL, "image"), (SMALL, "image-cfg1"), (SMALL, "video"), (LARGE, "image")]
)
every_question = pytest.mark.parametrize(
    ("checkpoint", "name"),
    [*((SMALL, f"understand-{kind}") for kind in ("image", "two", "sampled", "eos", "video")), (LARGE, "understand-image")],
)


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def tower_of(checkpoint: str) -> VisionTower:
    return _tower(golden(checkpoint))


@cache
def _tower(folder) -> VisionTower:
    return find_checkpoint(folder).load_vision_tower(torch.float32)


@cache
def read(path):
    return load_file(path)


def trace_of(checkpoint: str, name: str) -> dict[str, Tensor]:
    return read(golden(checkpoint) / f"trace-{name}.safetensors")


def grid_codes(trace: dict[str, Tensor], tower: VisionTower) -> Tensor:
    """Recorded codes [N, T, D], or several pictures' one after the other, as [N, g, g, D] int64."""
    return trace["codes"].long().reshape(-1, *tower.config.code_shape)


def pictures(media: Tensor) -> list[Image.Image]:
    return [Image.fromarray(each) for each in media.numpy()]


@every_tower
def test_hidden(checkpoint):
    tower, trace = tower_of(checkpoint), trace_of(checkpoint, "tokenizer")
    assert relative(tower.hidden(trace["pixel_values"]), trace["hidden"]) <= FED


@every_tower
def test_codes_of_the_recorded_hidden_states(checkpoint):
    tower, trace = tower_of(checkpoint), trace_of(checkpoint, "tokenizer")
    assert torch.equal(tower.quantizer.encode(trace["hidden"]), trace["codes"].long())


@every_tower
def test_encode(checkpoint):
    tower, trace = tower_of(checkpoint), trace_of(checkpoint, "tokenizer")
    codes, features = tower.encode(trace["pixel_values"])
    assert torch.equal(codes, trace["codes"].long())
    assert relative(features, trace["features"]) <= FED


@every_tower
def test_reconstruction(checkpoint):
    """From the pixels on; the released features differ from the sums of rows by rounding."""
    tower, trace = tower_of(checkpoint), trace_of(checkpoint, "tokenizer")
    _, features = tower.encode(trace["pixel_values"])
    assert relative(tower.decode(trace["features"]), trace["image"]) <= FED
    assert relative(tower.decode(features), trace["image"]) <= FED


@every_picture
def test_generated_features_and_picture(checkpoint, name):
    tower, trace = tower_of(checkpoint), trace_of(checkpoint, name)
    features = tower.embed(grid_codes(trace, tower))
    if "features" in trace:
        assert relative(features, trace["features"]) <= FED
    image = trace["image"] if "image" in trace else trace["frame0"]
    pixels = tower.decode(features[: len(image)])
    assert relative((127.5 * (pixels + 1)).clamp(0, 255), image) <= FED


def test_bytes_of_a_video():
    """Truncated: rounding moves half of all bytes, a last bit of the decoder's hardly any."""
    tower, trace = tower_of(SMALL), trace_of(SMALL, "video")
    pixels = (tower.decode(tower.embed(grid_codes(trace, tower))) + 1) / 2
    recorded = trace["image_u8"][0].permute(0, 2, 3, 1)
    off = (to_uint8(pixels, truncated=True).int() - recorded.int()).abs()
    assert off.max() <= 1 and (off > 0).float().mean() <= 1e-3
    assert (to_uint8(pixels) != recorded).float().mean() > 0.1


def test_bytes_of_a_frame():
    trace = trace_of(SMALL, "video")
    levels = to_uint8(trace["frame0"] / 255, truncated=True)
    assert torch.equal(levels, trace["image_u8"][:, 0].permute(0, 2, 3, 1))


def test_pad():
    tower, trace = tower_of(SMALL), trace_of(SMALL, "pad")
    given = [Image.fromarray(trace[name].numpy()) for name in ("wide", "tall")]
    pixels = to_pixel_values(given, tower.config.image_size, "pad")
    assert relative(pixels, trace["pixel_values"]) <= 1e-6
    assert relative(to_pixel_values(given, tower.config.image_size), trace["pixel_values"]) > 0.1


@every_question
def test_codes_of_a_question_s_pictures(checkpoint, name):
    tower, trace = tower_of(checkpoint), trace_of(checkpoint, name)
    media = trace["media"]
    if name.endswith("video"):
        media = media[np.round(np.linspace(0, len(media) - 1, len(trace["pixel_values"]))).astype(int)]
    pixels = to_pixel_values(pictures(media), tower.config.image_size)
    assert relative(pixels, trace["pixel_values"]) <= 1e-6
    codes, features = tower.encode(pixels)
    assert torch.equal(codes, grid_codes(trace, tower))
    if "features" in trace:
        assert relative(features.flatten(1, 2), trace["features"]) <= FED


@every_tower
def test_what_is_never_read(checkpoint):
    """Only what the page lists; every tensor of the tower's is read, as loading is strict."""
    tower = tower_of(checkpoint)
    with safe_open(golden(checkpoint) / "vision_tower" / "model.safetensors", "pt") as file:
        stored = set(file.keys())
    last = f"vision_model.encoder.layers.{tower.config.num_hidden_layers - 1}."
    unread = ("rqtransformer.", ".text_model.", "logit_", "vision_model.head.", ".post_layernorm.", last, "_ema")
    rest = {name for name in stored if not any(part in name for part in unread)}
    merged = sum(2 for name in rest if name.endswith((".q.weight", ".q.bias", ".q_proj.weight", ".q_proj.bias")))
    assert len(rest) - merged == len(tower.state_dict())

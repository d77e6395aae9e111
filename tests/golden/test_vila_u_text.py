"""VILA-U's prompts and answers as text."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from hart_infer.checkpoints.vila_u import find_checkpoint
from hart_infer.images.video import read_video
from hart_infer.models.vila_u.text import IMAGE

from .data import golden

pytestmark = pytest.mark.golden

NAMES = ("vila-u-tiny", "vila-u-tiny-384")
UNDERSTANDING = [("vila-u-tiny", kind) for kind in ("image", "two", "video", "sampled", "eos")] + [("vila-u-tiny-384", "image")]
DRAWING = [("vila-u-tiny", kind) for kind in ("image", "image-cfg1", "video")] + [("vila-u-tiny-384", "image")]
FRAMES = 8
every_message = pytest.mark.parametrize(("name", "index"), [(name, index) for name in NAMES for index in range(7)])


@cache
def tokenizer(name):
    pytest.importorskip("sentencepiece")
    return find_checkpoint(golden(name)).load_tokenizer()


@cache
def trace(name, which):
    path = golden(name) / f"trace-{which}.safetensors"
    with safe_open(path, "pt") as file:
        return file.metadata(), load_file(path)


def parts(text):
    """The parts of a recorded question, in which a picture is `<image>` and a newline."""
    first, *others = text.split("<image>\n")
    return [first, *(part for other in others for part in (IMAGE, other))]


@every_message
def test_ids(name, index):
    texts, tensors = trace(name, "text")
    kind, text = texts[f"kind{index}"], texts[f"text{index}"]
    ids = tokenizer(name).encode(parts(text) if kind == "text" else text, kind=kind)
    assert ids == tensors[f"ids{index}"].tolist()


@every_message
def test_decoded(name, index):
    texts, tensors = trace(name, "text")
    assert tokenizer(name).decode(tensors[f"ids{index}"].tolist()) == texts[f"decoded{index}"]


@pytest.mark.parametrize(("name", "kind"), UNDERSTANDING)
def test_question(name, kind):
    values, tensors = trace(name, f"understand-{kind}")
    media = [IMAGE] * (FRAMES if kind == "video" else 1)
    question = [each for part in json.loads(values["query"]) for each in (media if part == "<media>" else [part])]
    ids = tokenizer(name).encode(question)
    assert ids == tensors["input_ids"].tolist()
    if "inputs_embeds" in tensors:
        positions = tensors["features"].shape[1]
        assert tokenizer(name).check_length(ids, image_positions=positions) == tensors["inputs_embeds"].shape[1]


@pytest.mark.parametrize(("name", "kind"), UNDERSTANDING)
def test_answer(name, kind):
    values, tensors = trace(name, f"understand-{kind}")
    stream = tokenizer(name).stream()
    tokens = tensors["tokens"].tolist()
    assert tokenizer(name).decode(tokens) == values["text"]
    assert "".join([*map(stream.push, tokens), stream.finish()]) == values["text"]


@pytest.mark.parametrize(("name", "kind"), DRAWING)
def test_rows(name, kind):
    """The conditional prompts, then the unconditional one, an empty message; padded on the left."""
    values, tensors = trace(name, kind)
    what, count = kind.partition("-")[0], int(values["n"])
    rows = [tokenizer(name).encode(text, kind=what) for text in (values["prompt"], "")]
    mask = tensors["attention_mask"].bool()
    recorded = [ids[seen].tolist() for ids, seen in zip(tensors["input_ids"], mask, strict=True)]
    assert recorded == [row for row in rows for _ in range(count)]
    assert bool((mask.long().diff(dim=1) >= 0).all())  # padded on the left


def test_frames_of_a_video():
    """13 are recorded, and the model saw 8 of them."""
    _, tensors = trace("vila-u-tiny", "understand-video")
    frames = read_video([Image.fromarray(frame) for frame in tensors["media"].numpy()], FRAMES)
    side = tensors["pixel_values"].shape[-1]
    seen = np.stack([np.asarray(frame.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32) for frame in frames])
    expected = tensors["pixel_values"].permute(0, 2, 3, 1)
    assert torch.allclose(torch.from_numpy(seen) / 127.5 - 1, expected, atol=1e-6)

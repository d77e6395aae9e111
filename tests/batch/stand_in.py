"""A model that draws its seed as a colour, and does what a prompt tells it."""

from __future__ import annotations

import os
import types
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from hart_infer.batch.worker import Model
from hart_infer.errors import InputError, OutOfMemoryError

SIDE = 4


@dataclass
class Told:
    """A prompt, as a Subject."""

    argument: str
    metadata: dict[str, Any] = field(default_factory=dict)


CALLS: list[dict[str, Any]] = []  # of this process


def subject(prompt: str) -> Told:
    if prompt == "nonsense":
        raise InputError("nonsense is no class.")
    return Told(prompt, {"prompt": prompt})


def draw(prompts: list[str], *, seed: list[int], **settings: Any) -> Any:
    CALLS.append({"prompts": prompts, "seed": seed, **settings})
    for prompt in prompts:
        if prompt == "die":
            os._exit(9)
        if prompt == "break":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if prompt == "fail":
            raise ValueError("no such thing")
        if prompt == "interrupt":
            raise KeyboardInterrupt
    if "large" in prompts and len(prompts) > 1:
        raise OutOfMemoryError("too many at once.")
    return types.SimpleNamespace(images=[colour(one) for one in seed])


def colour(seed: int) -> Image.Image:
    return Image.new("RGB", (SIDE, SIDE), (seed % 256, seed // 256 % 256, seed // 65536 % 256))


def load() -> Model:
    return Model(draw, "stand-in", {"guidance_scale": 2.0, "top_k": None}, {"dtype": "float32"}, subject, "0123")

"""A model that draws at once, for a worker's process; some prompts make it fail. Run as a module, it is served."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from hart_infer.errors import InputError, OutOfMemoryError
from hart_infer.server.model import Model

SIDE = 16
STEPS = 6
NAME = "stand-in"


@dataclass
class Step:
    index: int
    num_scales: int
    f_hat: np.ndarray[Any, Any]  # a colour for each row

    def preview(self) -> list[Image.Image]:
        return [painted((*row[:2], self.index)) for row in self.f_hat]


@dataclass(frozen=True)
class Output:
    images: list[Image.Image]


class StandIn:
    """Calls look like a pipeline's."""

    sizes = (SIDE, 2 * SIDE)
    device = "cpu"
    dtype = "float32"
    num_scales = STEPS
    defaults = SimpleNamespace(guidance_scale=1.0)

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.calls: list[tuple[str, ...]] = []  # prompts of each call
        self.previewed: list[int] = []  # rows of each preview

    def __call__(
        self,
        prompt: Sequence[str],
        *,
        num_images_per_prompt: int,
        seed: Sequence[int],
        size: int,
        guidance_scale: float = 1.0,
        negative_prompt: str = "",
        top_k: int = 0,
        edit: Any = None,
        reproducible: bool = True,
        callback_on_step_end: Callable[[Any], object] = lambda step: None,
    ) -> Output:
        prompts = [each for each in prompt for _ in range(num_images_per_prompt)]
        assert len(prompts) == len(seed)
        self.calls.append(tuple(prompts))
        colours = np.array([colour(*row) for row in zip(prompts, seed, strict=True)])
        for index in range(STEPS):
            time.sleep(self.seconds)
            for each in prompts:
                misbehave(each, index)
            callback_on_step_end(Step(index, STEPS, colours))
        images = [picture(*row, size) for row in zip(prompts, seed, strict=True)]
        return Output(images if edit is None else [painted_over(each, *edit) for each in images])

    def edit(self, image: Image.Image, mask: Image.Image) -> tuple[Image.Image, Image.Image]:
        return image, mask

    def reconstruct(self, image: Image.Image, mode: str) -> Image.Image:
        """A discrete one is darker."""
        return image.point(lambda value: value // 2) if mode == "discrete" else image


class Talker(StandIn):
    """Answers too."""

    def answer(self, media: Any, question: Any, *, history: Any, stream: bool, **options: Any) -> Any:
        assert media is None and stream
        told = [part if isinstance(part, str) else f"[{part.width}x{part.height}]" for part in question]
        for piece in [f"{len(history)} turns before, now ", *told, f" {sorted(options.items())}"]:
            misbehave(piece, 2)
            time.sleep(self.seconds)
            yield piece


def misbehave(prompt: str, index: int) -> None:
    """Do what a prompt says, in the middle."""
    if "slow" in prompt:
        time.sleep(0.15)
    if index != 2:
        return
    if "die" in prompt:
        os.kill(os.getpid(), signal.SIGKILL)
    if "hang" in prompt:
        time.sleep(3600)
    if "break" in prompt:
        raise RuntimeError(f"broken by {prompt}")
    if "too much" in prompt:
        raise OutOfMemoryError("There is no memory for this.")


def argument(prompt: str) -> str:
    """A prompt that the model does not take."""
    if "unknown" in prompt:
        raise InputError("There is no such class.")
    return prompt


def colour(prompt: str, seed: int) -> tuple[int, int, int]:
    red, green, blue = hashlib.sha256(f"{seed} {prompt}".encode()).digest()[:3]
    return red, green, blue


def painted_over(new: Image.Image, given: Image.Image, mask: Image.Image) -> Image.Image:
    return Image.composite(new, given.resize(new.size), mask.resize(new.size))


def painted(fill: Sequence[Any], side: int = SIDE) -> Image.Image:
    return Image.new("RGB", (side, side), tuple(map(int, fill)))


def picture(prompt: str, seed: int, side: int = SIDE) -> Image.Image:
    """What a seed draws."""
    return painted(colour(prompt, seed), side)


def load(name: str = NAME, seconds: float = 0.0, *, talks: bool = False, loads: float = 0.0, fails: bool = False) -> Model:
    time.sleep(loads)
    if fails:
        fail_to_load()
    return Model(Talker(seconds) if talks else StandIn(seconds), name, "HART", argument)


def fail_to_load() -> Model:
    raise InputError("There is no such checkpoint.")


def main(arguments: Sequence[str]) -> None:
    """Serve with settings NAME=VALUE; `seconds` is a step's, `loads` the model's.

    `fails` makes loading fail; `page` serves the web page.
    """
    from hart_infer.server.run import Server, bind
    from hart_infer.server.settings import make_settings

    given: dict[str, Any] = dict(argument.split("=", 1) for argument in arguments)
    page, fails = (bool(given.pop(name, "")) for name in ("page", "fails"))
    times = {name: float(given.pop(name, 0)) for name in ("seconds", "loads")}
    settings = make_settings(**{"port": 0, **given})
    listening = bind(settings.host, settings.port)
    Server({NAME: partial(load, talks=True, fails=fails, **times)}, settings, page=page).run(
        listening, partial(print, flush=True)
    )


if __name__ == "__main__":
    main(sys.argv[1:])

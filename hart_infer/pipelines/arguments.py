"""Checks of a call's arguments, each with one clear sentence."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch

from ..errors import InputError

MAX_SEED = 2**64 - 1  # what a torch.Generator takes
DRAWN_SEEDS = 2**32  # fresh ones are short, to be typed again
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
GeneratorArgument = torch.Generator | Sequence[torch.Generator] | None


def check_prompts(prompts: Any, name: str = "prompt") -> list[str]:
    """One or many non-empty strings, as a list."""
    listed = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(listed, list | tuple):
        raise InputError(f"{name} must be a string or a list of strings, not {type(prompts).__name__}.")
    if not listed:
        raise InputError(f"{name} is an empty list; give at least one string.")
    for i, item in enumerate(listed):
        if not isinstance(item, str):
            raise InputError(f"{name}[{i}] must be a string, not {type(item).__name__}.")
        if any("\ud800" <= letter <= "\udfff" for letter in item):
            raise InputError(f"{name}[{i}] is not valid Unicode text (it has half of a surrogate pair); decode it as UTF-8.")
        if not item.strip():
            raise InputError(f"{name}[{i}] is empty; describe the picture you want.")
    return list(listed)


def check_int(value: Any, name: str, low: int, high: int | None = None) -> int:
    """A whole number in range; booleans are not numbers."""
    is_whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not is_whole or value < low or (high is not None and value > high):
        bounds = f"from {low} to {high}" if high is not None else f"{low} or more"
        raise InputError(f"{name} must be a whole number {bounds}, not {value!r}.")
    return int(value)


def check_float(value: Any, name: str, low: float, high: float = math.inf) -> float:
    """A finite number in range."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not low <= value <= high:
        bounds = f"from {low:g} to {high:g}" if math.isfinite(high) else f"{low:g} or more"
        raise InputError(f"{name} must be a number {bounds}, not {value!r}.")
    return float(value)


def check_size(size: Any, sizes: Sequence[int]) -> None:
    """One of the sizes that the checkpoint was trained for, or None."""
    if size is None:
        return
    if type(size) is not int or size not in sizes:
        raise InputError(f"size {size!r} is not one that this checkpoint was trained for; it has {_listed(sizes)}.")


def check_output_type(value: Any) -> None:
    """One of the four forms of the result."""
    if not isinstance(value, str) or value not in OUTPUT_TYPES:
        raise InputError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, not {value!r}.")


def check_callable(value: Any, name: str) -> None:
    """A function, or None."""
    if value is not None and not callable(value):
        raise InputError(f"{name} must be a function, not {type(value).__name__}.")


def seeds_for(
    count: int, seed: int | Sequence[int] | None, generator: GeneratorArgument, device: torch.device
) -> tuple[list[int], torch.device]:
    """Every image's seed and the device that draws.

    `seed` int: seed, seed + 1, ...; a list: one per image. `generator`: its device draws; a single one gives the first seed,
    which is counted up, a list one seed each. A generator that nothing was drawn from yet gives the seed it was set to, so
    that `generator=torch.Generator().manual_seed(7)` is `seed=7`. Neither: fresh seeds from the system. Without a generator
    CUDA draws for itself and the CPU for everything else (MPS draws zeros where there must be none).
    """
    if seed is not None and generator is not None:
        raise InputError("seed and generator contradict each other; give one of them.")
    draw_device = device if device.type == "cuda" else torch.device("cpu")
    if generator is not None:
        generators = list(generator) if isinstance(generator, Sequence) else [generator]
        _check_generators(generators, draw_device)
        seed = [_next_seed(item) for item in generators]
        if isinstance(generator, torch.Generator):
            seed = [seed[0] + i for i in range(count)]
        draw_device = generators[0].device if generators else draw_device
    if seed is None:
        return [secrets.randbelow(DRAWN_SEEDS) for _ in range(count)], draw_device
    if isinstance(seed, Sequence):
        if len(seed) != count:
            name = "seed" if generator is None else "generator"
            raise InputError(f"{name} has {len(seed)} entries for {count} images; give one per image, or a single one.")
        return [check_int(item, "seed", 0, MAX_SEED) for item in seed], draw_device
    first = check_int(seed, "seed", 0, MAX_SEED - count + 1)
    return [first + i for i in range(count)], draw_device


def _check_generators(generators: Sequence[Any], draw_device: torch.device) -> None:
    for item in generators:
        if not isinstance(item, torch.Generator):
            raise InputError(f"generator must be a torch.Generator or a list of them, not {type(item).__name__}.")
        if item.device.type not in ("cpu", draw_device.type):
            raise InputError(f"generator is on {item.device}; make it on the CPU, or on {draw_device}, where noise is drawn.")
        if item.device != generators[0].device:
            raise InputError("The generators are on different devices; make them all on one.")


def _next_seed(generator: torch.Generator) -> int:
    """The generator's own seed if it is fresh, else a drawn one; either way it has been drawn from afterwards."""
    fresh = torch.Generator(generator.device).manual_seed(generator.initial_seed())
    is_fresh = torch.equal(fresh.get_state(), generator.get_state())
    drawn = torch.randint(DRAWN_SEEDS, (), generator=generator, device=generator.device).item()
    return generator.initial_seed() if is_fresh else int(drawn)


def _listed(sizes: Sequence[int]) -> str:
    return ", ".join(str(size) for size in sorted(sizes))

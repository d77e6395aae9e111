"""Check plain values that users pass; without torch, since the command line uses these checks before it imports torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from numbers import Integral, Real
from typing import Any

from ..checkpoints.configs import LATE_TEMPERATURES as LATE_TEMPERATURES
from ..checkpoints.configs import MAX_GUIDANCE as MAX_GUIDANCE
from ..errors import InputError
from ..generation.speed import Prune

MAX_SEED = 2**64 - 1  # what a torch.Generator takes
MAX_STEPS = 1000  # the residual diffusion's training steps
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def check_int(value: Any, name: str, low: int, high: int | None = None) -> int:
    """Return a whole number in range as int; booleans are refused."""
    is_whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not is_whole or value < low or (high is not None and value > high):
        bounds = f"from {low} to {high}" if high is not None else f"of {low} or more"
        raise InputError(f"{name} must be a whole number {bounds}, not {shown(value)}.")
    return int(value)


def check_float(value: Any, name: str, low: float, high: float = math.inf) -> float:
    """Return a finite number in range as float."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    try:
        number = float(value) if is_number else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or not low <= number <= high:
        bounds = f"from {low:g} to {high:g}" if math.isfinite(high) else f"of {low:g} or more"
        raise InputError(f"{name} must be a number {bounds}, not {shown(value)}.")
    return number


def check_bool(value: Any, name: str) -> bool:
    """Accept True, False and numpy.bool only."""
    if isinstance(value, bool) or type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    raise InputError(f"{name} must be True or False, not {shown(value)}.")


def check_prompts(prompts: Any, name: str = "prompt") -> list[str]:
    """Return one or many non-empty strings as a list."""
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


def factored(prompts: Sequence[Any]) -> tuple[list[Any], int]:
    """Return distinct prompts and their repeat count if all repeat alike, in order; else (prompts, 1)."""
    once = list(dict.fromkeys(prompts))
    repeats = len(prompts) // len(once)
    is_even = list(prompts) == [prompt for prompt in once for _ in range(repeats)]
    return (once, repeats) if is_even else (list(prompts), 1)


def check_size(size: Any, sizes: Sequence[int], name: str = "size") -> None:
    """Raise InputError unless `size` is None or one of the checkpoint's."""
    if size is None:
        return
    is_whole = isinstance(size, Integral) and not isinstance(size, bool)
    if not is_whole or int(size) not in sizes:
        listed = ", ".join(str(side) for side in sorted(sizes))
        raise InputError(f"{name} {shown(size)} is not one that this checkpoint was trained for; it has {listed}.")


def check_steps(value: Any, name: str = "num_inference_steps") -> int:
    """Return the steps of the residual diffusion: 0 for none, else 2 or more."""
    steps = check_int(value, name, 0, MAX_STEPS)
    if steps == 1:
        raise InputError(f"{name} must be 0 (no residual) or from 2 to {MAX_STEPS}, not 1: one step has no schedule.")
    return steps


def check_temperature(value: Any, name: str = "late_temperature") -> float:
    """Return the temperature of the scales that lose their guidance."""
    return check_float(value, name, *LATE_TEMPERATURES)


def check_prune(value: Any) -> Prune:
    """Return a Prune, or make one of its fields, as a picture's metadata has them."""
    if isinstance(value, Prune):
        return value
    if not isinstance(value, Mapping):
        raise InputError(f"prune must be a Prune, or its fields by name, not {type(value).__name__}.")
    if unknown := set(value) - {field.name for field in fields(Prune)}:
        raise InputError(f"prune takes at, drop, cache_at, once and score, not {', '.join(sorted(map(str, unknown)))}.")
    return Prune(**value)


def check_output_type(value: Any) -> None:
    """Raise InputError unless `value` is one of OUTPUT_TYPES."""
    if not isinstance(value, str) or value not in OUTPUT_TYPES:
        raise InputError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, not {shown(value)}.")


def check_seeds(first: Any, count: int, name: str = "seed") -> int:
    """Check that the seeds first ... first + count - 1 are in range; return the first."""
    return check_int(first, name, 0, MAX_SEED - count + 1)


def shown(value: Any) -> str:
    """Return a value's repr for a message, shortened to a line."""
    try:
        text = repr(value)
    except ValueError:  # an int of more digits than Python writes
        return "a far larger one"
    return text if len(text) <= 60 else f"{text[:40]}... ({len(text)} characters)"

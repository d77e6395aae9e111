"""Check configurations: each raises ConfigError with one sentence. Upper bounds stop absurd sizes before allocation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ...errors import ConfigError

MAX_SCALES = 64
MAX_SIDE = 1024  # of the last scale's grid: 16,384 pixels


def require(condition: bool, message: str) -> None:
    """Raise ConfigError unless `condition`."""
    if not condition:
        raise ConfigError(message)


def require_positive(config: Any, **limits: float) -> None:
    """Require every named field to be above 0 and at most its limit."""
    for name, limit in limits.items():
        value = getattr(config, name)
        require(0 < value < math.inf, f"{name} must be positive, not {value}.")
        require(value <= limit, f"{name} must be at most {limit:,}, not {value:,}.")


def require_one_of(config: Any, **choices: Sequence[Any]) -> None:
    """Require every named field to be one of its choices."""
    for name, allowed in choices.items():
        value = getattr(config, name)
        require(value in allowed, f"{name} must be one of {', '.join(map(str, allowed))}, not {value!r}.")


def require_rising(config: Any, name: str) -> None:
    """Require the named sides to rise from 1, and to be two or more."""
    sides = getattr(config, name)
    rises = len(sides) > 1 and sides[0] == 1 and all(a < b for a, b in zip(sides, sides[1:], strict=False))
    shown = list(sides) if len(sides) <= MAX_SCALES else f"{len(sides)} sides"
    require(rises, f"{name} must rise from 1 and have at least two entries, not {shown}.")
    fits = len(sides) <= MAX_SCALES and sides[-1] <= MAX_SIDE
    require(fits, f"{name} must have at most {MAX_SCALES} entries of at most {MAX_SIDE}, not {shown}.")

"""What may be spent less on the late scales: the knobs, and the named modes made of them. `fast.py` applies them to a schedule.

Without torch, since the command line reads the names before it imports it. A scale is named by the side of its grid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from ..errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    Score = Callable[[Tensor], Tensor]  # residual stream [R, L, D] -> [R, L]: the highest are kept

FINE = 24  # side of the coarsest grid whose tokens a named mode leaves out
Share = float | tuple[float, ...]  # of a scale's tokens; or one for each layer


@dataclass(frozen=True, kw_only=True)
class Prune:
    """Cached token pruning (FastVAR, arXiv:2503.23367): late scales compute some of their tokens, as released or once a scale.

    At the scales `at`, each sublayer runs on the tokens of the highest `score`; the others get what the same sublayer gave at
    scale `cache_at`, resized by area. Raises InputError.
    """

    at: tuple[int, ...] | None = None  # sides, rising; None: of the last scales, as many as `drop` has
    drop: tuple[Share, ...] = (0.5, 0.75)  # share of the tokens that each leaves out; of the last scale, also one per layer
    cache_at: int | None = None  # None: the scale before the first of `at`
    once: bool = False  # choose once a scale, on the first block's input, for all blocks: less work and memory
    score: Score | None = None  # None: squared distance from the mean of the tokens

    def __post_init__(self) -> None:
        """Make tuples of lists, as JSON has them, and check all that needs no schedule."""
        given: Any = self.drop
        if not isinstance(given, list | tuple) or not given:
            raise InputError(f"prune.drop must list a share from 0 to 1 for each scale that prunes, not {given!r}.")
        drop: tuple[Share, ...] = tuple(tuple(each) if isinstance(each, list) else each for each in given)
        shares = [share for each in drop for share in (each if isinstance(each, tuple) else (each,))]
        if not shares or not all(_is_number(share) and 0 <= share <= 1 for share in shares):
            raise InputError(f"prune.drop must be shares from 0 to 1, not {given!r}.")
        if any(isinstance(each, tuple) for each in (drop if self.once else drop[:-1])):
            raise InputError("prune.drop may have a share per layer at the last scale only, and not with once=True.")
        object.__setattr__(self, "drop", drop)
        if self.at is not None:
            at = tuple(self.at) if isinstance(self.at, list | tuple) else ()
            if len(at) != len(drop) or not all(isinstance(side, int) for side in at) or sorted(set(at)) != list(at):
                raise InputError(f"prune.at must be {len(drop)} rising sides, one for each of drop, not {self.at!r}.")
            object.__setattr__(self, "at", at)
        if not isinstance(self.once, bool):
            raise InputError(f"prune.once must be True or False, not {self.once!r}.")

    def on(self, sides: Sequence[int], depth: int) -> Prune:
        """Fill in `at` and `cache_at` for a model of scales `sides` and `depth` layers. Raises InputError for what it lacks."""
        at = tuple(sides[-len(self.drop) :]) if self.at is None else self.at
        for side in at:
            check_side(side, sides, "prune.at")
        first = sides.index(at[0])
        if self.cache_at is not None:
            check_side(self.cache_at, sides, "prune.cache_at")
        cache = first - 1 if self.cache_at is None else sides.index(self.cache_at)
        if not 1 <= cache < first or len(at) < len(self.drop):
            raise InputError(
                f"prune needs a scale before {at[0]}, and not the first, whose results it reuses; the model's scales are "
                f"{_listed(sides)}."
            )
        layers = len(self.drop[-1]) if isinstance(self.drop[-1], tuple) else depth
        if layers != depth or (isinstance(self.drop[-1], tuple) and at[-1] != sides[-1]):
            raise InputError(f"prune.drop per layer goes with the last scale, {sides[-1]}, and needs {depth} shares.")
        return replace(self, at=at, cache_at=sides[cache])

    def __str__(self) -> str:
        """Say in words how much is pruned where."""
        shares = [f"{_percent(share)} % at scale {side}" for side, share in zip(self.at or (), self.drop, strict=False)]
        return f"prunes {' and '.join(shares)}{', chosen once a scale' if self.once else ''}"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON has them, `score` left out; `Prune(**it)` is this Prune again where it has none."""
        return {"at": self.at, "drop": self.drop, "cache_at": self.cache_at, "once": self.once}


@dataclass(frozen=True, kw_only=True)
class Knobs:
    """All that a fast mode changes; None changes nothing."""

    guidance_stops_at: int | None = None  # no guidance from the scale of this side on: half the rows
    late_temperature: float | None = None  # logits of the scales that lost their guidance are divided by it
    prune: Prune | None = None
    stop_after: int | None = None  # the last scale that is run
    num_inference_steps: int | None = None  # of the residual diffusion

    def given(self) -> dict[str, Any]:
        """Return the knobs that are set."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) is not None}

    def over(self, others: Knobs) -> Knobs:
        """Return `others` with what is set here in place of theirs."""
        return replace(others, **self.given())

    def __str__(self) -> str:
        """Say in words what is changed, sides as names of scales."""
        words = []
        if self.guidance_stops_at is not None:
            divided = self.late_temperature not in (None, 1)
            then = f", logits divided by {self.late_temperature:g}" if divided else ""
            words.append(f"no guidance from scale {self.guidance_stops_at} on{then}")
        if self.prune is not None:
            words.append(str(self.prune))
        if self.stop_after is not None:
            words.append(f"stops after scale {self.stop_after}")
        if self.num_inference_steps is not None:
            words.append(f"{self.num_inference_steps or 'no'} steps of the residual diffusion")
        return "; ".join(words) or "the model as released"


@dataclass(frozen=True, kw_only=True)
class Speed:
    """A named mode, counted from the last scale, so that it fits every model.

    Only fine scales, of FINE or more on a side, are pruned or left out: on coarser grids a token is not like its neighbours.
    """

    left_out: int = 0  # so many of the last scales are not run, if fine
    unguided: int = 0  # so many of the last have no guidance
    drop: tuple[float, ...] = ()  # the last that are run, if fine, prune so much
    num_inference_steps: int | None = None

    def knobs(self, sides: Sequence[int]) -> Knobs:
        """Return the knobs for a model of scales `sides`, at least `min_scales` of them."""
        left_out = sum(side >= FINE for side in sides[len(sides) - self.left_out :])
        run = sides[: len(sides) - left_out]
        at = tuple(side for side in run[len(run) - len(self.drop) :] if side >= FINE)
        return Knobs(
            guidance_stops_at=sides[-self.unguided] if self.unguided else None,
            prune=Prune(at=at, drop=self.drop[-len(at) :]) if at else None,
            stop_after=run[-1] if left_out else None,
            num_inference_steps=self.num_inference_steps,
        )

    @property
    def min_scales(self) -> int:
        """How many scales a model needs for it: the first one has no memory to give."""
        return max(self.unguided + 1, self.left_out + len(self.drop) + 2) if self.unguided else 1


SpeedName = Literal["exact", "fast", "turbo", "draft"]
# A mode has a name only if it gives more time than it costs quality: docs/fast.md has the table that decides.
SPEEDS: Mapping[SpeedName, Speed] = {
    "exact": Speed(),
    "fast": Speed(unguided=1, drop=(0.5, 0.75)),
    "turbo": Speed(unguided=3, drop=(0.5, 0.75), num_inference_steps=4),
    "draft": Speed(left_out=1, unguided=3, drop=(0.5,), num_inference_steps=0),
}


def resolve(speed: SpeedName, given: Knobs, *, sides: Sequence[int], depth: int, late_temperature: float) -> Knobs:
    """Return the knobs of a named mode with those `given` in place of its own, complete for a model. Raises InputError.

    `late_temperature`: the model's, where guidance stops and none is given.
    """
    if not isinstance(speed, str) or speed not in SPEEDS:
        raise InputError(f"speed must be one of {', '.join(SPEEDS)}, not {speed!r}.")
    mode = SPEEDS[speed]
    if len(sides) < mode.min_scales:
        raise InputError(f"speed {speed!r} needs a model of {mode.min_scales} scales or more; this one has {len(sides)}.")
    knobs = given.over(mode.knobs(sides))
    for name in ("guidance_stops_at", "stop_after"):
        if getattr(knobs, name) is not None:
            check_side(getattr(knobs, name), sides, name)
    if knobs.guidance_stops_at is None and knobs.late_temperature is not None:
        raise InputError("late_temperature is of scales that lost their guidance; give guidance_stops_at, or a speed, too.")
    if knobs.guidance_stops_at is not None and knobs.late_temperature is None:
        knobs = replace(knobs, late_temperature=late_temperature)
    return knobs if knobs.prune is None else replace(knobs, prune=knobs.prune.on(sides, depth))


def check_side(side: Any, sides: Sequence[int], name: str) -> None:
    """Raise InputError unless `side` is that of one of a model's scales."""
    if isinstance(side, bool) or side not in sides:
        raise InputError(f"{name} must be the side of one of the model's scales, {_listed(sides)}, not {side!r}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _listed(sides: Sequence[int]) -> str:
    return " ".join(map(str, sides))


def _percent(share: Share) -> str:
    mean = sum(share) / len(share) if isinstance(share, tuple) else share
    return f"{100 * mean:g}"

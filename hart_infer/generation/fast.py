"""Fast modes as maps from Schedule to Schedule: each knob changes fields of some stages, and the loop stays what it is."""

from __future__ import annotations

import math
from dataclasses import replace

from .pruning import Pruned, PrunedOnce, Remember, RememberOnce, deviation
from .schedule import Schedule, Stage, placed
from .speed import Knobs, Prune, Share


def apply(knobs: Knobs, schedule: Schedule) -> Schedule:
    """Return the schedule that `knobs`, made by `resolve`, ask for."""
    if knobs.stop_after is not None:
        schedule = stop_after(schedule, knobs.stop_after)
    if knobs.guidance_stops_at is not None:
        schedule = stop_guidance(schedule, knobs.guidance_stops_at, knobs.late_temperature or 1.0)
    if knobs.prune is not None:
        schedule = prune(schedule, knobs.prune)
    if knobs.num_inference_steps is not None:
        schedule = set_inference_steps(schedule, knobs.num_inference_steps)
    return schedule


def stop_after(schedule: Schedule, side: int) -> Schedule:
    """Leave out the scales behind that of `side`, and the residual diffusion with the last one; the latent keeps its side."""
    return placed([stage for stage in schedule if stage.side <= side], schedule.latent_side)


def stop_guidance(schedule: Schedule, side: int, temperature: float) -> Schedule:
    """From the scale of `side` on compute the conditional half only; divide the logits of what was guided by `temperature`.

    The residual diffusion loses its guidance too.
    """

    def without(stage: Stage) -> Stage:
        if not stage.guided or stage.side < side:
            return stage
        return replace(stage, guided=False, guidance=0.0, logit_temperature=temperature)

    return placed([without(stage) for stage in schedule], schedule.latent_side)


def prune(schedule: Schedule, how: Prune) -> Schedule:
    """Have the scales `how.at` prune their tokens, and `how.cache_at` keep what its blocks gave.

    Scales that are not there are passed by. `length`, and so what the cache holds, becomes the number of kept tokens.
    """
    assert how.at is not None, "Prune.on fills it in"
    drop = {side: share for side, share in zip(how.at, how.drop, strict=True) if side in {stage.side for stage in schedule}}
    score = how.score or deviation

    def changed(stage: Stage) -> Stage:
        if drop and stage.side == how.cache_at:
            return replace(stage, run=RememberOnce() if how.once else Remember())
        if stage.side not in drop:
            return stage
        kept = _kept(stage.tokens, drop[stage.side])
        run = PrunedOnce(stage.side, kept, score) if how.once and isinstance(kept, int) else Pruned(stage.side, kept, score)
        return replace(stage, length=kept if isinstance(kept, int) else max(kept), run=run)

    return placed([changed(stage) for stage in schedule], schedule.latent_side)


def set_inference_steps(schedule: Schedule, num_inference_steps: int) -> Schedule:
    """Give the residual diffusion so many steps, where there is one."""
    stages = [
        replace(stage, num_inference_steps=num_inference_steps) if stage.num_inference_steps else stage for stage in schedule
    ]
    return placed(stages, schedule.latent_side)


def _kept(tokens: int, share: Share) -> int | tuple[int, ...]:
    """How many of a scale's tokens are kept where a share of them is dropped, rounded down."""
    if isinstance(share, tuple):
        return tuple(tokens - math.floor(one * tokens) for one in share)
    return tokens - math.floor(share * tokens)

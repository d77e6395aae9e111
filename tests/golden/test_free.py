"""Free-running from the seed alone: every index the recorded one, f_hat and image within the tolerance of a whole run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor

from hart_infer.generation.next_scale import GenerationState, finish, new_cache, prefill, run_scale
from hart_infer.generation.sampling import GeneratorSampler

from .recorded import Model, Trace, load_model, load_trace, relative

pytestmark = pytest.mark.golden

CHECKPOINTS = ("hart-tiny", "hart-tiny-adaln", "hart-tiny-sharedaln", "hart-tiny-var")
RUNS = [(checkpoint, name) for checkpoint in CHECKPOINTS for name in ("smooth", "hard", "cfg0")]
RUNS += [("hart-tiny", "left"), ("hart-tiny", "ema"), ("hart-tiny-1024", "hard")]

every_run = pytest.mark.parametrize(("checkpoint", "name"), RUNS)


@dataclass(frozen=True)
class Run:
    indices: list[Tensor]
    f_hats: list[Tensor]
    hidden: list[Tensor]  # of scales 1, 2, ...


@cache
def run(checkpoint: str, name: str) -> Run:
    """Of a checkpoint's model, once."""
    return generate_as_recorded(load_model(checkpoint, use_ema=name == "ema"), load_trace(checkpoint, name))


@torch.inference_mode()
def generate_as_recorded(model: Model, trace: Trace) -> Run:
    """Generate as the trace was, one generator for all its images; without guidance only the conditional half."""
    transformer, schedule = model.transformer, model.schedule(trace.settings)
    conditions = [transformer.condition(*(trace[key] for key in ("context", "context_mask", "context_position_ids")))]
    if schedule.guided:
        conditions.append(transformer.unconditional())
    cache = new_cache(
        transformer,
        rows=trace.images * len(conditions),
        length=schedule.cached_length,
        scratch_length=schedule.scratch_length,
    )
    halves = [slice(i * trace.images, (i + 1) * trace.images) for i in range(len(conditions))]
    prefixes = [prefill(transformer, condition, cache, rows) for condition, rows in zip(conditions, halves, strict=True)]
    sampler = GeneratorSampler([trace.seed], images_per_seed=trace.images)
    state = GenerationState(transformer, model.quantizer, schedule, sampler, prefixes, cache)
    hidden: list[Tensor] = []
    f_hats: list[Tensor] = []
    hook = transformer.register_forward_hook(lambda module, inputs, output: hidden.append(output))
    try:
        for stage in schedule:
            run_scale(state, stage)
            f_hats.append(state.f_hat.clone())
    finally:
        hook.remove()
    assert torch.equal(finish(state), f_hats[-1])
    return Run(state.indices, f_hats, hidden)


@every_run
def test_indices(checkpoint, name):
    trace = load_trace(checkpoint, name)
    for scale, indices in enumerate(run(checkpoint, name).indices):
        assert torch.equal(indices, trace.at(scale, "indices")), f"scale {scale}"


@every_run
def test_f_hat(checkpoint, name):
    trace = load_trace(checkpoint, name)
    f_hats = run(checkpoint, name).f_hats
    assert relative(f_hats[-1], trace["f_hat"]) <= trace.error
    for scale, f_hat in enumerate(f_hats):
        if trace.has(f"scale{scale}.f_hat"):
            assert relative(f_hat, trace.at(scale, "f_hat")) <= trace.error, f"scale {scale}"


@every_run
def test_hidden(checkpoint, name):
    """At the recorded positions, conditional rows; the unconditional ones too where they are computed."""
    trace = load_trace(checkpoint, name)
    for scale, hidden in enumerate(run(checkpoint, name).hidden, start=1):
        if not trace.has(f"scale{scale}.positions"):
            continue
        recorded = trace.at(scale, "hidden")[: len(hidden)]
        assert relative(hidden[:, trace.at(scale, "positions")], recorded) <= trace.error, f"scale {scale}"


@every_run
def test_image(checkpoint, name):
    trace, recorded = load_trace(checkpoint, name), load_trace(checkpoint, name)["image"]
    with torch.inference_mode():
        image = (load_model(checkpoint).autoencoder.decode(run(checkpoint, name).f_hats[-1]) + 1) / 2
    if recorded.dtype == torch.uint8:
        assert ((image * 255).round() - recorded.float()).abs().max() <= 1
    else:
        assert relative(image, recorded) <= trace.error

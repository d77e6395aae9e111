"""Free-running from the seed alone: every index the recorded one, f_hat and image within the tolerance of a whole run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor

from hart_infer.generation.next_scale import generate, prefill, unconditional_prefill
from hart_infer.generation.sampling import Draws

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
    """Generate as the trace was; without guidance only the conditional half."""
    start = (trace[key] for key in ("context", "context_mask", "context_position_ids"))
    halves = [prefill(model.transformer, *start, model.stages[0])[0]]
    if trace.settings.guidance_scale:
        halves.append(unconditional_prefill(model.transformer, model.stages[0]))
    draws = Draws([trace.seed], "cpu", images_per_seed=trace.images)
    hidden: list[Tensor] = []
    hook = model.transformer.register_forward_hook(lambda module, inputs, output: hidden.append(output))
    try:
        outputs = list(generate(model.transformer, model.quantizer, model.stages, halves, draws, trace.settings))
    finally:
        hook.remove()
    return Run([output.indices for output in outputs], [output.f_hat for output in outputs], hidden)


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

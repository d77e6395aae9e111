"""The public API, given a trace's context and seed, gives the trace's codes and picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from hart_infer import HartPipeline, PromptEmbeds
from hart_infer.generation.sampling import GeneratorSampler

from .data import golden
from .recorded import load_trace, relative

pytestmark = pytest.mark.golden

CHECKPOINTS = ("hart-tiny", "hart-tiny-adaln", "hart-tiny-sharedaln", "hart-tiny-var")


def call(checkpoint, name, monkeypatch, **options):
    """The picture as a tensor, and the codes drawn for it, scale by scale."""
    pipe = HartPipeline.from_pretrained(golden(checkpoint), text_encoder=False, device="cpu", use_ema=name == "ema")
    pipe.set_progress_bar_config(disable=True)
    trace = load_trace(checkpoint, name)
    codes = []
    multinomial = GeneratorSampler.multinomial
    monkeypatch.setattr(GeneratorSampler, "multinomial", lambda self, rows: codes.append(multinomial(self, rows)) or codes[-1])
    settings = trace.settings
    output = pipe(
        prompt_embeds=PromptEmbeds(trace["context"], trace["context_mask"]),
        seed=trace.seed,
        guidance_scale=settings.guidance_scale,
        top_p=settings.top_p,
        more_smooth=settings.more_smooth,
        **options,
    )
    assert output.seeds == [trace.seed]
    return output.images, codes


@pytest.mark.parametrize(("checkpoint", "name"), [("hart-tiny", "ema"), *((name, "cfg0") for name in CHECKPOINTS)])
def test_trace_of_one_image(checkpoint, name, monkeypatch):
    trace = load_trace(checkpoint, name)
    image, codes = call(checkpoint, name, monkeypatch, output_type="pt")
    for scale, indices in enumerate(codes):
        assert torch.equal(indices, trace.at(scale, "indices")), f"scale {scale}"
    assert (image - trace["image"]).abs().max() <= trace.error


def test_picture_is_the_recorded_one(monkeypatch):
    """PIL pictures are rounded to the nearest of 256 levels; the tolerance can move a value to the next one or two."""
    trace = load_trace("hart-tiny", "ema")
    images, _ = call("hart-tiny", "ema", monkeypatch)
    assert isinstance(images[0], Image.Image)
    pixels = torch.from_numpy(np.array(images[0])).permute(2, 0, 1).float()
    levels = trace["image"][0] * 255
    assert (pixels - levels).abs().max() <= 0.5 + 255 * trace.error
    assert (pixels - levels).mean().abs() < 0.1  # half a level if they were truncated


def test_ema_weights_matter():
    """The EMA trace was not made with the plain weights: what `use_ema` picks is not a matter of taste."""
    trace = load_trace("hart-tiny", "ema")
    pipe = HartPipeline.from_pretrained(golden("hart-tiny"), text_encoder=False, device="cpu", use_ema=False)
    pipe.set_progress_bar_config(disable=True)
    embeds = PromptEmbeds(trace["context"], trace["context_mask"])
    image = pipe(prompt_embeds=embeds, seed=trace.seed, output_type="pt").images
    assert relative(image, trace["image"]) > 0.5

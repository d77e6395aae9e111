"""VAR fed the recorded codes: guided logits and f_hat agree within 1e-5 relative."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from hart_infer.ops.logits import guide

from .data import VAR_CHECKPOINTS
from .recorded import FED, relative
from .recorded_var import feed_transformer, load_autoencoder, load_model, load_trace

pytestmark = pytest.mark.golden

SCALES = range(10)
every_checkpoint = pytest.mark.parametrize("checkpoint", VAR_CHECKPOINTS)
every_scale = pytest.mark.parametrize("scale", SCALES)


@cache
@torch.inference_mode()
def fed(checkpoint: str) -> tuple[list[Tensor], list[Tensor]]:
    """Both halves' logits of every scale, and what each scale's recorded codes add to f_hat."""
    model, trace = load_model(checkpoint), load_trace(checkpoint, "hard")
    schedule = model.schedule(trace.settings)
    codes = [model.quantizer.embed(trace.at(scale, "indices")) for scale in SCALES]
    inputs = [latent.repeat(2, 1, 1, 1) for latent in model.quantizer.inputs(codes)]
    no_class = torch.full_like(trace["labels"], model.transformer.config.num_classes)
    logits = feed_transformer(model.transformer, schedule, torch.cat([trace["labels"], no_class]), inputs)
    return logits, [model.quantizer.contribution(codes[stage.index], stage.phi) for stage in schedule]


@every_checkpoint
@every_scale
def test_guided_logits(checkpoint, scale):
    """Before top-k; the guidance grows up to the last scale, and the first has none."""
    trace = load_trace(checkpoint, "hard")
    stage = load_model(checkpoint).schedule(trace.settings).stages[scale]
    guided = guide(fed(checkpoint)[0][scale], stage.guidance)
    assert relative(guided[:, trace.at(scale, "positions")], trace.at(scale, "guided_logits")) <= FED


@every_checkpoint
@every_scale
def test_f_hat(checkpoint, scale):
    """Codes resized bicubically and refined by the right convolution, at the last scale as well."""
    recorded = load_trace(checkpoint, "hard").at(scale, "f_hat")
    f_hat = sum(fed(checkpoint)[1][: scale + 1])
    assert relative(f_hat[:, : recorded.shape[1]], recorded) <= FED


@every_checkpoint
@pytest.mark.parametrize("name", ["hard", "smooth"])
def test_image(checkpoint, name):
    """Rounded to the nearest of 65536 levels, which adds half of one."""
    trace, autoencoder = load_trace(checkpoint, name), load_autoencoder(checkpoint)
    with torch.inference_mode():
        image = (autoencoder.decode(trace["f_hat"]) + 1) / 2
    assert (image - trace["image"].float() / 65535).abs().max() <= FED + 0.5 / 65535

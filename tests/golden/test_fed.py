"""Fed the recorded tensors scale by scale, every number agrees within 1e-5 relative."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from hart_infer import ops
from hart_infer.generation.next_scale import prefill_alone
from hart_infer.generation.residual import sample_residual
from hart_infer.generation.sampling import GeneratorSampler
from hart_infer.models.parts.modulation import Modulation
from hart_infer.ops.logits import filter_logits, guide

from . import naive
from .recorded import (
    FED,
    Recorded,
    RecordedNoise,
    feed_transformer,
    load_model,
    load_trace,
    recorded_inputs,
    relative,
    released_weights,
    rms,
)

pytestmark = pytest.mark.golden

CHECKPOINTS = ("hart-tiny", "hart-tiny-adaln", "hart-tiny-sharedaln", "hart-tiny-var")  # those with a full trace
SCALES = range(6)
LAST = SCALES[-1]
THIN = [(name, trace) for name in CHECKPOINTS for trace in ("hard", "cfg0")] + [("hart-tiny", "left")]

every_checkpoint = pytest.mark.parametrize("checkpoint", CHECKPOINTS)
every_scale = pytest.mark.parametrize("scale", SCALES)
scales_before_last = pytest.mark.parametrize("scale", SCALES[:-1])


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@cache
def fed(checkpoint: str) -> tuple[list[Tensor], Modulation]:
    model, trace = load_model(checkpoint), load_trace(checkpoint, "smooth")
    return feed_transformer(model, trace, recorded_inputs(model, trace))


@cache
def fed_hard(checkpoint: str) -> list[Tensor]:
    model, trace = load_model(checkpoint), load_trace(checkpoint, "hard")
    return feed_transformer(model, trace, recorded_inputs(model, trace))[0]


@every_checkpoint
@every_scale
def test_hidden(checkpoint, scale):
    assert relative(fed(checkpoint)[0][scale], load_trace(checkpoint, "smooth").at(scale, "hidden")) <= FED


@every_checkpoint
def test_unconditional_half(checkpoint):
    """Encoded alone, one row, it is what the released code computes beside every prompt."""
    model, trace = load_model(checkpoint), load_trace(checkpoint, "smooth")
    hidden = prefill_alone(model.transformer, model.transformer.unconditional()).hidden_states
    for row in trace.at(0, "hidden")[trace.images :]:
        assert relative(hidden[0], row[-1:]) <= FED


@every_checkpoint
@every_scale
def test_logits(checkpoint, scale):
    trace = load_trace(checkpoint, "smooth")
    logits = load_model(checkpoint).transformer.head(trace.at(scale, "hidden"), fed(checkpoint)[1].head)
    assert relative(logits, trace.at(scale, "logits")) <= FED


@every_checkpoint
@every_scale
def test_guided_logits(checkpoint, scale):
    """The last scale's guidance is the one before's; at scale 0 the last position counts, and it is not guided."""
    model, trace = load_model(checkpoint), load_trace(checkpoint, "smooth")
    stage, recorded = model.schedule(trace.settings).stages[scale], trace.at(scale, "guided_logits")
    guided = guide(trace.at(scale, "logits")[:, -stage.tokens :], stage.guidance)
    assert relative(guided, recorded) <= FED


@every_checkpoint
def test_draws(checkpoint):
    """Recorded logits and the seed give the recorded indices and Gumbel noise: the order and shape of every draw."""
    model, trace = load_model(checkpoint), load_trace(checkpoint, "smooth")
    sampler = GeneratorSampler([trace.seed], images_per_seed=trace.images)
    for stage in model.schedule(trace.settings):
        logits = trace.at(stage.index, "guided_logits").clone()
        filtered = filter_logits(logits, top_k=stage.top_k, top_p=stage.top_p)
        assert torch.equal(sampler.multinomial(filtered.softmax(dim=-1)), trace.at(stage.index, "indices"))
        assert relative(sampler.gumbel(filtered), trace.at(stage.index, "gumbel")) <= FED


@every_checkpoint
@every_scale
def test_temperature(checkpoint, scale):
    assert load_model(checkpoint).schedule().stages[scale].temperature == pytest.approx(
        load_trace(checkpoint, "smooth").at(scale, "tau").item(), rel=FED
    )


@every_checkpoint
@scales_before_last
def test_embedding(checkpoint, scale):
    """The mixture that is fed on; 1 / tau multiplies the logits' own rounding, so they are the recorded ones."""
    model, trace = load_model(checkpoint), load_trace(checkpoint, "smooth")
    stage = model.schedule().stages[scale]
    mixed = _mixture(checkpoint, scale).transpose(1, 2).unflatten(2, (stage.side, stage.side))
    assert relative(mixed, trace.at(scale, "embedding")) <= FED


@every_checkpoint
@scales_before_last
def test_f_hat(checkpoint, scale):
    """Bicubic upsampling and the right one of the shared residual convolutions."""
    model, trace = load_model(checkpoint), load_trace(checkpoint, "smooth")
    reference = trace.at(scale, "f_hat")
    before = trace.at(scale - 1, "f_hat") if scale else torch.zeros_like(reference)
    added = model.quantizer.contribution(trace.at(scale, "embedding"), model.schedule().stages[scale].phi)
    assert relative(before + added, reference) <= FED


@every_checkpoint
@scales_before_last
def test_next_input(checkpoint, scale):
    model, trace = load_model(checkpoint), load_trace(checkpoint, "smooth")
    resized = model.quantizer.next_input(trace.at(scale, "f_hat"), model.schedule().stages[scale + 1].side)
    assert relative(resized, trace.at(scale, "next_input")) <= FED


@every_checkpoint
def test_diffusion_condition(checkpoint):
    """Always of the drawn, hard index, although a mixture is fed on."""
    model, trace = load_model(checkpoint), load_trace(checkpoint, "smooth")
    codes = model.quantizer.codebook(trace.at(LAST, "indices"))
    condition = model.transformer.residual_condition(trace.at(LAST, "hidden"), codes)
    assert relative(condition.flatten(0, 1), trace["diffusion.condition"]) <= FED


@every_checkpoint
def test_diffusion_sample(checkpoint):
    model, trace = load_model(checkpoint), load_trace(checkpoint, "smooth")
    condition = trace["diffusion.condition"].unflatten(0, (2 * trace.images, -1))
    guidance, noise = trace["diffusion.cfg"].item(), RecordedNoise(trace)
    sample = sample_residual(
        model.transformer.diffusion,
        condition,
        settings=ops.draw_settings(guidance=guidance),
        num_inference_steps=8,
        noise=noise,
    )
    _check_sample(sample, checkpoint, trace, condition)


@pytest.mark.parametrize(("checkpoint", "name"), [(checkpoint, "smooth") for checkpoint in CHECKPOINTS] + THIN)
def test_diffusion_guidance_and_noise(checkpoint, name):
    """The last scale's guidance, and a second generator with the same seed that draws both halves' noise."""
    model, trace = load_model(checkpoint), load_trace(checkpoint, name)
    last = model.schedule(trace.settings).stages[-1]
    assert last.guidance == pytest.approx(trace["diffusion.cfg"].item(), rel=FED)
    noise = GeneratorSampler([trace.seed], images_per_seed=trace.images).noise
    shape = (last.tokens, model.transformer.diffusion.channels, torch.device("cpu"))
    assert relative(noise.start(*shape).flatten(0, 1), trace["diffusion.noise_init"]) <= FED
    for step in range(8):
        assert relative(noise.step(*shape).flatten(0, 1), trace[f"diffusion.noise{step}"]) <= FED


@every_checkpoint
def test_final_f_hat(checkpoint):
    """The last scale adds its mixture and the residual, without a residual convolution."""
    trace = load_trace(checkpoint, "smooth")
    tokens = _mixture(checkpoint, LAST) + _conditional_sample(trace).unflatten(0, (trace.images, -1))
    f_hat = trace.at(LAST - 1, "f_hat") + tokens.transpose(1, 2).reshape(trace["f_hat"].shape)
    assert relative(f_hat, trace["f_hat"]) <= FED


@pytest.mark.parametrize(("checkpoint", "name"), [(checkpoint, "smooth") for checkpoint in CHECKPOINTS] + THIN)
def test_image(checkpoint, name):
    trace = load_trace(checkpoint, name)
    image = (load_model(checkpoint).autoencoder.decode(trace["f_hat"]) + 1) / 2
    assert relative(image, trace["image"]) <= FED


@every_checkpoint
@every_scale
def test_hidden_of_hard_trace(checkpoint, scale):
    """Three images, fed what the recorded indices stand for."""
    _check_thin_hidden(fed_hard(checkpoint)[scale], load_trace(checkpoint, "hard"), scale)


@pytest.mark.parametrize(("checkpoint", "name"), THIN)
def test_context_of_thin_trace(checkpoint, name):
    """Scale 0 is all that a thin trace with mixtures can be fed; the left-padded one has position ids of -1."""
    trace = load_trace(checkpoint, name)
    hidden, _ = feed_transformer(load_model(checkpoint), trace, [])
    _check_thin_hidden(hidden[0], trace, 0)


@pytest.mark.parametrize(("checkpoint", "name"), THIN)
def test_diffusion_sample_of_thin_trace(checkpoint, name):
    """The network is per token, so the recorded positions are enough. At guidance 0 only the conditional half counts."""
    model, trace = load_model(checkpoint), load_trace(checkpoint, name)
    positions = trace.at(LAST, "positions")
    codes = model.quantizer.codebook(trace.at(LAST, "indices")[:, positions])
    condition = model.transformer.residual_condition(trace.at(LAST, "hidden"), codes)
    sample = sample_residual(
        model.transformer.diffusion,
        condition if trace.settings.guidance_scale else condition[: trace.images],
        settings=ops.draw_settings(guidance=trace["diffusion.cfg"].item()),
        num_inference_steps=8,
        noise=RecordedNoise(trace, positions),
    )
    _check_sample(sample, checkpoint, trace, condition, positions)


@every_checkpoint
def test_final_f_hat_of_hard_trace(checkpoint):
    model, trace = load_model(checkpoint), load_trace(checkpoint, "hard")
    quantizer = model.quantizer
    codes = [quantizer.embed(trace.at(scale, "indices")) for scale in SCALES]
    f_hat = sum(quantizer.contribution(codes[stage.index], stage.phi) for stage in model.schedule())
    sample = _conditional_sample(trace).unflatten(0, (trace.images, -1)).transpose(1, 2)
    assert relative(f_hat + sample.reshape(f_hat.shape), trace["f_hat"]) <= FED


def _mixture(checkpoint: str, scale: int) -> Tensor:
    """What a sampler gives to feed on, given the recorded logits and draws."""
    model, trace = load_model(checkpoint), load_trace(checkpoint, "smooth")
    logits = trace.at(scale, "guided_logits").clone()
    codebook = model.quantizer.codebook.weight
    stage = model.schedule(trace.settings).stages[scale]
    indices, mixed = Recorded(trace, scale=scale).draw(logits, codebook, stage)
    assert torch.equal(indices, trace.at(scale, "indices"))
    return mixed


def _check_sample(sample: Tensor, checkpoint: str, trace, condition: Tensor, positions=slice(None)) -> None:
    """Within 1e-5 of the recorded residual [B, L, C], or no further from the exact one than twice the recorded one is.

    The first step divides by a very small alpha-bar, which amplifies rounding: the recording is 5e-5 from the same maths in
    fp64, and only a CPU whose BLAS rounds alike meets it within 1e-5.
    """

    def noise(name):
        return trace[f"diffusion.noise{name}"].unflatten(0, (trace.images, -1))[:, positions].flatten(0, 1).double()

    recorded = _conditional_sample(trace).unflatten(0, (trace.images, -1))[:, positions]
    if relative(sample, recorded) > FED:
        weights = released_weights(checkpoint, "llm", torch.float64)
        exact = naive.residual(
            weights,
            condition.flatten(0, 1).double(),
            trace["diffusion.cfg"].item(),
            noise("_init"),
            [noise(step) for step in range(8)],
        ).view(recorded.shape)
        assert rms(sample, exact) <= 2 * rms(recorded, exact)


def _conditional_sample(trace) -> Tensor:
    """The conditional half of the recorded residual [B L, C]."""
    return trace["diffusion.sample"].chunk(2)[0]


def _check_thin_hidden(hidden: Tensor, trace, scale: int) -> None:
    assert relative(hidden[:, trace.at(scale, "positions")], trace.at(scale, "hidden")) <= FED

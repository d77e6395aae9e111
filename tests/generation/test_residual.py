"""The residual diffusion: its schedule, its network and its loop."""

from __future__ import annotations

import math

import pytest
import torch

from hart_infer.generation.residual import LATENT_SCALE, denoise, diffusion_schedule, sample_residual
from hart_infer.generation.sampling import GeneratorSampler
from hart_infer.models.parts.diffusion import ResidualDiffusion
from hart_infer.ops import draw_settings


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(1)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return ResidualDiffusion(channels=4, condition_dim=32, width=16, depth=2).requires_grad_(False)


def alpha_bar(timestep):
    """Of the whole schedule's first steps, none of whose betas reaches .999."""
    return (math.cos(((timestep + 1) / 1000 + 0.008) / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)) ** 2


def test_kept_steps():
    assert [step.timestep for step in diffusion_schedule(8)] == [999, 856, 714, 571, 428, 285, 143, 0]
    assert [step.adds_noise for step in diffusion_schedule(8)] == [True] * 7 + [False]


@pytest.mark.parametrize("steps", [2, 8, 100, 1000])
def test_constants_are_those_of_the_kept_alpha_bars(steps):
    schedule = diffusion_schedule(steps)
    for step, previous in zip(schedule[1:-1], schedule[2:], strict=True):
        now, before = alpha_bar(step.timestep), alpha_bar(previous.timestep)
        beta = 1 - now / before
        assert step.x0_from_x == pytest.approx(now**-0.5)
        assert step.x0_from_noise == pytest.approx((1 / now - 1) ** 0.5)
        assert step.log_variance_max == pytest.approx(math.log(beta))
        assert step.log_variance_min == pytest.approx(math.log(beta * (1 - before) / (1 - now)))
        # The posterior mean of the noiseless x_t is the noiseless x_{t-1}.
        assert step.mean_from_x0 + step.mean_from_x * now**0.5 == pytest.approx(before**0.5)


def test_betas_are_at_most_999_thousandths():
    """Without the limit the last alpha-bar would be all but 0: cos of a right angle."""
    last, one_before = diffusion_schedule(1000)[:2]
    assert math.exp(last.log_variance_max) == pytest.approx(0.999)
    assert math.exp(one_before.log_variance_max) == pytest.approx(0.75, abs=0.01)
    assert last.x0_from_x**-2 == pytest.approx(alpha_bar(998) * 0.001)


def test_first_log_variance_is_clipped_to_the_second():
    """The first posterior variance is zero."""
    *_, second, first = diffusion_schedule(8)
    assert first.log_variance_min == second.log_variance_min
    assert math.isfinite(first.log_variance_min)


def test_both_halves_share_x(network):
    """One x_t for both guidance halves is what two equal ones give."""
    x, condition = torch.randn(6, 4), torch.randn(12, 16)
    time = network.time_embed(torch.tensor([428]))
    shared = network(x, time, condition)
    for ours, doubled in zip(shared, network(torch.cat([x, x]), time, condition), strict=True):
        torch.testing.assert_close(ours, doubled)


def test_variance_is_the_conditional_half_s():
    """Guidance acts on the noise only: equal noises, and the unconditional variance does not count."""
    step = diffusion_schedule(8)[3]
    x, noise = torch.randn(6, 4), torch.randn(6, 4)
    eps, conditional, unconditional = torch.randn(3, 6, 4)

    class Fixed(ResidualDiffusion):
        def forward(self, x, time, condition):
            halves = len(condition) // len(x)
            return eps.repeat(halves, 1), torch.cat([conditional, unconditional])[: len(condition)]

    fixed, time = Fixed(channels=4, condition_dim=32, width=16, depth=1), torch.zeros(1, 16)
    guided = denoise(fixed, x, step, time, torch.zeros(12, 16), draw_settings(guidance=3.0), noise)
    torch.testing.assert_close(guided, denoise(fixed, x, step, time, torch.zeros(6, 16), draw_settings(), noise))


def test_last_step_adds_no_noise_and_clips(network):
    """Its noise is drawn in the released code; nothing is drawn after it, so here it is not."""
    last = diffusion_schedule(8)[-1]
    x, time, condition = 10 * torch.randn(6, 4), torch.randn(1, 16), torch.randn(6, 16)
    quiet, loud = (
        denoise(network, x, last, time, condition, draw_settings(), noise)
        for noise in (torch.zeros(6, 4), torch.full((6, 4), 9.0))
    )
    assert quiet.equal(loud)
    assert quiet.abs().max() <= 1


def test_sample_is_in_units_of_the_latent(network):
    """Clipped to 1 in the network's units, which are 1 / 0.6 of the latent's."""
    condition = torch.randn(2, 50, 32)
    noise = GeneratorSampler([0, 1]).noise
    sample = sample_residual(network, condition, settings=draw_settings(), num_inference_steps=8, noise=noise)
    assert sample.shape == (2, 50, 4)
    assert sample.abs().max() == pytest.approx(LATENT_SCALE)


class Given:
    """Noise that is given: x_T, and what each step adds."""

    def __init__(self, start, steps):
        self.first, self.steps = start, iter(steps)

    def start(self, *_):
        return self.first

    def step(self, *_):
        return next(self.steps)


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0])
def test_temperature_scales_what_the_steps_add_alone(network, temperature):
    condition, start, steps = torch.randn(2, 50, 32), torch.randn(2, 50, 4), torch.randn(7, 2, 50, 4)

    def sample(steps, **changes):
        noise = Given(start, steps)
        return sample_residual(network, condition, settings=draw_settings(), num_inference_steps=8, noise=noise, **changes)

    assert sample(steps, temperature=temperature).equal(sample(steps * temperature))
    assert sample(steps, temperature=1.0).equal(sample(steps))
    assert not sample(steps, temperature=0.5).equal(sample(steps))
    assert sample(steps, temperature=0.0).equal(sample(-steps, temperature=0.0))


def test_guidance_of_exactly_one_is_guidance(network):
    """The released code takes t = 1 for none at all."""
    condition = torch.randn(4, 50, 32)

    def sample(condition, guidance):
        noise = GeneratorSampler([0, 1]).noise
        return sample_residual(
            network, condition, settings=draw_settings(guidance=guidance), num_inference_steps=8, noise=noise
        )

    torch.testing.assert_close(sample(condition, 1.0), sample(condition, 1 + 1e-7), atol=1e-3, rtol=0)
    assert (sample(condition, 1.0) - sample(condition[:2], 1.0)).abs().max() > 0.1

"""The residual diffusion's loop: eight steps of the improved-DDPM sampler on a cosine schedule turn noise into the residual
(paper section 3.3; released `DiffLoss.sample`, `SpacedDiffusion.p_sample_loop`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .. import ops
from ..models.parts.diffusion import ResidualDiffusion
from .noise import Noise

TRAIN_STEPS = 1000
LATENT_SCALE = 0.6  # latent = sample * LATENT_SCALE


@dataclass(frozen=True)
class DiffusionStep:
    """Constants of one denoising step, computed in fp64."""

    timestep: int  # the original step number, which the network sees
    x0_from_x: float  # x0 = x0_from_x * x_t - x0_from_noise * eps
    x0_from_noise: float
    mean_from_x0: float  # posterior mean = mean_from_x0 * x0 + mean_from_x * x_t
    mean_from_x: float
    log_variance_min: float  # posterior log variance
    log_variance_max: float  # log beta
    adds_noise: bool


def _cosine_alpha_bar(time: float) -> float:
    return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2


@lru_cache(maxsize=8)
def diffusion_schedule(num_inference_steps: int) -> tuple[DiffusionStep, ...]:
    """Return the steps, largest t first: t_i = round(i * 999 / (n - 1)); betas from the kept alpha-bars."""
    kept = [round(i * (TRAIN_STEPS - 1) / (num_inference_steps - 1)) for i in range(num_inference_steps)]
    alpha_bars, alpha_bar = [], 1.0
    for i in range(TRAIN_STEPS):
        beta = 1 - _cosine_alpha_bar((i + 1) / TRAIN_STEPS) / _cosine_alpha_bar(i / TRAIN_STEPS)
        alpha_bar *= 1 - min(beta, 0.999)
        alpha_bars.append(alpha_bar)
    constants = []
    previous = 1.0
    for i, timestep in enumerate(kept):
        current = alpha_bars[timestep]
        beta = 1 - current / previous
        variance = beta * (1 - previous) / (1 - current)
        constants.append((timestep, current, previous, beta, variance, i > 0))
        previous = current
    clipped_variance = constants[1][4]  # at t = 0 the variance is 0; its log is the next step's, as released
    return tuple(
        DiffusionStep(
            timestep=timestep,
            x0_from_x=math.sqrt(1 / current),
            x0_from_noise=math.sqrt(1 / current - 1),
            mean_from_x0=beta * math.sqrt(previous) / (1 - current),
            mean_from_x=(1 - previous) * math.sqrt(1 - beta) / (1 - current),
            log_variance_min=math.log(variance if adds_noise else clipped_variance),
            log_variance_max=math.log(beta),
            adds_noise=adds_noise,
        )
        for timestep, current, previous, beta, variance, adds_noise in reversed(constants)
    )


def sample_residual(
    network: ResidualDiffusion,
    condition: Tensor,
    *,
    settings: Tensor,
    num_inference_steps: int,
    temperature: float = 1.0,
    noise: Noise,
) -> Tensor:
    """Sample the residual [B, L, C] fp32, in units of the latent, for the B images of `noise`.

    `condition` z [R, L, D]: R = B, or 2B with the unconditional rows last; `settings`, of `draw_settings`, has the guidance.
    `temperature` scales the noise of the steps, not the first one's x_T (an argument of the released `DiffLoss.sample`).
    Both halves share x_t: the released code computes one for the unconditional half that is never read.
    """
    _, length, _ = condition.shape
    embedded = network.condition_embed(condition.flatten(0, 1))
    steps = diffusion_schedule(num_inference_steps)
    # Filled on the device: a tensor of Python's numbers is a copy from the host, which a captured graph can't do.
    timesteps = torch.cat([torch.full((1,), step.timestep, device=condition.device) for step in steps])
    times = network.time_embed(timesteps).split(1)
    start = noise.start(length, network.channels, condition.device)
    x = start.flatten(0, 1)
    for step, time in zip(steps, times, strict=True):
        added = noise.step(length, network.channels, x.device).view(x.shape) * temperature if step.adds_noise else x
        x = denoise(network, x, step, time, embedded, settings, added)
    return x.view(start.shape) * LATENT_SCALE


def denoise(
    network: ResidualDiffusion,
    x: Tensor,
    step: DiffusionStep,
    time: Tensor,
    condition: Tensor,
    settings: Tensor,
    noise: Tensor,
) -> Tensor:
    """Do one step x_t -> x_{t-1}, [N, C] fp32.

    `time` [1, width] is the step's number and `condition` [N or 2N, width], conditional rows first, both embedded.
    """
    eps, variance = network(x, time, condition)
    return ops.diffusion_step(
        x,
        eps,
        variance,
        noise,
        settings,
        x0_from_x=step.x0_from_x,
        x0_from_noise=step.x0_from_noise,
        mean_from_x0=step.mean_from_x0,
        mean_from_x=step.mean_from_x,
        log_variance_min=step.log_variance_min,
        log_variance_max=step.log_variance_max,
        adds_noise=step.adds_noise,
    )

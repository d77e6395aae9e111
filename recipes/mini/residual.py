"""The residual diffusion's training loss (paper section 3.3; improved DDPM, arXiv:2102.09672)."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from hart_infer.generation.residual import LATENT_SCALE, TRAIN_STEPS, diffusion_schedule
from hart_infer.models.parts.diffusion import ResidualDiffusion


@lru_cache(maxsize=1)
def _constants() -> dict[str, Tensor]:
    """Per step t of all TRAIN_STEPS, ascending, what the loss needs of the sampler's constants, [T] fp32 each."""
    steps = sorted(diffusion_schedule(TRAIN_STEPS), key=lambda step: step.timestep)
    names = ("x0_from_x", "x0_from_noise", "mean_from_x0", "mean_from_x", "log_variance_min", "log_variance_max")
    return {name: torch.tensor([getattr(step, name) for step in steps]) for name in names}


def diffusion_loss(diffusion: ResidualDiffusion, residual: Tensor, condition: Tensor, generator: torch.Generator) -> Tensor:
    """Loss of residuals [N, C], in units of the latent, given their conditions [N, D], at a random step each.

    The squared error of the predicted noise, and, for the variance alone, the divergence of the predicted step from the true
    one in bits, as improved DDPM weighs them (1 / TRAIN_STEPS of the sum over all steps is its mean here).
    """
    clean = residual / LATENT_SCALE
    time = torch.randint(TRAIN_STEPS, (len(clean),), generator=generator)
    c = {name: values[time, None] for name, values in _constants().items()}
    noise = torch.randn(clean.shape, generator=generator)
    noised = (clean + c["x0_from_noise"] * noise) / c["x0_from_x"]
    predicted, share = diffusion(noised, diffusion.time_embed(time), diffusion.condition_embed(condition))
    guess = (c["x0_from_x"] * noised - c["x0_from_noise"] * predicted.detach()).clamp(-1, 1)
    error = c["mean_from_x0"] * (clean - guess)  # of the posterior mean
    share = (share + 1) / 2
    log_variance = share * c["log_variance_max"] + (1 - share) * c["log_variance_min"]
    gap = c["log_variance_min"] - log_variance
    divergence = 0.5 * (gap.exp() - 1 - gap + error.square() * torch.exp(-log_variance)) / math.log(2)
    return (predicted - noise).square().mean() + divergence.mean()

"""Residual diffusion: what the discrete tokens of the last scale miss, sampled token by token (paper section 3.3).

A small MLP predicts noise and variance (released `SimpleMLPAdaLN`); eight steps of the improved-DDPM sampler on a cosine
schedule turn noise into the residual (released `DiffLoss.sample`, `SpacedDiffusion.p_sample_loop`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import ops
from ...generation.sampling import Draws
from .layers import Linear, SinusoidEmbedding

TRAIN_STEPS = 1000
LATENT_SCALE = 0.6  # the sample is in units of 1 / 0.6 of the latent
NORM_EPS = 1e-6


@dataclass(frozen=True)
class DiffusionStep:
    """Constants of one denoising step, fp64 on the way, plain floats here."""

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
def diffusion_schedule(steps: int) -> tuple[DiffusionStep, ...]:
    """The kept steps, largest t first: round(i * 999 / (steps - 1)) of 1000, betas recomputed from the kept alpha-bars."""
    kept = [round(i * (TRAIN_STEPS - 1) / (steps - 1)) for i in range(steps)]
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
    first_variance = constants[1][4]  # the first is zero: its logarithm is clipped to the second's
    return tuple(
        DiffusionStep(
            timestep=timestep,
            x0_from_x=math.sqrt(1 / current),
            x0_from_noise=math.sqrt(1 / current - 1),
            mean_from_x0=beta * math.sqrt(previous) / (1 - current),
            mean_from_x=(1 - previous) * math.sqrt(1 - beta) / (1 - current),
            log_variance_min=math.log(variance if adds_noise else first_variance),
            log_variance_max=math.log(beta),
            adds_noise=adds_noise,
        )
        for timestep, current, previous, beta, variance, adds_noise in reversed(constants)
    )


Update = tuple[Tensor, Tensor]  # what a block adds to its input, and the gate that multiplies it, [N, width] each


def _normed(norm: nn.LayerNorm, x: Tensor, update: Update | None, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Add the last block's update, if there is one; the sum, and its modulated norm."""
    if update is None:
        return x, ops.layer_norm_modulate(x, norm.weight, norm.bias, scale, shift, norm.eps)
    return ops.gated_layer_norm_modulate(x, *update, norm.weight, norm.bias, scale, shift, norm.eps)


class ResidualBlock(nn.Module):
    """x + gate * MLP(modulated LayerNorm(x)); the sum is left to the next norm, which reads it anyway."""

    def __init__(self, width: int) -> None:
        """`width` in, out and inside."""
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.fc1 = Linear(width, width)
        self.fc2 = Linear(width, width)
        self.modulation = Linear(width, 3 * width)

    def forward(self, x: Tensor, update: Update | None, activated: Tensor) -> tuple[Tensor, Update]:
        """x [N, width] and the last block's update -> their sum and this block's; `activated` is SiLU of the condition."""
        shift, scale, gate = self.modulation(activated).chunk(3, dim=-1)
        x, hidden = _normed(self.norm, x, update, scale, shift)
        return x, (self.fc2(F.silu(self.fc1(hidden))), gate)


class ResidualDiffusion(nn.Module):
    """The network and its sampler."""

    def __init__(self, *, channels: int, condition_dim: int, width: int, depth: int) -> None:
        """`channels` C of the latent, `condition_dim` D of the condition, `depth` blocks of `width`."""
        super().__init__()
        self.channels = channels
        self.time_embed = SinusoidEmbedding(width)
        self.condition_embed = Linear(condition_dim, width)
        self.input_proj = Linear(channels, width)
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(depth))
        self.out_norm = nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=False)
        self.out_modulation = Linear(width, 2 * width)
        self.out_proj = Linear(width, 2 * channels)

    def forward(self, x: Tensor, timestep: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Predict noise and variance value, each [N, C].

        `x` [N, C]; `timestep` [N] or [1], original step numbers; `condition` [N, width], already embedded. `x` may hold
        fewer rows than `condition` by a whole factor: it is then shared by the guidance halves.
        """
        activated = F.silu(self.time_embed(timestep) + condition)
        hidden = self.input_proj(x.to(condition.dtype))
        hidden = hidden.repeat(len(condition) // len(hidden), 1)
        update: Update | None = None
        for block in self.blocks:
            hidden, update = block(hidden, update, activated)
        shift, scale = self.out_modulation(activated).chunk(2, dim=-1)
        _, normed = _normed(self.out_norm, hidden, update, scale, shift)
        noise, variance = self.out_proj(normed).float().chunk(2, dim=-1)
        return noise, variance

    def sample(self, condition: Tensor, *, images: int, guidance: float, steps: int, draws: Draws) -> Tensor:
        """Sample the residual [B, L, C] fp32, in units of the latent.

        `condition` z [R, L, D]: R = B rows, or 2B with the unconditional half behind. Both halves share one x_t: the
        released code keeps a second one for the unconditional half, which nothing reads.
        """
        length = condition.shape[1]
        embedded = self.condition_embed(condition.flatten(0, 1))
        x = draws.start_noise(images, length, self.channels, condition.device).flatten(0, 1)
        for step in diffusion_schedule(steps):
            noise = draws.step_noise(images, length, self.channels, x.device) if step.adds_noise else x
            x = self.step(x, step, embedded, guidance, noise.reshape(x.shape))
        return x.view(images, length, self.channels) * LATENT_SCALE

    def step(self, x: Tensor, step: DiffusionStep, condition: Tensor, guidance: float, noise: Tensor) -> Tensor:
        """One denoising step x_t -> x_{t-1}, [N, C] fp32; `condition` [N or 2N, width] embedded, conditional rows first."""
        timestep = torch.full((1,), step.timestep, device=x.device)
        eps, variance = self(x, timestep, condition)
        return ops.diffusion_step(
            x,
            eps,
            variance,
            noise,
            guidance=guidance,
            x0_from_x=step.x0_from_x,
            x0_from_noise=step.x0_from_noise,
            mean_from_x0=step.mean_from_x0,
            mean_from_x=step.mean_from_x,
            log_variance_min=step.log_variance_min,
            log_variance_max=step.log_variance_max,
            adds_noise=step.adds_noise,
        )

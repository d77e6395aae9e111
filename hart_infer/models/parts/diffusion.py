"""The residual diffusion's network (paper section 3.3; released `SimpleMLPAdaLN`).

A small MLP predicts, for each token, the noise in what the discrete codes of the last scale miss. `generation/residual.py`
has the loop around it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import ops
from .layers import Linear, SinusoidEmbedding

NORM_EPS = 1e-6


Update = tuple[Tensor, Tensor]  # what a block adds to its input, and the gate that multiplies it, [N, width] each


class ResidualBlock(nn.Module):
    """x + gate * MLP(modulated LayerNorm(x)); the sum is left to the next norm, which reads it anyway."""

    def __init__(self, width: int) -> None:
        """`width` in, out and inside."""
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.fc1 = Linear(width, width)
        self.fc2 = Linear(width, width)
        self.modulation = Linear(width, 3 * width)

    def forward(self, x: Tensor, update: Update, activated: Tensor) -> tuple[Tensor, Update]:
        """Add the last block's update to x [N, width]; return the sum and this block's update.

        `activated` [N, width] is SiLU of the condition.
        """
        shift, scale, gate = self.modulation(activated).chunk(3, dim=-1)
        x, hidden = ops.gated_layer_norm_modulate(x, *update, self.norm.weight, self.norm.bias, scale, shift, NORM_EPS)
        return x, (self.fc2(F.silu(self.fc1(hidden))), gate)


class ResidualDiffusion(nn.Module):
    """Predicts noise for each token, given a condition and a timestep."""

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

    def forward(self, x: Tensor, time: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Predict noise and variance value, each [N, C].

        `x` [N, C]; `time` [N, width] or [1, width], the original step numbers by `time_embed`; `condition` [N, width], by
        `condition_embed`. `x` may hold fewer rows than `condition` by a whole factor: it is then shared by the guidance halves.
        """
        activated = F.silu(time + condition)
        hidden = self.input_proj(x.to(condition.dtype))
        hidden = hidden.repeat(len(condition) // len(hidden), 1)
        nothing = torch.zeros_like(hidden)
        update: Update = (nothing, nothing)
        for block in self.blocks:
            hidden, update = block(hidden, update, activated)
        shift, scale = self.out_modulation(activated).chunk(2, dim=-1)
        _, normed = ops.gated_layer_norm_modulate(hidden, *update, None, None, scale, shift, NORM_EPS)
        noise, variance = self.out_proj(normed).float().chunk(2, dim=-1)
        return noise, variance

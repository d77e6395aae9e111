"""The residual diffusion's noise: from generators on the CPU, as the released code draws it, or by Philox where a GPU draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .. import ops


class Noise(Protocol):
    """Standard normal noise of one generation's residual diffusion."""

    def start(self, tokens: int, channels: int, device: torch.device) -> Tensor:
        """Return x_T of all images on `device`, [B, L, C] fp32."""
        ...

    def step(self, tokens: int, channels: int, device: torch.device) -> Tensor:
        """Return the noise of the next step, [B, L, C] fp32."""
        ...


class ResidualNoise:
    """Standard normal noise of the residual diffusion, [B, L, C] fp32: one generator per seed, for `images_per_seed` images."""

    def __init__(self, seeds: Sequence[int], *, images_per_seed: int = 1) -> None:
        self.images_per_seed = images_per_seed
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def start(self, tokens: int, channels: int, device: torch.device) -> Tensor:
        """x_T of all images, moved to `device`."""
        return self._draw(self.images_per_seed, tokens, channels, device)

    def step(self, tokens: int, channels: int, device: torch.device) -> Tensor:
        """Noise of one step: draw twice the rows and keep the first half, as the released code does."""
        return self._draw(2 * self.images_per_seed, tokens, channels, device)

    def _draw(self, rows: int, tokens: int, channels: int, device: torch.device) -> Tensor:
        drawn = [torch.randn(rows, tokens, channels, generator=g) for g in self._generators]
        return torch.cat([noise[: self.images_per_seed] for noise in drawn]).to(device)


class PhiloxNoise:
    """Noise as a function of seed, step, token and channel (`ops.normal_noise`): the same on every GPU."""

    def __init__(self, seeds: Tensor) -> None:
        """`seeds` [B] int64 are read when noise is drawn."""
        self._seeds, self._step = seeds, 0

    def start(self, tokens: int, channels: int, device: torch.device) -> Tensor:
        """As `Noise.start`."""
        self._step = 0
        return self._draw(tokens, channels)

    def step(self, tokens: int, channels: int, device: torch.device) -> Tensor:
        """As `Noise.step`."""
        self._step += 1
        return self._draw(tokens, channels)

    def _draw(self, tokens: int, channels: int) -> Tensor:
        return ops.normal_noise(self._seeds, step=self._step, tokens=tokens, channels=channels)

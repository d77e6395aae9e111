"""Draw a scale's codes from its logits, and return the embeddings that are added to f_hat.

GeneratorSampler draws from generators on the CPU and reproduces the released code. PhiloxSampler, on CUDA, draws numbers that
are a function of seed, scale, token and code. `make_sampler` picks one per generation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .. import ops
from ..errors import WeightsError
from ..ops.logits import filter_logits, guide
from .schedule import Stage

FP64_DRAWS = 2**20  # per chunk, to bound their memory
NOT_FINITE = (
    "The model's logits are not finite: its weights are damaged, or too large for float16; load them with "
    "dtype=torch.bfloat16 or torch.float32."
)


class ResidualNoise:
    """Standard normal noise of the residual diffusion, [B, L, C] fp32: one generator per seed, for `images_per_seed` images."""

    def __init__(self, seeds: Sequence[int], device: torch.device, *, images_per_seed: int = 1) -> None:
        self.device = device
        self.images_per_seed = images_per_seed
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def start(self, tokens: int, channels: int, device: torch.device) -> Tensor:
        """x_T of all images, moved to `device`."""
        return self._draw(self.images_per_seed, tokens, channels, device)

    def step(self, tokens: int, channels: int, device: torch.device) -> Tensor:
        """Noise of one step: draw twice the rows and keep the first half, as the released code does."""
        return self._draw(2 * self.images_per_seed, tokens, channels, device)

    def _draw(self, rows: int, tokens: int, channels: int, device: torch.device) -> Tensor:
        drawn = [torch.randn(rows, tokens, channels, generator=g, device=self.device) for g in self._generators]
        return torch.cat([noise[: self.images_per_seed] for noise in drawn]).to(device)


class Sampler(Protocol):
    """All randomness of one generation of `batch_size` images; an image's draws don't depend on the images beside it."""

    batch_size: int
    noise: ResidualNoise

    def draw(self, logits: Tensor, codebook: Tensor, stage: Stage) -> tuple[Tensor, Tensor]:
        """Return codes [B, L] int64, and embeddings [B, L, C] fp32 to add to f_hat (released `autoregressive_infer_cfg`).

        `logits` fp32, which may be overwritten: [2B, L, V] to be guided, or [B, L, V]; `codebook` [V, C] fp32. The code is
        drawn first. The embeddings are the Gumbel-softmax mixtures of the codebook with `stage.more_smooth`, else the drawn
        codes' own. For logits that are not finite WeightsError is raised here or by `check`.
        """
        ...

    def check(self, indices: Tensor) -> None:
        """Raise WeightsError if the last scale's codes [B, L] say that logits were not finite."""
        ...


def make_sampler(seeds: Sequence[int], device: torch.device) -> Sampler:
    """Return a PhiloxSampler where CUDA draws, else a GeneratorSampler; one image per seed."""
    return PhiloxSampler(seeds, device) if device.type == "cuda" else GeneratorSampler(seeds)


class GeneratorSampler:
    """Draws from generators on the CPU, whatever device computes.

    Each seed seeds two generators, as in a run of the released code: one for the codes and the Gumbel noise, one for the
    residual diffusion. A seed covers `images_per_seed` consecutive images, 1 unless a recorded batch is replayed.
    """

    def __init__(self, seeds: Sequence[int], *, images_per_seed: int = 1) -> None:
        self.batch_size = len(seeds) * images_per_seed
        self.noise = ResidualNoise(seeds, torch.device("cpu"), images_per_seed=images_per_seed)
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def draw(self, logits: Tensor, codebook: Tensor, stage: Stage) -> tuple[Tensor, Tensor]:
        """As `Sampler.draw`: torch.multinomial, then, only for mixtures, Gumbel noise."""
        if len(logits) > self.batch_size:
            logits = guide(logits, stage.guidance)
        filtered = filter_logits(logits, top_k=stage.top_k, top_p=stage.top_p)
        indices = self.multinomial(filtered.softmax(dim=-1))
        if not stage.more_smooth:
            return indices, codebook[indices]
        noisy = self.gumbel(filtered).add_(filtered.mul_(stage.logit_gain)).div_(stage.temperature)
        # One product per image, as released: a flattened one rounds differently, and 1 / tau amplifies that scale by scale.
        return indices, noisy.softmax(dim=-1) @ codebook[None]

    def check(self, indices: Tensor) -> None:
        """Do nothing: `draw` raises."""

    def multinomial(self, probabilities: Tensor) -> Tensor:
        """Draw one index per row of `probabilities` [B, L, V] -> [B, L], as torch.multinomial: argmax(p / exponential draws).

        Raises WeightsError where they are not finite.
        """
        if not probabilities.sum().isfinite():
            raise WeightsError(NOT_FINITE)
        batch_size, length, vocab_size = probabilities.shape
        rows = probabilities.cpu().reshape(len(self._generators), -1, vocab_size)
        drawn = [
            (group / _exponential(group.shape, generator)).argmax(dim=-1)
            for group, generator in zip(rows, self._generators, strict=True)
        ]
        return torch.cat(drawn).view(batch_size, length).to(probabilities.device)

    def gumbel(self, like: Tensor) -> Tensor:
        """Return standard Gumbel noise of the shape of `like` [B, L, V]: -log of exponential draws, fp32."""
        shape = (len(like) // len(self._generators), *like.shape[1:])
        noise = torch.cat([_exponential(shape, generator) for generator in self._generators])
        return noise.log_().neg_().to(like.device)


class PhiloxSampler:
    """Draws on `device` as a function of seed, scale, token and code (`ops.guided_sample`): the same numbers on every GPU.

    The residual's noise comes from torch's generators on that device.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.batch_size = len(seeds)
        self.noise = ResidualNoise(seeds, device)
        signed = [seed - 2**64 if seed >= 2**63 else seed for seed in seeds]
        self._seeds = torch.tensor(signed, dtype=torch.int64, device=device)  # uint64 seeds as int64

    def draw(self, logits: Tensor, codebook: Tensor, stage: Stage) -> tuple[Tensor, Tensor]:
        """As `Sampler.draw`, without waiting for the device."""
        return ops.guided_sample(
            logits,
            codebook,
            self._seeds,
            torch.full((1,), stage.index, device=logits.device),
            guidance=stage.guidance,
            top_k=stage.top_k,
            top_p=stage.top_p,
            logit_gain=stage.logit_gain,
            temperature=stage.temperature,
            more_smooth=stage.more_smooth,
        )

    def check(self, indices: Tensor) -> None:
        """Raise WeightsError if codes are -1, as they are from the first scale on whose logits were not finite.

        Called once per generation, so that the host waits for the device once.
        """
        if bool((indices < 0).any()):
            raise WeightsError(NOT_FINITE)


def _exponential(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Return standard exponential draws, fp32 on the CPU: -log(1 - u) of fp64 u.

    So draws torch 2.13, with which the golden data were recorded; `exponential_` differs between versions (2.6, for one).
    """
    drawn = torch.empty(shape)
    for part in drawn.view(-1).split(FP64_DRAWS):
        part.copy_(torch.rand(part.shape, dtype=torch.float64, generator=generator).neg_().log1p_().neg_())
    return drawn

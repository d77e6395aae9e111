"""Draw a scale's codes from its logits, and return the embeddings that are added to f_hat; or draw one token of a sequence.

GeneratorSampler draws from generators on the CPU and reproduces the released code. PhiloxSampler, on CUDA, draws numbers that
are a function of seed, scale, token and code. `make_sampler` picks one per generation. The token samplers do the same for
VILA-U's codes and answers, one token a row at a time.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .. import ops
from ..errors import WeightsError
from ..ops.logits import blend, filter_logits, guide, nucleus
from ..ops.settings import draw_settings
from .noise import Noise, PhiloxNoise, ResidualNoise
from .schedule import Schedule, Stage

NOT_FINITE = (
    "The model's logits are not finite: its weights are damaged, or too large for float16; load them with "
    "dtype=torch.bfloat16 or torch.float32."
)


class Sampler(Protocol):
    """All randomness of one generation of `batch_size` images; an image's draws don't depend on the images beside it."""

    batch_size: int

    @property
    def noise(self) -> Noise:
        """The residual diffusion's."""
        ...

    def settings(self, stage: Stage, device: torch.device) -> Tensor:
        """Return the numbers of `ops.draw_settings` for a stage, [6] fp32 on `device`."""
        ...

    def draw(self, logits: Tensor, codebook: Tensor, stage: Stage) -> tuple[Tensor, Tensor]:
        """Return codes [B, L] int64, and embeddings [B, L, C] fp32 to add to f_hat (released `autoregressive_infer_cfg`).

        `logits` fp32, which may be overwritten: [2B, L, V] to be guided, or [B, L, V]; `codebook` [V, C] fp32. The code is
        drawn first. The embeddings are the Gumbel-softmax mixtures of the codebook with `stage.more_smooth`, else the drawn
        codes' own. For logits that are not finite WeightsError is raised here, or `failed` is True.
        """
        ...

    def failed(self, indices: Tensor) -> Tensor | None:
        """Return whether logits were not finite, by the last scale's codes [B, L]: a bool on the device; None if `draw` raises.

        Nobody has to wait for it before the pictures are there.
        """
        ...


def check_finite(flags: Iterable[Tensor | None]) -> None:
    """Raise WeightsError if one of the flags of `Sampler.failed` is True; waits for the device."""
    if any(flag is not None and bool(flag) for flag in flags):
        raise WeightsError(NOT_FINITE)


def make_sampler(seeds: Sequence[int], device: torch.device, schedule: Schedule) -> Sampler:
    """Return a PhiloxSampler where CUDA draws, else a GeneratorSampler; one image per seed."""
    return PhiloxSampler(seeds, device, schedule) if device.type == "cuda" else GeneratorSampler(seeds)


def stage_settings(stage: Stage) -> Tensor:
    """Return the numbers of `ops.draw_settings` for a stage, [6] fp32 on the CPU."""
    return draw_settings(
        guidance=stage.guidance,
        logit_gain=stage.logit_gain,
        temperature=stage.temperature,
        top_k=stage.top_k,
        top_p=stage.top_p,
    )


class GeneratorSampler:
    """Draws from generators on the CPU, whatever device computes.

    Each seed seeds two generators, as in a run of the released code: one for the codes and the Gumbel noise, one for the
    residual diffusion. A seed covers `images_per_seed` consecutive images, 1 unless a recorded batch is replayed.
    """

    def __init__(self, seeds: Sequence[int], *, images_per_seed: int = 1) -> None:
        self.batch_size = len(seeds) * images_per_seed
        self.noise = ResidualNoise(seeds, images_per_seed=images_per_seed)
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def settings(self, stage: Stage, device: torch.device) -> Tensor:
        """As `Sampler.settings`."""
        return stage_settings(stage).to(device)

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

    def failed(self, indices: Tensor) -> Tensor | None:
        """As `Sampler.failed`: `draw` raises."""
        return None

    def multinomial(self, probabilities: Tensor) -> Tensor:
        """Draw one index per row of `probabilities` [B, L, V] -> [B, L], as torch.multinomial: argmax(p / exponential draws).

        Raises WeightsError where they are not finite.
        """
        return _multinomial(probabilities, self._generators)

    def gumbel(self, like: Tensor) -> Tensor:
        """Return standard Gumbel noise of the shape of `like` [B, L, V]: -log of exponential draws, fp32."""
        shape = (len(like) // len(self._generators), *like.shape[1:])
        noise = torch.cat([_exponential(shape, generator) for generator in self._generators])
        return noise.log_().neg_().to(like.device)


class PhiloxSampler:
    """Draws on `device` as a function of seed, scale, token and code (`ops.guided_sample`): the same numbers on every GPU.

    All that it reads on the way are two tensors on the device, which `become` overwrites.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device, schedule: Schedule) -> None:
        self.batch_size = len(seeds)
        self._seeds = _signed(seeds, device)
        self._settings = torch.stack([stage_settings(stage) for stage in schedule]).to(device)  # [S, 6]
        self.noise = PhiloxNoise(self._seeds)

    def become(self, other: PhiloxSampler) -> None:
        """Take the seeds and settings of another sampler of as many images and stages, into the same memory."""
        self._seeds.copy_(other._seeds)
        self._settings.copy_(other._settings)

    def settings(self, stage: Stage, device: torch.device) -> Tensor:
        """As `Sampler.settings`."""
        return self._settings[stage.index]

    def draw(self, logits: Tensor, codebook: Tensor, stage: Stage) -> tuple[Tensor, Tensor]:
        """As `Sampler.draw`, without waiting for the device."""
        return ops.guided_sample(
            logits,
            codebook,
            self._seeds,
            torch.full((1,), stage.index, device=logits.device),
            self._settings[stage.index],
            top_k=0 < stage.top_k < len(codebook),
            top_p=stage.top_p > 0,
            more_smooth=stage.more_smooth,
        )

    def failed(self, indices: Tensor) -> Tensor | None:
        """As `Sampler.failed`: codes are -1 from the first scale on whose logits were not finite."""
        return (indices < 0).any()


@dataclass(frozen=True)
class TokenRule(ABC):
    """Which tokens may be drawn, and how likely each is; 0 disables top_k or top_p."""

    top_k: int
    top_p: float
    guidance_scale: float = 1.0  # u + guidance_scale (c - u), where logits have two halves

    @abstractmethod
    def probabilities(self, logits: Tensor) -> Tensor:
        """Filter guided logits [B, V] fp32, in place -> probabilities [B, V]."""
        ...


@dataclass(frozen=True)
class CodeRule(TokenRule):
    """VILA-U's rule for codes: top-p descending and renormalised. The defaults are constants of the released code."""

    top_k: int = 900
    top_p: float = 0.96
    guidance_scale: float = 3.0

    def probabilities(self, logits: Tensor) -> Tensor:
        """As `TokenRule.probabilities`."""
        probabilities = filter_logits(logits, top_k=self.top_k, top_p=0).softmax(dim=-1)
        return nucleus(probabilities, self.top_p) if self.top_p > 0 else probabilities


@dataclass(frozen=True)
class TextRule(TokenRule):
    """transformers' rule for text: top-p ascending, of what top-k left."""

    def probabilities(self, logits: Tensor) -> Tensor:
        """As `TokenRule.probabilities`."""
        return filter_logits(logits, top_k=self.top_k, top_p=self.top_p).softmax(dim=-1)


class TokenSampler(Protocol):
    """All randomness of `batch_size` sequences; a sequence's draws don't depend on the sequences beside it."""

    batch_size: int

    def draw(self, logits: Tensor, rule: TokenRule, step: int) -> Tensor:
        """Draw tokens [B] int64 from logits [2B, V] fp32, to be guided, or [B, V]; `logits` may be overwritten.

        `step` counts the draws of a sequence. For logits that are not finite WeightsError is raised here or by `check`.
        """
        ...

    def end_position(self, vocab_size: int) -> None:
        """Take note that a position's codes are drawn, where the released code draws text ids of V = `vocab_size` as well."""
        ...

    def check(self) -> None:
        """Raise WeightsError if logits were not finite."""
        ...


def make_token_sampler(seeds: Sequence[int], device: torch.device) -> TokenSampler:
    """Return a PhiloxTokenSampler where CUDA draws, else a GeneratorTokenSampler; one sequence per seed."""
    return PhiloxTokenSampler(seeds, device) if device.type == "cuda" else GeneratorTokenSampler(seeds)


class GeneratorTokenSampler:
    """Draws from generators on the CPU as the released VILA-U does, whatever device computes.

    A seed covers `images_per_seed` consecutive sequences, 1 unless a recorded batch is replayed.
    """

    def __init__(self, seeds: Sequence[int], *, images_per_seed: int = 1) -> None:
        self.batch_size = len(seeds) * images_per_seed
        self._images_per_seed = images_per_seed
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def draw(self, logits: Tensor, rule: TokenRule, step: int) -> Tensor:
        """As `TokenSampler.draw`."""
        guided = blend(logits, rule.guidance_scale) if len(logits) > self.batch_size else logits
        return _multinomial(rule.probabilities(guided)[:, None], self._generators)[:, 0]

    def end_position(self, vocab_size: int) -> None:
        """Draw and drop what a multinomial over both halves' text logits [2B, V] takes from the generators."""
        for generator in self._generators:
            for _ in range(2 * self._images_per_seed):
                torch.rand(vocab_size, dtype=torch.float64, generator=generator)

    def check(self) -> None:
        """Do nothing: `draw` raises."""


class PhiloxTokenSampler:
    """Draws on `device` as a function of seed, step and token (`ops.guided_sample`), without waiting for the device.

    Its top-p ascends for codes too, which within rounding keeps the same ones; renormalising doesn't change a draw.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.batch_size = len(seeds)
        self._seeds = _signed(seeds, device)
        self._failed = torch.zeros((), dtype=torch.bool, device=device)
        self._settings: dict[TokenRule, Tensor] = {}

    def draw(self, logits: Tensor, rule: TokenRule, step: int) -> Tensor:
        """As `TokenSampler.draw`; 0 where logits were not finite, which `check` reports."""
        if rule not in self._settings:
            numbers = draw_settings(guidance=rule.guidance_scale - 1, top_k=rule.top_k, top_p=rule.top_p)
            self._settings[rule] = numbers.to(logits.device)
        tokens, _ = ops.guided_sample(
            logits[:, None],
            logits.new_zeros(logits.shape[-1], 1),  # a codebook: the embeddings are not used
            self._seeds,
            torch.full((1,), step, device=logits.device),
            self._settings[rule],
            top_k=0 < rule.top_k < logits.shape[-1],
            top_p=rule.top_p > 0,
            more_smooth=False,
        )
        self._failed |= (tokens < 0).any()
        return tokens[:, 0].clamp_(min=0)

    def end_position(self, vocab_size: int) -> None:
        """Do nothing: no draw depends on another."""

    def check(self) -> None:
        """Raise WeightsError if logits were not finite; waits for the device."""
        if bool(self._failed):
            raise WeightsError(NOT_FINITE)


class GreedySampler:
    """Takes the most likely token, the first of equals."""

    batch_size = 1

    def draw(self, logits: Tensor, rule: TokenRule, step: int) -> Tensor:
        """As `TokenSampler.draw`, for logits [1, V]."""
        if not logits.sum().isfinite():
            raise WeightsError(NOT_FINITE)
        return logits.argmax(dim=-1)

    def end_position(self, vocab_size: int) -> None:
        """Do nothing: nothing is random."""

    def check(self) -> None:
        """Do nothing: `draw` raises."""


def _signed(seeds: Sequence[int], device: torch.device) -> Tensor:
    """Return uint64 seeds as int64, [B] on `device`."""
    return torch.tensor([seed - 2**64 if seed >= 2**63 else seed for seed in seeds], dtype=torch.int64, device=device)


def _multinomial(probabilities: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Draw one index per row of `probabilities` [B, L, V] -> [B, L], as torch.multinomial: argmax(p / exponential draws).

    Each generator draws for B / len(generators) consecutive rows. Raises WeightsError where they are not finite.
    """
    if not probabilities.sum().isfinite():
        raise WeightsError(NOT_FINITE)
    batch_size, length, vocab_size = probabilities.shape
    rows = probabilities.cpu().reshape(len(generators), -1, vocab_size)
    drawn = [
        (group / _exponential(group.shape, generator)).argmax(dim=-1) for group, generator in zip(rows, generators, strict=True)
    ]
    return torch.cat(drawn).view(batch_size, length).to(probabilities.device)


def _exponential(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Return standard exponential draws of a generator on the CPU, fp32."""
    state = generator.get_state()
    drawn = ops.exponential(state, math.prod(shape))
    generator.set_state(state)
    return drawn.view(shape)

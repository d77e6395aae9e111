"""From guided logits to code indices and embeddings, and the random draws that decide them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..errors import InputError, WeightsError
from ..models.parts.layers import guide
from ..pipelines.arguments import check_float, check_int
from .schedule import Stage

FP64_DRAWS = 2**20  # at once, to bound their memory
MAX_GUIDANCE = 1000.0  # far more than makes a picture, far less than overflows the logits
NOT_FINITE = (
    "The model's logits are not finite: its weights are damaged, or too large for float16; load them with "
    "torch_dtype=torch.bfloat16 or torch.float32."
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a caller chooses about the sampling."""

    guidance_scale: float = 4.5  # at the last scale; 0 is none
    diffusion_steps: int = 8  # of the residual; 0 leaves it out (discrete tokens only; the released `final_stage=1`)
    top_k: int | None = None  # None is the released schedule; 0 keeps all codes
    top_p: float = 0.0  # 0 is off
    more_smooth: bool = True

    @classmethod
    def checked(
        cls, *, guidance_scale: Any, num_inference_steps: Any, top_k: Any, top_p: Any, more_smooth: Any, vocabulary: int
    ) -> Settings:
        """Check a caller's values; raises InputError."""
        if num_inference_steps == 1:
            raise InputError("num_inference_steps must be 0 (no residual) or from 2 to 1000, not 1: one step has no schedule.")
        return cls(
            guidance_scale=check_float(guidance_scale, "guidance_scale", 0, MAX_GUIDANCE),
            diffusion_steps=check_int(num_inference_steps, "num_inference_steps", 0, 1000),
            top_k=None if top_k is None else check_int(top_k, "top_k", 0, vocabulary),
            top_p=check_float(top_p, "top_p", 0, 1),
            more_smooth=bool(more_smooth),
        )


class Draws:
    """All randomness of one generation, image by image.

    Each seed feeds two generators, as a run of the released code seeded once does: one for the code indices and the Gumbel
    noise, one for the residual diffusion. A seed covers `images_per_seed` consecutive images, 1 unless a recorded batch
    is replayed, so an image's draws do not depend on the batch it is in. Draws happen on `device` (a CPU generator gives
    the same numbers whatever device computes) and are moved to where they are used.

    On a CUDA device only the residual's noise comes from generators. The noise that decides codes and mixtures is a function of
    the seed, the scale, the token and the code (`ops.guided_sample`): no GPU and no version of PyTorch has other numbers.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str, *, images_per_seed: int = 1) -> None:
        """Seed both generators of every image (or group of images)."""
        self.device = torch.device(device)
        self.images = len(seeds) * images_per_seed
        if self.device.type == "cuda" and images_per_seed > 1:
            raise InputError("A recorded batch is replayed with draws on the CPU; give device='cpu'.")
        signed = [seed - 2**64 if seed >= 2**63 else seed for seed in seeds]
        self.seeds = torch.tensor(signed, dtype=torch.int64, device=self.device)  # the bits of the seeds
        self._codes = [torch.Generator(self.device).manual_seed(seed) for seed in seeds]
        self._diffusion = [torch.Generator(self.device).manual_seed(seed) for seed in seeds]

    def multinomial(self, probabilities: Tensor) -> Tensor:
        """One index per row of `probabilities` [B, L, V] -> [B, L]: torch.multinomial's race of exponential draws.

        Raises WeightsError where they are not finite.
        """
        if not probabilities.sum().isfinite():
            raise WeightsError(NOT_FINITE)
        batch, length, vocabulary = probabilities.shape
        rows = probabilities.to(self.device).reshape(len(self._codes), -1, vocabulary)
        drawn = [
            (group / _exponential(group.shape, generator)).argmax(dim=-1)
            for group, generator in zip(rows, self._codes, strict=True)
        ]
        return torch.cat(drawn).view(batch, length).to(probabilities.device)

    def gumbel(self, like: Tensor) -> Tensor:
        """Standard Gumbel noise of the shape of `like` [B, L, V]: -log of exponential draws, fp32."""
        shape = (like.shape[0] // len(self._codes), *like.shape[1:])
        noise = torch.cat([_exponential(shape, generator) for generator in self._codes])
        return noise.log_().neg_().to(like.device)

    def start_noise(self, images: int, tokens: int, channels: int, device: torch.device) -> Tensor:
        """The residual diffusion's x_T: [images, tokens, channels] standard normal, fp32."""
        return self._normal(images, (tokens, channels), device, extra_rows=False)

    def step_noise(self, images: int, tokens: int, channels: int, device: torch.device) -> Tensor:
        """One diffusion step's noise [images, tokens, channels].

        The released code draws for both guidance halves and uses the conditional half, which comes first.
        """
        return self._normal(images, (tokens, channels), device, extra_rows=True)

    def _normal(self, images: int, shape: tuple[int, int], device: torch.device, *, extra_rows: bool) -> Tensor:
        count = images // len(self._diffusion)
        drawn = [
            torch.randn(count * (1 + extra_rows), *shape, generator=generator, device=self.device)[:count]
            for generator in self._diffusion
        ]
        return torch.cat(drawn).to(device)


def _exponential(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Standard exponential draws, fp32, on the generator's device.

    On the CPU they are made of uniform ones, like those of torch 2.13, with which the golden data was recorded: `exponential_`
    gives the same seed other numbers in other versions of torch (2.6, for one).
    """
    drawn = torch.empty(shape, device=generator.device)
    if generator.device.type != "cpu":
        return drawn.exponential_(generator=generator)
    for part in drawn.view(-1).split(FP64_DRAWS):
        part.copy_(torch.rand(part.shape, dtype=torch.float64, generator=generator).neg_().log1p_().neg_())
    return drawn


def filter_logits(logits: Tensor, *, top_k: int, top_p: float) -> Tensor:
    """Set to -inf what top-k, then top-p, removes from `logits` [B, L, V] fp32; in place, and returned.

    Top-k keeps ties at the threshold; 0 keeps all. Top-p removes the lowest codes whose cumulated probability is at most
    1 - p, never the best one; 0 turns it off.
    """
    vocabulary = logits.shape[-1]
    if 0 < top_k < vocabulary:
        threshold = logits.topk(top_k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
        logits.masked_fill_(logits < threshold, -torch.inf)
    if top_p > 0:
        ascending, order = logits.sort(dim=-1, descending=False)
        remove = ascending.softmax(dim=-1).cumsum_(dim=-1) <= 1 - top_p
        remove[..., -1] = False
        logits.masked_fill_(remove.scatter(-1, order, remove), -torch.inf)
    return logits


def sample_scale(logits: Tensor, codebook: Tensor, stage: Stage, draws: Draws, settings: Settings) -> tuple[Tensor, Tensor]:
    """Guide the `logits` [2B, L, V] fp32 of a scale, or take [B, L, V], which are overwritten, as they are; draw its codes.

    Returns the indices [B, L] and the embeddings to go on with [B, L, C]: the Gumbel-softmax mixture of the codebook
    with `more_smooth`, else the drawn codes' own (released `autoregressive_infer_cfg`). The index is drawn first.

    Raises WeightsError for logits that are not finite; where a CUDA device draws, `check_codes` does so later.
    """
    guidance = stage.guidance(settings.guidance_scale)
    if draws.device.type == "cuda":
        return ops.guided_sample(
            logits,
            codebook,
            draws.seeds.to(logits.device),
            torch.full((1,), stage.index, device=logits.device),
            guidance=guidance,
            top_k=stage.top_k,
            top_p=settings.top_p,
            gain=stage.logit_gain,
            temperature=stage.temperature,
            mixes=settings.more_smooth,
        )
    if len(logits) > draws.images:
        logits = guide(logits, guidance)
    filtered = filter_logits(logits, top_k=stage.top_k, top_p=settings.top_p)
    indices = draws.multinomial(filtered.softmax(dim=-1))
    if not settings.more_smooth:
        return indices, codebook[indices]
    noisy = draws.gumbel(filtered).add_(filtered.mul_(stage.logit_gain)).div_(stage.temperature)
    # One product per image, as released: a flattened one rounds differently, and 1 / tau amplifies that scale by scale.
    return indices, noisy.softmax(dim=-1) @ codebook[None]


def check_codes(indices: Tensor, draws: Draws) -> None:
    """Raise WeightsError if the last scale's `indices` [B, L] say that logits were not finite.

    Codes that a CUDA device draws are -1 then, at that scale and, as embeddings are NaN with them, at all later ones; asking
    once for each picture waits for the device once.
    """
    if draws.device.type == "cuda" and bool((indices < 0).any()):
        raise WeightsError(NOT_FINITE)

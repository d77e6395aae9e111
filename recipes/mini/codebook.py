"""The tokenizer's codebook in training: codes follow the vectors that they stand for by exponential averages."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hart_infer.models.parts.quantizer import Quantizer

RARE = 0.02  # uses per step, on average: a code with fewer begins anew
DECAY = 0.96


class Codebook:
    """Keeps a quantizer's codes at the running mean of the vectors that they stand for."""

    def __init__(self, quantizer: Quantizer) -> None:
        """All codes unused."""
        weight = quantizer.codebook.weight
        self.quantizer = quantizer
        self.count, self.total = torch.zeros(len(weight)), torch.zeros_like(weight)

    @torch.no_grad()
    def begin(self, latent: Tensor, generator: torch.Generator) -> None:
        """Take codes from the latents: of every scale, and of the differences between scales."""
        sides = self.quantizer.patch_nums
        fine = [
            latent - F.interpolate(F.interpolate(latent, (p, p), mode="area"), latent.shape[-2:], mode="bicubic")
            for p in sides[:-1]
        ]
        vectors = torch.cat([_vectors(F.interpolate(latent, (p, p), mode="area")) for p in sides] + [_vectors(x) for x in fine])
        self._replace(torch.arange(len(self.count)), vectors, generator)

    @torch.no_grad()
    def update(self, indices: list[Tensor], inputs: list[Tensor]) -> None:
        """Move the codes towards what they were used for."""
        flat, vectors = torch.cat([i.flatten() for i in indices]), torch.cat([_vectors(x) for x in inputs])
        count = torch.bincount(flat, minlength=len(self.count)).float()
        total = torch.zeros_like(self.total).index_add_(0, flat, vectors)
        self.count.lerp_(count, 1 - DECAY)
        self.total.lerp_(total, 1 - DECAY)
        used = self.count > 1e-4
        self.quantizer.codebook.weight[used] = self.total[used] / self.count[used, None]

    @torch.no_grad()
    def revive(self, vectors: Tensor, generator: torch.Generator) -> int:
        """Begin rarely used codes anew at vectors drawn from [B, C, h, w]."""
        rare = (self.count < RARE).nonzero()[:, 0]
        if len(rare):
            self._replace(rare, _vectors(vectors), generator)
        return len(rare)

    def _replace(self, codes: Tensor, vectors: Tensor, generator: torch.Generator) -> None:
        chosen = vectors[torch.randint(len(vectors), (len(codes),), generator=generator)]
        chosen = chosen + 0.01 * vectors.std() * torch.randn(chosen.shape, generator=generator)
        self.quantizer.codebook.weight[codes] = chosen
        self.count[codes], self.total[codes] = 1.0, chosen


def _vectors(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])

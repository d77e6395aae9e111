"""Multi-scale residual quantizer (paper section 3.1; released `VectorQuantizer2`, `HARTHybridQuantizer`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Conv2d, Embedding


def phi_index(index: int, num_scales: int, share_quant_resi: int) -> int:
    """Return the index of the residual convolution phi of scale `index`: the nearest of K ticks to index / (num_scales - 1).

    K is `share_quant_resi`, or `num_scales` for 0. The ticks run evenly from a to 1 - a, with a = 1/(3K) where K is 4, else
    1/(2K). Ties depend on rounding, so the expression is the released one.
    """
    count = share_quant_resi or num_scales
    margin = 1 / 3 / count if count == 4 else 1 / 2 / count
    ticks = np.linspace(margin, 1 - margin, count)
    return int(np.argmin(np.abs(ticks - index / (num_scales - 1))))


def nearest_codes(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Return the index [N] int64 of the row of `codebook` [K, C] nearest to each of `vectors` [N, C]; of equals the first."""
    distance = vectors.square().sum(dim=1, keepdim=True) + codebook.square().sum(dim=1)
    return torch.addmm(distance, vectors, codebook.T, alpha=-2).argmin(dim=1)


def area_resize(x: Tensor, side: int) -> Tensor:
    """Resize x [B, C, p, p] to [B, C, side, side]: output i averages, along each axis, the inputs that it covers a part of."""
    if x.device.type == "mps":  # which resizes by whole factors only, before torch 2.10 or so
        return F.interpolate(x.cpu(), size=(side, side), mode="area").to(x.device)
    return F.interpolate(x, size=(side, side), mode="area")


@dataclass(frozen=True)
class Tokens:
    """A tokenized image."""

    indices: list[Tensor]  # per scale [B, p * p] int64
    embeddings: list[Tensor]  # per scale [B, C, p, p], the codes' own
    residual: Tensor  # [B, C, P, P]: what the last scale's codes and the residual diffusion together stand for


class Quantizer(nn.Module):
    """Codebook [V, C] and the residual convolutions phi. Always computes in fp32."""

    def __init__(self, *, vocab_size: int, channels: int, patch_nums: Sequence[int], share_quant_resi: int) -> None:
        """As many convolutions as `share_quant_resi` says; 0 is one per scale."""
        super().__init__()
        self.share = share_quant_resi
        self.patch_nums = tuple(patch_nums)
        self.codebook = Embedding(vocab_size, channels)
        self.phi = nn.ModuleList(Conv2d(channels, channels, 3, padding=1) for _ in range(self.share or len(self.patch_nums)))

    def refine(self, latent: Tensor, phi: int) -> Tensor:
        """h / 2 + conv(h) / 2 for [B, C, P, P]."""
        return latent * 0.5 + self.phi[phi](latent) * 0.5

    def contribution(self, embedding: Tensor, phi: int | None) -> Tensor:
        """Return what a scale's `embedding` [B, C, p, p] adds to f_hat [B, C, P, P]: resized bicubically, refined by `phi`."""
        side = self.patch_nums[-1]
        if embedding.shape[-1] != side:
            embedding = F.interpolate(embedding, size=(side, side), mode="bicubic")
        return embedding if phi is None else self.refine(embedding, phi)

    @staticmethod
    def next_input(f_hat: Tensor, side: int) -> Tensor:
        """Resize f_hat [B, C, P, P] by area to the next scale's [B, C, side, side]."""
        return area_resize(f_hat, side)

    def nearest(self, latent: Tensor) -> Tensor:
        """Return the indices [B, p * p] int64 of the codes nearest to `latent` [B, C, p, p] in Euclidean distance."""
        vectors = latent.permute(0, 2, 3, 1).reshape(-1, latent.shape[1])
        return nearest_codes(vectors, self.codebook.weight).view(len(latent), -1)

    def embed(self, indices: Tensor) -> Tensor:
        """Indices [B, p * p] -> [B, C, p, p]."""
        side = int(indices.shape[1] ** 0.5)
        embedded: Tensor = self.codebook(indices)
        return embedded.transpose(1, 2).reshape(len(indices), -1, side, side)

    def encode(self, latent: Tensor) -> Tokens:
        """Tokenize `latent` [B, C, P, P] fp32 scale by scale.

        Each scale resizes the remainder by area, takes the nearest codes, and subtracts their refined embeddings. The last
        scale is neither refined nor subtracted: the remainder before it is the residual.
        """
        rest = latent
        indices, embeddings = [], []
        for index, side in enumerate(self.patch_nums):
            nearest = self.nearest(self.next_input(rest, side))
            indices.append(nearest)
            embeddings.append(self.embed(nearest))
            if index < len(self.patch_nums) - 1:
                rest = rest - self.contribution(embeddings[-1], self._phi(index))
        return Tokens(indices, embeddings, rest)

    def discrete(self, embeddings: Sequence[Tensor]) -> Tensor:
        """Return the sum of all scales' codes [B, C, P, P]; here, unlike in generation, the last scale is refined as well."""
        f_hat = torch.zeros_like(embeddings[-1])
        for index, embedding in enumerate(embeddings):
            f_hat = f_hat + self.contribution(embedding, self._phi(index))
        return f_hat

    def inputs(self, embeddings: Sequence[Tensor]) -> list[Tensor]:
        """Return teacher forcing's inputs [B, C, p, p] of scales 1, 2, ..., given the codes of the scales before."""
        f_hat = torch.zeros_like(embeddings[-1])
        inputs = []
        for index, side in enumerate(self.patch_nums[1:]):
            f_hat = f_hat + self.contribution(embeddings[index], self._phi(index))
            inputs.append(self.next_input(f_hat, side))
        return inputs

    def _phi(self, index: int) -> int:
        return phi_index(index, len(self.patch_nums), self.share)

"""Multi-scale residual quantizer (paper section 3.1; released `VectorQuantizer2`, `HARTHybridQuantizer`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...generation.schedule import phi_index
from ..config import AutoencoderConfig
from .layers import Conv2d


@dataclass(frozen=True)
class Tokens:
    """An image, tokenized."""

    indices: list[Tensor]  # per scale [B, p * p] int64
    embeddings: list[Tensor]  # per scale [B, C, p, p], the codes' own
    residual: Tensor  # [B, C, P, P]: what remained before the last scale's code, the continuous target of the hybrid


class Quantizer(nn.Module):
    """Codebook [V, C] and the residual convolutions phi. Always computes in fp32."""

    def __init__(self, config: AutoencoderConfig) -> None:
        """As many convolutions as `share_quant_resi` says; 0 is one per scale."""
        super().__init__()
        self.share = config.share_quant_resi
        self.patch_nums = config.v_patch_nums
        self.codebook = nn.Embedding(config.vocab_size, config.z_channels)
        self.phi = nn.ModuleList(
            Conv2d(config.z_channels, config.z_channels, 3, padding=1) for _ in range(self.share or len(self.patch_nums))
        )

    def refine(self, latent: Tensor, phi: int) -> Tensor:
        """h / 2 + conv(h) / 2 for [B, C, P, P]."""
        return latent * 0.5 + self.phi[phi](latent) * 0.5

    def enlarge(self, embedding: Tensor, phi: int) -> Tensor:
        """One scale's `embedding` [B, C, p, p] resized bicubically to [B, C, P, P] and refined: what it adds to f_hat."""
        side = self.patch_nums[-1]
        return self.refine(F.interpolate(embedding, size=(side, side), mode="bicubic"), phi)

    @staticmethod
    def next_input(f_hat: Tensor, side: int) -> Tensor:
        """f_hat [B, C, P, P] resized by area to the next scale's [B, C, side, side]."""
        if f_hat.device.type == "mps":  # which resizes by whole factors only, before torch 2.10 or so
            return F.interpolate(f_hat.cpu(), size=(side, side), mode="area").to(f_hat.device)
        return F.interpolate(f_hat, size=(side, side), mode="area")

    def nearest(self, latent: Tensor) -> Tensor:
        """Indices [B, p * p] of the codes nearest to `latent` [B, C, p, p] in Euclidean distance."""
        vectors = latent.permute(0, 2, 3, 1).reshape(-1, latent.shape[1])
        codes = self.codebook.weight
        distance = vectors.square().sum(dim=1, keepdim=True) + codes.square().sum(dim=1)
        distance = torch.addmm(distance, vectors, codes.T, alpha=-2)
        return distance.argmin(dim=1).view(len(latent), -1)

    def embed(self, indices: Tensor) -> Tensor:
        """Indices [B, p * p] -> [B, C, p, p]."""
        side = int(indices.shape[1] ** 0.5)
        embedded: Tensor = self.codebook(indices)
        return embedded.transpose(1, 2).reshape(len(indices), -1, side, side)

    def encode(self, latent: Tensor) -> Tokens:
        """Hybrid tokenization of `latent` [B, C, P, P] fp32: codes scale by scale, and what they leave.

        Each scale codes what is left, resized by area; its codes come back refined and are subtracted. The last scale is
        not refined, as in generation.
        """
        rest = latent
        indices, embeddings = [], []
        for index, side in enumerate(self.patch_nums):
            codes = self.nearest(self.next_input(rest, side))
            indices.append(codes)
            embeddings.append(self.embed(codes))
            if index < len(self.patch_nums) - 1:
                rest = rest - self.enlarge(embeddings[-1], self._phi(index))
        return Tokens(indices, embeddings, rest)

    def discrete(self, embeddings: Sequence[Tensor]) -> Tensor:
        """Sum of all scales' codes [B, C, P, P]; here, unlike in generation, the last scale is refined as well."""
        f_hat = torch.zeros_like(embeddings[-1])
        for index, embedding in enumerate(embeddings):
            f_hat = f_hat + self.enlarge(embedding, self._phi(index))
        return f_hat

    def inputs(self, embeddings: Sequence[Tensor]) -> list[Tensor]:
        """Teacher forcing: the inputs [B, C, p, p] of scales 1, 2, ... given the codes of the scales before."""
        f_hat = torch.zeros_like(embeddings[-1])
        inputs = []
        for index, side in enumerate(self.patch_nums[1:]):
            f_hat = f_hat + self.enlarge(embeddings[index], self._phi(index))
            inputs.append(self.next_input(f_hat, side))
        return inputs

    def _phi(self, index: int) -> int:
        return phi_index(index, len(self.patch_nums), self.share)

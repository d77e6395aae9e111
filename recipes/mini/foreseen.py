"""A picture as a few numbers that a text encoder can foresee: the principal coordinates of its latent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

PLACES, BLOCK = 2, 240  # the largest coordinates are read from the mean of a caption, the others from the last position

Thing = tuple[str, str, str | None, int]  # subject, style, colour it was given, number


def principal(latents: Tensor) -> Tensor:
    """The first PLACES * BLOCK principal coordinates of [N, C, P, P], [N, PLACES * BLOCK], of mean square 1 in all.

    Small ones, which are the details, count for a little more than their energy.
    """
    flat = latents.flatten(1)
    centred = flat - flat.mean(dim=0)
    spread, directions = torch.linalg.eigh(centred.T @ centred / len(flat))
    kept = PLACES * BLOCK
    if len(spread) < kept:
        raise SystemExit(f"A latent has {len(spread)} numbers, fewer than the {kept} coordinates that are foreseen.")
    spread, directions = spread.flip(0)[:kept].clamp(min=1e-6), directions.flip(1)[:, :kept]
    coordinates = centred @ directions / spread**0.1
    return coordinates / coordinates.square().mean().sqrt()


class Foreseen:
    """What a caption should foresee."""

    def __init__(self, coordinates: Tensor, rows: Mapping[Thing, int]) -> None:
        """`rows`: whose coordinates are where."""
        self.coordinates, self.rows = coordinates, rows

    def missed(self, found: Tensor, things: Sequence[Thing]) -> Tensor:
        """Mean square of the error of [N, PLACES * BLOCK], over those things that have a picture; 1 if nothing is foreseen."""
        known = [(i, self.rows[thing]) for i, thing in enumerate(things) if thing in self.rows]
        if not known:
            return found.sum() * 0.0
        chosen, rows = torch.tensor(known).unbind(1)
        return (found[chosen] - self.coordinates[rows]).square().mean()

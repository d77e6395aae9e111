"""FID, KID and CLIP score by torchmetrics, of features that lie in memory, each with an uncertainty.

FID (Heusel et al. 2017): the Fréchet distance of two Gaussians fitted to the features. KID (Binkowski et al. 2018): the
unbiased squared MMD with the kernel (x.y / D + 1)^3, mean and standard deviation over random subsets. CLIP score (Hessel et
al. 2021): 100 times the cosine of picture and caption, at least 0.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000  # as published


@dataclass(frozen=True)
class Gaussian:
    """Mean [D] and covariance [D, D] of features, in fp64."""

    mean: Tensor
    covariance: Tensor


@dataclass(frozen=True)
class Fid:
    """The distance, and how far it can be trusted at this number of pictures."""

    value: float
    halves: tuple[float, ...]  # random halves of the drawn pictures against the whole reference; half as many, so larger
    reference_halves: tuple[float, ...]  # one half of the reference against the other: what independent pictures have
    rank_deficient: bool  # fewer pictures than features: biased upwards by much


@dataclass(frozen=True)
class Kid:
    """Mean and standard deviation over subsets. Subsets smaller than published are comparable with their like only."""

    value: float
    std: float
    subsets: int
    subset_size: int


@dataclass(frozen=True)
class Mean:
    """A mean over pictures and its standard error."""

    value: float
    standard_error: float
    pictures: int


class _Given(nn.Module):
    """Stands in a metric for the network: what is passed are features [N, D] already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(real: Tensor | Gaussian, drawn: Tensor) -> float:
    """Return the FID of features [N, D], against features or their statistics."""
    metric = FrechetInceptionDistance(_Given(drawn.shape[1]))
    if isinstance(real, Gaussian):  # as two pictures' sums
        metric.real_features_num_samples = torch.tensor(2)
        metric.real_features_sum = 2 * real.mean
        metric.real_features_cov_sum = real.covariance + 2 * torch.outer(real.mean, real.mean)
    else:
        metric.update(real.double(), real=True)
    metric.update(drawn.double(), real=False)
    return float(metric.compute())


def fid(real: Tensor | Gaussian, drawn: Tensor, *, cuts: int = 2, seed: int = 0) -> Fid:
    """Return the FID with that of both halves of `cuts` random cuts of the drawn pictures, and of the reference."""
    random = torch.Generator().manual_seed(seed)
    halves = [frechet_distance(real, half) for _ in range(cuts) for half in _halves(drawn, random)]
    between = [] if isinstance(real, Gaussian) else [frechet_distance(*_halves(real, random)) for _ in range(cuts)]
    few = len(drawn) if isinstance(real, Gaussian) else min(len(real), len(drawn))
    return Fid(frechet_distance(real, drawn), tuple(halves), tuple(between), few <= drawn.shape[1])


def kid(real: Tensor, drawn: Tensor, *, seed: int = 0) -> Kid:
    """Return the KID. Fewer than 2,000 pictures give subsets of half of them, as equal subsets would have no spread."""
    size = min(KID_SUBSET_SIZE, len(real) // 2, len(drawn) // 2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance` will save all")  # they lie in memory already
        metric = KernelInceptionDistance(_Given(drawn.shape[1]), subsets=KID_SUBSETS, subset_size=size)
    metric.update(real.double(), real=True)
    metric.update(drawn.double(), real=False)
    with torch.random.fork_rng(devices=[]):  # it draws its subsets from the global generator
        torch.manual_seed(seed)
        mean, std = metric.compute()
    return Kid(float(mean), float(std), KID_SUBSETS, size)


def mean_of(values: Tensor) -> Mean:
    """Return the mean of [N] and its standard error; of one value that is NaN."""
    values = values.double()
    return Mean(float(values.mean()), float(values.std() / len(values) ** 0.5), len(values))


def _halves(features: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    order = torch.randperm(len(features), generator=random)
    return features[order[: len(order) // 2]], features[order[len(order) // 2 :]]

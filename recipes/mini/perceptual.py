"""The tokenizer's losses beside the pixels' own: features of a trained network, and a discriminator of patches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from classifier import Classifier
from torch import Tensor, nn

LAYERS = (2, 5, 8, 11, 14)  # of the classifier's body: the outputs of a convolution's activation, at 1/2 to 1/8 of the side


class PerceptualLoss(nn.Module):
    """Mean squared difference of a classifier's features, each position's scaled to length 1 (as in LPIPS, without weights)."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.body = classifier.body[: LAYERS[-1] + 1]

    def features(self, pictures: Tensor) -> list[Tensor]:
        """[N, 3, h, w] in -1..1 -> one [N, C, h/2.., w/2..] a layer of LAYERS, of length 1 along C."""
        found, x = [], pictures
        for index, layer in enumerate(self.body):
            x = layer(x)
            if index in LAYERS:
                found.append(F.normalize(x.float(), dim=1))
        return found

    def forward(self, rebuilt: Tensor, pictures: Tensor) -> Tensor:
        """Distance of two batches [N, 3, h, w] in -1..1, summed over channels, mean over positions and layers."""
        with torch.no_grad():
            wanted = self.features(pictures)
        distances = [(a - b).square().sum(dim=1).mean() for a, b in zip(self.features(rebuilt), wanted, strict=True)]
        return torch.stack(distances).mean()


class Discriminator(nn.Module):
    """Tells patches of pictures from rebuilt ones (PatchGAN, hinge loss; as VQGAN's, arXiv:2012.09841, smaller)."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 96)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, width in zip((3, *widths), widths, strict=False):
            layers += [nn.Conv2d(before, width, 4, stride=2, padding=1), nn.GroupNorm(8, width), nn.LeakyReLU(0.2)]
        self.body = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 3, padding=1))

    def forward(self, pictures: Tensor) -> Tensor:
        """[N, 3, h, w] in -1..1 -> a score [N, 1, h/8, w/8] of every patch; higher means more real."""
        scores: Tensor = self.body(pictures)
        return scores

    def loss(self, pictures: Tensor, rebuilt: Tensor) -> Tensor:
        """What the discriminator minimises."""
        return 0.5 * (F.relu(1 - self(pictures)).mean() + F.relu(1 + self(rebuilt.detach())).mean())


def balance(loss: Tensor, other: Tensor, last: nn.Parameter, *, most: float = 1e3) -> Tensor:
    """How often larger the gradient of `loss` is than that of `other` at the decoder's `last` weight, at most `most`."""
    one, two = (torch.autograd.grad(x, last, retain_graph=True)[0].norm() for x in (loss, other))
    return (one / (two + 1e-8)).clamp(max=most).detach()

"""A small network that tells subject and style of a picture: the judge of what hart-mini draws, never part of it.

    python recipes/mini/classifier.py DATA OUT [--name features --seed 1 --steps 400]

Another one, of another seed, gives the features of the tokenizer's perceptual loss, so that the judge has no part in training.

Writes OUT/judge.safetensors, bf16. The one beside this file, of 1,500 steps, judged var-mini, and judges what follows.
Trained on the training pictures alone, under shifts, scalings, blur and changes of brightness.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from data import STYLES
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from training import Log, Muon, Pictures, learning_rate, shuffled

WIDTHS = (32, 64, 128, 192)
STYLE_NAMES = list(STYLES)


class Classifier(nn.Module):
    """Strided convolutions, a mean, and one linear map each for subject and style."""

    def __init__(self, subjects: int) -> None:
        """`subjects`: how many names there are."""
        super().__init__()
        layers: list[nn.Module] = []
        for before, width in zip((3, *WIDTHS), WIDTHS, strict=False):
            layers += [nn.Conv2d(before, width, 3, stride=2, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.subject, self.style = nn.Linear(WIDTHS[-1], subjects), nn.Linear(WIDTHS[-1], len(STYLE_NAMES))

    def features(self, pictures: Tensor) -> Tensor:
        """[N, 3, h, w] in -1..1 -> [N, 192]."""
        return self.body(pictures).mean(dim=(2, 3))

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of subject [N, subjects] and style [N, styles]."""
        features = self.features(pictures)
        return self.subject(features), self.style(features)


def subjects_of(pictures: Pictures) -> list[str]:
    """All names, in the order of their classes."""
    return sorted({about.name for about in pictures.about})


def load_classifier(path: Path, pictures: Pictures) -> Classifier:
    """The trained classifier."""
    classifier = Classifier(len(subjects_of(pictures)))
    classifier.load_state_dict(load_file(path))
    return classifier.eval().requires_grad_(False)


def disturb(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Move, scale, blur, brighten: all that doesn't change what a picture shows."""
    count = len(pictures)

    def draw(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=generator) * (high - low) + low

    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = draw(0.92, 1.15)
    theta[:, 0, 2], theta[:, 1, 2] = draw(-0.08, 0.08), draw(-0.08, 0.08)
    grid = F.affine_grid(theta, list(pictures.shape), align_corners=False)
    moved = F.grid_sample(pictures - 1, grid, align_corners=False) + 1  # white outside
    blurred = F.avg_pool2d(F.pad(moved, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    moved = torch.where(draw(0, 1)[:, None, None, None] < 0.4, blurred, moved)
    return moved * draw(0.9, 1.05)[:, None, None, None] + draw(-0.05, 0.05)[:, None, None, None]


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="judge", help="of the file in OUT that is written")
    args = parser.parse_args()
    pictures, log = Pictures(args.data), Log(args.out / f"{args.name}.jsonl")
    names = {name: i for i, name in enumerate(subjects_of(pictures))}
    subject = torch.tensor([names[about.name] for about in pictures.about])
    style = torch.tensor([STYLE_NAMES.index(about.style) for about in pictures.about])
    torch.manual_seed(args.seed)
    classifier = Classifier(len(names)).to(memory_format=torch.channels_last)
    learned = list(classifier.parameters())
    optimizers = [
        Muon([p for p in learned if p.ndim > 1], args.lr, weight_decay=0.05),
        torch.optim.AdamW([p for p in learned if p.ndim == 1], args.lr),
    ]
    held_out = pictures.split("style")
    batches = shuffled(pictures.split("train"), args.batch, args.seed, 0)
    for step in range(args.steps):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = learning_rate(step, peak=args.lr, warmup=50, steps=args.steps, decay=0.6)
        chosen, generator = next(batches), torch.Generator().manual_seed(args.seed + step)
        seen = disturb(pictures.tensor(chosen), generator).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            by_subject, by_style = classifier(seen)
        by_subject, by_style = by_subject.float(), by_style.float()
        loss = F.cross_entropy(by_subject, subject[chosen], label_smoothing=0.05) + F.cross_entropy(by_style, style[chosen])
        classifier.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        if (step + 1) % 100 == 0:
            with torch.no_grad():
                by_subject, by_style = classifier(pictures.tensor(held_out))
            right = (
                (by_subject.argmax(1) == subject[held_out]).float().mean(),
                (by_style.argmax(1) == style[held_out]).float().mean(),
            )
            log(step=step + 1, loss=loss.item(), held_out_subject=right[0].item(), held_out_style=right[1].item())
    weights = {name: value.bfloat16().contiguous() for name, value in classifier.state_dict().items()}
    part = args.out / f"{args.name}.part"
    save_file(weights, part)
    os.replace(part, args.out / f"{args.name}.safetensors")


if __name__ == "__main__":
    main()

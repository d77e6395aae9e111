"""What both trainings share: averaged weights, the learning rate, checkpoints, logs and grids of pictures."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn


class Average:
    """Exponential moving average of a module's parameters."""

    def __init__(self, module: nn.Module, decay: float, *, copied: tuple[str, ...] = ()) -> None:
        """Starts at the parameters as they are; those named in `copied` are not averaged but followed."""
        self.module, self.decay, self.copied = module, decay, copied
        self.values = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the parameters; faster at first."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, value in self.module.state_dict().items():
            self.values[name].lerp_(value, 1.0 if name in self.copied else weight)

    def swap(self) -> None:
        """Exchange the module's parameters and the average."""
        live = {name: value.detach().clone() for name, value in self.module.state_dict().items()}
        self.module.load_state_dict(self.values)
        self.values = live


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal (Jordan et al. 2024), for matrices and, flattened to [out, rest], for convolutions.

    `torch.optim.Muon` takes matrices only. The update's size is AdamW's (arXiv:2502.16982), so rates carry over.
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float, *, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        """All `parameters` have at least two dimensions."""
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One update; `closure` is not used."""
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                direction = parameter.grad.lerp(state["momentum"], group["momentum"]).flatten(1)
                size = 0.2 * max(direction.shape) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(orthogonal(direction).view(parameter.shape), alpha=-group["lr"] * size)


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """The orthogonal matrix nearest to [m, n], roughly: singular values go to 0.7..1.2 by a quintic Newton-Schulz iteration."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = (x / (x.norm() + 1e-7)).bfloat16()
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x.T if matrix.shape[0] > matrix.shape[1] else x).float()


def learning_rate(step: int, *, peak: float, warmup: int, steps: int, decay: float = 0.25) -> float:
    """Linear warm-up, a plateau, and a linear fall to zero over the last `decay` of all steps.

    A run that is to go on longer resumes from before the fall.
    """
    return peak * min(1.0, (step + 1) / warmup, (steps - step) / (decay * steps))


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint under another name, then rename it."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


class Log:
    """A line of JSON per entry, in a file and on the terminal."""

    def __init__(self, path: Path) -> None:
        """Appends to `path`, whose folder is made if it isn't there."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.start = path, time.time()

    def __call__(self, **values: Any) -> None:
        """Round and write."""
        shown = {key: round(value, 5) if isinstance(value, float) else value for key, value in values.items()}
        line = json.dumps(shown | {"seconds": round(time.time() - self.start)})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)


@dataclass(frozen=True)
class Entry:
    """What `data.py` wrote of one picture, and whether a caption without a style means it."""

    emoji: str
    name: str
    keywords: list[str]
    group: str
    style: str
    split: str
    colour: str | None
    number: int
    plain: bool

    @property
    def made(self) -> bool:
        """Whether it was composed of another picture."""
        return self.split in ("composed", "pair")


class Pictures:
    """The pictures and names that `data.py` wrote."""

    def __init__(self, folder: Path, subjects: Path | None = None) -> None:
        """`folder` is data.py's; `subjects` a file of names, one per line, to which `split` keeps (all of them)."""
        self.pixels = np.load(folder / "pictures.npy", mmap_mode="r")
        listed: list[dict[str, Any]] = json.loads((folder / "pictures.json").read_text(encoding="utf-8"))
        first: dict[tuple[Any, ...], int] = {}  # of a thing's pictures in training, noto where there is one
        for i, a in enumerate(listed):
            if a["split"] in ("train", "composed"):
                first.setdefault(_thing(a), i)
        self.about = [Entry(**a, plain=first.get(_thing(a)) == i) for i, a in enumerate(listed)]
        known = {a.name for a in self.about}
        self.names = names_in(subjects, known) if subjects else known

    def split(self, *splits: str) -> list[int]:
        """Indices of the pictures of these splits and of the chosen subjects."""
        return [i for i, about in enumerate(self.about) if about.split in splits and about.name in self.names]

    def tensor(self, indices: list[int]) -> Tensor:
        """[N, 3, SIDE, SIDE] fp32 in -1..1."""
        return torch.from_numpy(self.pixels[indices]).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def mixed_pictures(pictures: Pictures) -> list[list[int]]:
    """Pictures that a caption without a style means, their subjects' other styles, and composed ones."""
    single, about = pictures.split("train"), pictures.about
    plain = [i for i in single if about[i].plain]
    return [plain, [i for i in single if not about[i].plain], pictures.split("composed")]


def names_in(path: Path, known: set[str]) -> set[str]:
    """The names in a file, one per line. SystemExit for one that is not `known`."""
    names = set(path.read_text(encoding="utf-8").splitlines())
    if unknown := names - known:
        raise SystemExit(f"{path} names what there are no pictures of: {', '.join(sorted(unknown))}.")
    return names


def _thing(about: dict[str, Any]) -> tuple[Any, ...]:
    made = about["split"] in ("composed", "pair")
    return about["name"], about["colour"] if made else None, about["number"]


def shuffled(indices: list[int], batch: int, seed: int, start: int) -> Iterator[list[int]]:
    """Endless batches in an order that depends on `seed` and the step alone; begins at step `start`."""
    if len(indices) < batch:
        raise SystemExit(f"There are {len(indices)} pictures, too few for a batch of {batch}: give fewer with --batch.")
    begun, first = divmod(start, len(indices) // batch)
    for epoch in itertools.count(begun):
        order = np.random.default_rng((seed, epoch)).permutation(len(indices))
        for place in range(first, len(indices) // batch):
            yield [indices[i] for i in order[place * batch : (place + 1) * batch]]
        first = 0


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """PSNR in dB per picture of [N, 3, h, w] in -1..1."""
    return -10 * ((a - b).div(2).square().mean(dim=(1, 2, 3))).log10()


def write_grid(path: Path, rows: list[Tensor]) -> None:
    """Rows of pictures [N, 3, h, w] in -1..1 as one PNG."""
    grid = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
    Image.fromarray(grid.add(1).mul(127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()).save(path)

"""Fit a checkpoint's `late_temperature`: what the logits of late scales are divided by where a fast mode drops their guidance.

    python benchmarks/fit_late_temperature.py hart_infer/assets/var-mini --write
    python benchmarks/fit_late_temperature.py FoundationVision/var --variant d16

Guided logits are sharper than the conditional ones alone. Pictures are drawn exactly, with guidance; at their late scales the
temperature T is found at which the mean entropy of what a code is drawn from, softmax(filter(conditional / T)), is the guided
one's. Where the model has next to no choice there is nothing to match, and T stays 1. --write stores it in the checkpoint's
model_index.json, where a call finds its default.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hart_infer import HartPipeline, VarPipeline
from hart_infer.checkpoints.families import find_family
from hart_infer.checkpoints.hub import HUB
from hart_infer.checkpoints.layouts import INDEX
from hart_infer.engine.quantize import Quantize
from hart_infer.generation.sampling import Sampler
from hart_infer.generation.schedule import Stage
from hart_infer.images.files import whole_file
from hart_infer.ops.logits import filter_logits, guide

LOWEST, HIGHEST = 0.02, 5.0  # between which T is sought
HALVINGS = 30
CERTAIN = 0.02  # nats: a model of less entropy draws the same codes at any T, and a few odd tokens would decide the fit


@dataclass(frozen=True)
class Logits:
    """Some tokens of one scale of some pictures."""

    stage: Stage
    conditional: Tensor  # [N, V]
    guided: Tensor

    def entropy(self, logits: Tensor) -> float:
        """Mean entropy in nats of the distributions that codes are drawn from."""
        filtered = filter_logits(logits.clone(), top_k=self.stage.top_k, top_p=self.stage.top_p)
        log_p = filtered.log_softmax(dim=-1)
        return float(-(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)).sum(dim=-1).double().mean())


class Listener:
    """A sampler that notes some of the logits of late scales, and draws what the sampler inside draws."""

    def __init__(self, inner: Sampler, sides: Sequence[int], tokens: int, heard: list[Logits]) -> None:
        self.inner, self.sides, self.tokens, self.heard = inner, sides, tokens, heard
        self.batch_size, self.noise = inner.batch_size, inner.noise
        self.settings, self.failed = inner.settings, inner.failed

    def draw(self, logits: Tensor, codebook: Tensor, stage: Stage) -> tuple[Tensor, Tensor]:
        """As `Sampler.draw`."""
        if stage.side in self.sides and len(logits) > self.batch_size:
            step = -(-stage.tokens // self.tokens)
            some = logits[:, ::step].float().cpu()
            conditional = some[: self.batch_size].flatten(0, 1).clone()
            self.heard.append(Logits(stage, conditional, guide(some, stage.guidance).flatten(0, 1)))
        return self.inner.draw(logits, codebook, stage)


def listen(pipe: Any, subjects: Sequence[Any], *, sides: Sequence[int], tokens: int, seed: int) -> list[Logits]:
    """Draw one picture per subject exactly; return the logits of up to `tokens` tokens of each of the scales `sides`."""
    heard: list[Logits] = []
    start = pipe.engine.start

    def listening(schedule: Any, samplers: Sequence[Sampler], *rest: Any, **named: Any) -> Any:
        return start(schedule, [Listener(sampler, sides, tokens, heard) for sampler in samplers], *rest, **named)

    pipe.engine.start = listening
    try:
        for index, subject in enumerate(subjects):
            pipe(subject, seed=seed + index, output_type="latent")
    finally:
        pipe.engine.start = start
    if not heard:
        raise SystemExit("Without guidance there is no temperature to fit: the checkpoint's guidance_scale is 0.")
    return heard


def fit(heard: Sequence[Logits]) -> float | None:
    """Return T at which conditional / T has the guided entropy on average, every token of a picture weighing the same.

    None where the guided codes are all but certain.
    """
    weights = [one.stage.tokens for one in heard]  # the noted tokens stand for all of their scale's

    def mean(entropies: Sequence[float]) -> float:
        return sum(w * e for w, e in zip(weights, entropies, strict=True)) / sum(weights)

    wanted = mean([one.entropy(one.guided) for one in heard])
    if wanted < CERTAIN:
        return None
    low, high = LOWEST, HIGHEST
    for _ in range(HALVINGS):
        middle = math.sqrt(low * high)
        too_flat = mean([one.entropy(one.conditional / middle) for one in heard]) > wanted
        low, high = (low, middle) if too_flat else (middle, high)
    return math.sqrt(low * high)


def shown(fitted: float | None) -> str:
    """T, or why there is none."""
    return f"not fitted: codes are certain to {CERTAIN} nats, so 1" if fitted is None else f"{fitted:.3f}"


def load(
    model: str,
    variant: str | None,
    device: str | None,
    dtype: torch.dtype = torch.float32,
    quantize: Quantize | None = None,
) -> Any:
    """The pipeline of a model of either family."""
    pipeline: Any = VarPipeline if find_family(model, HUB) == "VAR" else HartPipeline
    pipe = pipeline.from_pretrained(model, variant=variant, dtype=dtype, device=device, quantize=quantize)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def subjects_of(pipe: Any, prompts: Path | None, count: int) -> list[Any]:
    """`count` prompts spread over a file, repeated where it has fewer, or for VAR classes spread over all."""
    if isinstance(pipe, VarPipeline):
        classes = pipe.transformer.config.num_classes
        return [index * classes // count % classes for index in range(count)]
    if prompts is None:
        raise SystemExit("A HART model needs --prompts FILE, one prompt per line.")
    lines = [line.strip() for line in prompts.read_text(encoding="utf-8").splitlines()]
    texts = [line for line in lines if line and not line.startswith("#")]
    step = max(1, len(texts) // count)
    return [texts[index * step % len(texts)] for index in range(count)]


def write(folder: Path, value: float) -> None:
    """Store the value in model_index.json of a folder that `save_pretrained` wrote, replaced in one step."""
    path = folder / INDEX
    if not path.is_file():
        raise SystemExit(f"{folder} has no {INDEX}: convert the checkpoint (hart-infer convert), then fit its copy.")
    index = json.loads(path.read_text(encoding="utf-8"))
    index.setdefault("defaults", {})["late_temperature"] = value
    with whole_file(path, overwrite=True) as file:
        file.write((json.dumps(index, indent=2) + "\n").encode())


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint's folder or Hub id")
    parser.add_argument("--variant", help="as of from_pretrained")
    parser.add_argument("--prompts", type=Path, help="HART: a file of prompts, one per line")
    parser.add_argument("--count", type=int, default=32, help="pictures that are drawn")
    parser.add_argument("--scales", type=int, default=3, help="of the last scales; 3 is what `turbo` leaves without guidance")
    parser.add_argument("--tokens", type=int, default=256, help="at most so many of each scale of a picture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device")
    parser.add_argument("--write", action="store_true", help="store it in the folder's model_index.json")
    args = parser.parse_args(arguments)
    pipe = load(args.model, args.variant, args.device)
    sides = pipe.autoencoder.config.v_patch_nums[-args.scales :]
    heard = listen(pipe, subjects_of(pipe, args.prompts, args.count), sides=sides, tokens=args.tokens, seed=args.seed)
    for side in sides:
        of_scale = [one for one in heard if one.stage.side == side]
        guided, conditional = (
            sum(one.entropy(logits(one)) for one in of_scale) / len(of_scale)
            for logits in (lambda one: one.guided, lambda one: one.conditional)
        )
        print(f"scale {side}: entropy guided {guided:.3f}, conditional {conditional:.3f}; alone T = {shown(fit(of_scale))}")
    fitted = fit(heard)
    print(f"late_temperature {shown(fitted)} (guidance_scale {pipe.defaults.guidance_scale:g}, {args.count} pictures)")
    value = 1.0 if fitted is None else round(fitted, 3)
    if args.write:
        write(Path(args.model), value)


if __name__ == "__main__":
    main()

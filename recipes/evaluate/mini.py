"""Measure a hart-mini by the recipe's own network: Frechet distance, and how often the judge sees what was asked for.

    python recipes/evaluate/mini.py DATA JUDGE OUT -- --model hart-mini

DATA is what recipes/mini/data.py wrote, JUDGE recipes/mini/judge.safetensors. What follows `--`
are options of `hart-infer batch`. The pairs of subject and style that hart-mini learned are drawn in wordings that no
training caption has, with the residual diffusion and without. Killed, the same command goes on. Writes OUT/results.json.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from drawing import draw, split_options
from metrics import Mean, mean_of
from networks import MINI, extract, load_judge
from pictures import PictureSet, Reader, of_array
from score import Results, Scoring, guarded, record, results_of, score_features, write_json
from torch import Tensor

from hart_infer import InputError

WAYS = {"with_residual": (), "codes_alone": ("--steps", "0")}  # the paper's second claim


@dataclass(frozen=True)
class Seen:
    """How often the judge's first guess is the subject and the style that were asked for."""

    subject: Mean
    style: Mean


@dataclass(frozen=True)
class MiniResults:
    """All of OUT/results.json."""

    seen: dict[str, Seen]  # of the real pictures, and drawn in both ways
    with_residual: Results
    codes_alone: Results


@dataclass(frozen=True)
class Wish:
    """A picture that hart-mini learned, the caption that asks for it, and the judge's classes."""

    index: int
    prompt: str
    subject: int
    style: int

    @property
    def id(self) -> str:
        """Of its row in the batch."""
        return f"{self.index:05d}"


@dataclass(frozen=True)
class Learned:
    """What recipes/mini/data.py wrote of every picture, and the judge's classes."""

    about: list[dict[str, Any]]
    subjects: dict[str, int]
    styles: list[str]

    def wish(self, index: int, prompt: str) -> Wish:
        """Ask for a picture by a prompt."""
        about = self.about[index]
        return Wish(index, prompt, self.subjects[about["name"]], self.styles.index(about["style"]))


def read_learned(data: Path) -> Learned:
    """Read the names of the pictures in `data`. Raises InputError where what recipes/mini needs is missing."""
    from_recipe = recipe("data")
    about = json.loads((data / "pictures.json").read_text(encoding="utf-8"))
    subjects = {name: i for i, name in enumerate(sorted({each["name"] for each in about}))}
    return Learned(about, subjects, list(from_recipe.STYLES))


def recipe(module: str) -> Any:
    """Import a module of recipes/mini. Raises InputError where what it needs is missing."""
    sys.path.insert(0, str(MINI))
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"this needs what recipes/mini needs ({error}): pip install -r {MINI}/requirements.txt.") from error
    finally:
        sys.path.remove(str(MINI))


def read_wishes(data: Path, subjects: Path | None, count: int, seed: int = 0) -> list[Wish]:
    """Choose training pictures by `seed`, each with a caption in one of the held-out wordings. Raises InputError."""
    captions, learned = recipe("captions"), read_learned(data)
    known = set(subjects.read_text(encoding="utf-8").splitlines()) if subjects else set(learned.subjects)
    if unknown := known - set(learned.subjects):
        raise InputError(f"{subjects} names what {data} has no pictures of, such as {min(unknown)}.")
    indices = [i for i, each in enumerate(learned.about) if each["split"] == "train" and each["name"] in known]
    wishes = []
    for i in Random(seed).sample(indices, min(count, len(indices))):
        template, each = captions.HELD_OUT_TEMPLATES[i % len(captions.HELD_OUT_TEMPLATES)], learned.about[i]
        wanted = captions.Wanted(captions.spoken(each["name"]), each["style"])
        wishes.append(learned.wish(i, captions.fill(template, wanted)))
    return wishes


def read_class_wishes(data: Path, names: Sequence[str], count: int) -> list[Wish]:
    """Choose `count` of var-mini's classes, spread over all: its pictures, and their names as prompts. Raises InputError."""
    styles, learned = recipe("model").VAR_STYLES, read_learned(data)
    place = {e["name"]: i for i, e in enumerate(learned.about) if e["split"] == "train" and e["style"] in styles}
    if unknown := set(names) - set(place):
        raise InputError(f"{data} has no picture that var-mini learned of {min(unknown)}.")
    count = min(count, len(names))
    chosen = [names[index * len(names) // count] for index in range(count)]
    return [learned.wish(place[name], name) for name in chosen]


def see(pictures: PictureSet, wishes: Sequence[Wish], judge: Path, size: int) -> Seen:
    """Ask the judge what it sees in each picture. Raises InputError."""
    classifier = load_judge(judge)
    subject, style = torch.tensor([w.subject for w in wishes]), torch.tensor([w.style for w in wishes])
    guesses: list[tuple[Tensor, Tensor]] = []
    with torch.inference_mode():
        for images in Reader(pictures, size).batches(32):
            guesses.append(tuple(logits.argmax(dim=1) for logits in classifier(images / 127.5 - 1)))
    guessed = [torch.cat(each) for each in zip(*guesses, strict=True)]
    return Seen(mean_of((guessed[0] == subject).float()), mean_of((guessed[1] == style).float()))


def measure(data: Path, judge: Path, out: Path, wishes: Sequence[Wish], options: Sequence[str]) -> MiniResults:
    """Draw what is missing, and score it. Raises InputError, DrawingError."""
    pixels = np.load(data / "pictures.npy", mmap_mode="r")[[w.index for w in wishes]]
    real = of_array("real", pixels, [w.id for w in wishes])
    scoring = Scoring("judge", judge, size=pixels.shape[1])  # what is drawn smaller is enlarged, so that one judge sees both
    network = scoring.load()
    of_real = extract(network, real, size=scoring.size)
    seen, results = {"real": see(real, wishes, judge, pixels.shape[1])}, {}
    rows = [{"id": w.id, "prompt": w.prompt} for w in wishes]
    for way, more in WAYS.items():
        drawn = draw(rows, out, [*options, *more], way).chosen([w.id for w in wishes])
        found = extract(network, drawn, size=scoring.size)
        whole = score_features(of_real.values, found.values, scoring)
        whole = replace(whole, kid=None)  # it takes both sets to be independent; these are the same pictures, drawn anew
        results[way] = results_of(scoring, network, drawn, found, record(real, of_real), whole)
        seen[way] = see(drawn, wishes, judge, pixels.shape[1])
    return MiniResults(seen, **results)


def table(results: MiniResults) -> str:
    """The figures for people."""
    lines = [f"{'':16s}{'subject':>16s}{'style':>16s}{'Frechet':>10s}{'of halves':>16s}"]
    for way, seen in results.seen.items():
        cells = [f"{100 * m.value:.1f} +- {100 * m.standard_error:.1f} %" for m in (seen.subject, seen.style)]
        line = f"{way:16s}{cells[0]:>16s}{cells[1]:>16s}"
        if way != "real":
            score = getattr(results, way).score
            halves = torch.tensor(score.fid.halves)
            line += f"{score.fid.value:10.3f}{f'{halves.mean():.2f} +- {halves.std():.2f}':>16s}"
        lines.append(line)
    whole = results.with_residual
    floor = sum(whole.score.fid.reference_halves) / len(whole.score.fid.reference_halves)
    lines.append(
        f"{whole.score.pictures} pictures of {whole.model}, weights {whole.weights}, {whole.machine['cpu']}. The distance is of"
    )
    lines.append(f"the judge's features: it compares with no published one. Between halves of the real pictures: {floor:.2f}.")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write; returns the exit code."""
    own, options = split_options(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("judge", type=Path, metavar="JUDGE")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--subjects", type=Path, metavar="FILE", help="what the model has learned, one name a line (all)")
    parser.add_argument("--count", type=int, default=384, help="pictures drawn in each of both ways (384)")
    parser.add_argument("--results", type=Path, help="what is written (OUT/results.json)")
    args = parser.parse_args(own)

    def run() -> None:
        if args.count < 4:
            raise InputError("--count is 4 or more.")
        out = Path(os.path.abspath(args.out))
        wishes = read_wishes(args.data, args.subjects, args.count)
        results = measure(args.data, args.judge, out, wishes, options)
        write_json(Path(os.path.abspath(args.results or out / "results.json")), asdict(results))
        print(table(results))

    return guarded(run)


if __name__ == "__main__":
    sys.exit(main())

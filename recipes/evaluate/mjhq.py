"""Draw MJHQ-30K's prompts, and score the pictures against its own: FID and KID of all and of each category, CLIP score.

    python recipes/evaluate/mjhq.py meta_data.json OUT --real mjhq30k_imgs --features inception --weights FILE --size 299 \\
        --clip FOLDER -- --model MODEL --batch-size 8

meta_data.json and mjhq30k_imgs (CATEGORY/ID.jpg) are those of huggingface.co/datasets/playgroundai/MJHQ-30K. What follows `--`
are options of `hart-infer batch`. Killed, the same command goes on; without --real it only draws. Writes OUT/results.json.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from drawing import draw, split_options
from networks import clip_score, extract, load_clip
from pictures import PictureSet, open_set, read_json
from score import (
    Results,
    Score,
    Scoring,
    add_scoring,
    check_comparable,
    guarded,
    record,
    results_of,
    score_features,
    scoring_of,
    table,
    write_json,
)

from hart_infer import InputError


@dataclass(frozen=True)
class Entry:
    """One picture of the data set."""

    id: str
    category: str
    prompt: str


def read_entries(path: Path, per_category: int | None = None) -> list[Entry]:
    """Read meta_data.json; of each category all, or the first few. Raises InputError."""
    entries: list[Entry] = []
    counts: dict[str, int] = {}
    for name, about in read_json(path).items():
        if not (isinstance(about, dict) and isinstance(about.get("category"), str) and isinstance(about.get("prompt"), str)):
            raise InputError(f"{path} is not MJHQ-30K's meta_data.json: {name} has no category and prompt.")
        counts[about["category"]] = counts.get(about["category"], 0) + 1
        if per_category is None or counts[about["category"]] <= per_category:
            entries.append(Entry(name, about["category"], about["prompt"]))
    if not entries:
        raise InputError(f"{path} names no picture.")
    return entries


def score_categories(real: PictureSet, drawn: PictureSet, entries: Sequence[Entry], scoring: Scoring) -> Results:
    """Score all pictures and each category; exactly those of `entries` count on both sides. Raises InputError."""
    names = [entry.id for entry in entries]
    real, drawn = real.chosen([f"{entry.category}/{entry.id}" for entry in entries]), drawn.chosen(names)
    network = scoring.load()
    of_real = extract(network, real, size=scoring.size, batch_size=scoring.batch_size)
    found = extract(network, drawn, size=scoring.size, batch_size=scoring.batch_size)
    check_comparable(real, of_real, drawn, found, scoring.size)
    clip = None if scoring.clip is None else clip_score(load_clip(scoring.clip, network.device), drawn)
    whole = score_features(of_real.values, found.values, scoring, clip)
    parts: dict[str, Score] = {}
    for category in sorted({entry.category for entry in entries}):
        places = [i for i, entry in enumerate(entries) if entry.category == category]
        parts[category] = score_features(of_real.values[places], found.values[places], scoring)
    return results_of(scoring, network, drawn, found, record(real, of_real), whole, parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw, and score where the real pictures are given; returns the exit code."""
    own, options = split_options(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metadata", type=Path, metavar="FILE")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--real", type=Path, metavar="FOLDER", help="mjhq30k_imgs, unpacked")
    parser.add_argument("--per-category", type=int, help="only so many of each category (all)")
    add_scoring(parser, required=False)
    args = parser.parse_args(own)

    def run() -> None:
        scoring = scoring_of(args) if args.real else None  # before hours of drawing
        entries = read_entries(args.metadata, args.per_category)
        drawn = draw([{"id": entry.id, "prompt": entry.prompt} for entry in entries], args.out, options)
        if scoring is None:
            print(args.out / "drawn")
            return
        results = score_categories(open_set(args.real), drawn, entries, scoring)
        write_json(Path(os.path.abspath(args.out)) / "results.json", asdict(results))
        print(table(results))

    return guarded(run)


if __name__ == "__main__":
    sys.exit(main())

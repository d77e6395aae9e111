"""Draw GenEval's prompts and lay the pictures out as its scorer reads them.

    python recipes/evaluate/geneval.py evaluation_metadata.jsonl OUT -- --model MODEL --batch-size 8

The file is prompts/evaluation_metadata.jsonl of github.com/djghosh13/geneval; what follows `--` are options of
`hart-infer batch`. Killed, the same command goes on. Then, where that repository and its detector are:

    python evaluation/evaluate_images.py OUT/images --outfile results.jsonl --model-path DETECTOR
    python evaluation/summary_scores.py results.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from drawing import draw, paths_of, place, split_options
from score import guarded

from hart_infer import InputError

PER_PROMPT = 4  # as published


def read_prompts(path: Path) -> list[tuple[str, str]]:
    """Return each line of the file, and its prompt. Raises InputError."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return [(line, json.loads(line)["prompt"]) for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is not GenEval's evaluation_metadata.jsonl: a JSON object with a prompt in each line."
        ) from error


def lay_out(lines: Sequence[str], pictures: dict[str, Path], images: Path, per_prompt: int) -> None:
    """Write IMAGES/00000/metadata.jsonl and samples/00000.png, one folder a prompt, each whole or not at all."""
    images.mkdir(parents=True, exist_ok=True)
    for number, line in enumerate(lines):
        folder = images / f"{number:05d}"
        if folder.exists():
            continue
        part = images / f".{number:05d}.part"  # the scorer passes over what is no number
        shutil.rmtree(part, ignore_errors=True)
        (part / "samples").mkdir(parents=True)
        (part / "metadata.jsonl").write_text(line, encoding="utf-8")
        for sample in range(per_prompt):
            place(pictures[_id(number, sample)], part / "samples" / f"{sample:05d}.png")
        os.replace(part, folder)


def _id(number: int, sample: int) -> str:
    return f"{number:05d}-{sample:05d}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw and lay out; returns the exit code."""
    own, options = split_options(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metadata", type=Path, metavar="FILE")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--per-prompt", type=int, default=PER_PROMPT, help="pictures of each prompt (4, as published)")
    args = parser.parse_args(own)

    def run() -> None:
        if args.per_prompt < 1:
            raise InputError("--per-prompt is 1 or more.")
        prompts = read_prompts(args.metadata)
        rows = [
            {"id": _id(number, sample), "prompt": prompt}
            for number, (_, prompt) in enumerate(prompts)
            for sample in range(args.per_prompt)
        ]
        pictures = paths_of(draw(rows, args.out, options))
        lay_out([line for line, _ in prompts], pictures, args.out / "images", args.per_prompt)
        print(args.out / "images")

    return guarded(run)


if __name__ == "__main__":
    sys.exit(main())

"""Draw DPG-Bench's prompts and put the four pictures of each into the 2 x 2 grid that its scorer cuts up.

    python recipes/evaluate/dpg.py PROMPTS OUT -- --model MODEL --batch-size 8

PROMPTS is the folder dpg_bench/prompts of github.com/TencentQQGYLab/ELLA; what follows `--` are options of
`hart-infer batch`. Killed, the same command goes on. Then, in that repository:

    bash dpg_bench/dist_eval.sh OUT/images SIDE          # SIDE of one picture, which the end of our run says
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from drawing import draw, paths_of, split_options
from PIL import Image
from score import guarded

from hart_infer import InputError
from hart_infer.images.files import save_picture

PER_PROMPT = 4
PLACES = ((0, 0), (1, 0), (0, 1), (1, 1))  # column and row, in the order in which the scorer cuts


def read_prompts(folder: Path) -> dict[str, str]:
    """Return the prompt of each file by its name without .txt. Raises InputError."""
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise InputError(f"{folder} holds no prompts (*.txt).")
    return {file.stem: " ".join(file.read_text(encoding="utf-8").split()) for file in files}


def grid(paths: Sequence[Path]) -> Image.Image:
    """Put four pictures of one size side by side without a gap. Raises InputError."""
    pictures = []
    for path in paths:
        with Image.open(path) as picture:
            pictures.append(picture.convert("RGB"))
    width, height = pictures[0].size
    if width != height or any(picture.size != (width, height) for picture in pictures):
        raise InputError(f"{paths[0]} and its three are not squares of one size.")
    whole = Image.new("RGB", (2 * width, 2 * height))
    for (column, row), picture in zip(PLACES, pictures, strict=True):
        whole.paste(picture, (column * width, row * height))
    return whole


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw and lay out; returns the exit code."""
    own, options = split_options(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path, metavar="PROMPTS")
    parser.add_argument("out", type=Path, metavar="OUT")
    args = parser.parse_args(own)

    def run() -> None:
        prompts = read_prompts(args.prompts)
        rows = [{"id": f"{name}-{i}", "prompt": text} for name, text in prompts.items() for i in range(PER_PROMPT)]
        pictures = paths_of(draw(rows, args.out, options))
        images = Path(os.path.abspath(args.out)) / "images"
        images.mkdir(parents=True, exist_ok=True)
        side = 0
        for name in prompts:
            whole = grid([pictures[f"{name}-{i}"] for i in range(PER_PROMPT)])
            side = whole.width // 2
            if not (images / f"{name}.png").exists():
                save_picture(whole, images / f"{name}.png")
        print(f"{images} {side}")

    return guarded(run)


if __name__ == "__main__":
    sys.exit(main())

"""Draw prompts or classes, one a line, and write an animated picture of the scales, each sharper than the one before.

    python examples/sharpening.py recipes/mini/demo.txt sharpening.webp --columns 4
    python examples/sharpening.py recipes/mini/classes.txt sharpening.webp --columns 6 --model var-mini --classes

The last frame is the pictures themselves; it stays longest. Also a GIF, by its extension, of 256 colours.
"""

import argparse
from pathlib import Path

from hart_infer import HartPipeline, VarPipeline
from hart_infer.images.files import make_grid

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("prompts", type=Path)
parser.add_argument("out", type=Path)
parser.add_argument("--model", default="hart-mini")
parser.add_argument("--classes", action="store_true", help="the model is a VAR, and the lines are classes")
parser.add_argument("--seed", type=int, default=0, help="of the first picture; the others' count up from it")
parser.add_argument("--columns", type=int)
parser.add_argument("--milliseconds", type=int, default=400, help="of a frame; the last takes eight times as long")
args = parser.parse_args()

pipe = (VarPipeline if args.classes else HartPipeline).from_pretrained(args.model)
prompts = [line for line in args.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
frames = []
pipe(prompts, seed=args.seed, callback_on_step_end=lambda step: frames.append(make_grid(step.preview(), args.columns)))
durations = [args.milliseconds] * (len(frames) - 1) + [8 * args.milliseconds]
frames[0].save(args.out, save_all=True, append_images=frames[1:], duration=durations, loop=0, quality=90, method=6)

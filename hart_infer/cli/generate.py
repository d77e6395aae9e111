"""`hart-infer generate`: generate picture files from prompts."""

from __future__ import annotations

import argparse

from . import options
from .drawing import DrawOptions, add_drawing, draw
from .naming import DEFAULT_NAME
from .prompts import add_prompts, prompts_of

DETAILS = """\
For a model of classes (VAR) a prompt is a class's name or number.
The pictures' paths go to stdout, one per line, each as soon as it is written."""

EPILOG = f"""\
names:
  --out is a file name; or a pattern with {{index}}, {{seed}} and {{prompt}}, which
  take Python's format specs ({{index:04d}}, {{prompt:.20}}); or a folder. Pictures
  that would get the same name are numbered: cat-000.png, cat-001.png.
  A file that --out names is replaced if it exists (not with --no-overwrite).
  Without --out, or in a folder, names are {DEFAULT_NAME}: they continue
  after those that are there, and no file is ever replaced.
  The extension decides the format: .png, .jpg, .jpeg or .webp. Missing folders
  are made.

prompts file:
  One prompt per line, in UTF-8. Empty lines and lines that begin with # are
  skipped. Prompts on the command line come first.

seeds:
  Picture i of a call has seed SEED + i, whatever --batch-size is. Without --seed
  the first one is drawn, and shown.

metadata:
  Every picture carries its prompt or class, seed, model and settings: as JSON in
  a PNG's text chunk, in EXIF otherwise. `hart-infer info PICTURE` shows them;
  --no-metadata leaves them out.

examples:
  hart-infer generate "a cat, noto style" -o cat.png
  hart-infer generate "a cat" "a dog" --num 4 --seed 7 -o "out/{{prompt}}-{{seed}}.png"
  hart-infer generate "a cat" --num 9 --grid -o cats.png
  hart-infer generate --prompts prompts.txt -o pictures/ --batch-size 4
  echo "a fox" | hart-infer generate --prompts - --json
  hart-infer generate "golden retriever" 207 -m FoundationVision/var --variant d16
  hart-infer generate "a cat" -m mit-han-lab/vila-u-7b-256 -n 4 --batch-size 4
"""


def add_parser(commands: options.Commands) -> None:
    """Add the subcommand."""
    parser = options.add_command(
        commands,
        "generate",
        usage="PROMPT... [-o OUT] [-m MODEL] [options]",
        summary="Generate pictures from prompts.",
        details=DETAILS,
        epilog=EPILOG,
    )
    parser.set_defaults(run=run)
    add_prompts(parser, "what the picture shows, in quotes; for VAR a class's name or number")
    add_drawing(parser)


def run(args: argparse.Namespace) -> int:
    """Draw the prompts. Raises UsageError or HartError."""
    draw(prompts_of(args), DrawOptions.of(args))
    return 0

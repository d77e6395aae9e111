"""`hart-infer video`: draw videos from prompts."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

from ..images.video import FPS, MAX_FPS, check_video_path, save_video
from . import options
from .drawing import DrawOptions, Task, add_video_drawing, draw
from .naming import DEFAULT_VIDEO_NAME
from .options import VILA_U
from .prompts import add_prompts, prompts_of

MIN_FPS = 0.1

DETAILS = """\
A VILA-U model draws videos, of 8 frames in the released checkpoint, frame after
frame. The videos' paths go to stdout, one per line, each as soon as it is written."""

EPILOG = f"""\
formats:
  The extension of --out decides: .webp or .gif is an animation, .png all frames
  side by side, .mp4 needs PyAV or imageio (pip install 'hart-infer[video]').
  WebP and PNG carry the metadata that `hart-infer info VIDEO` shows.

Without --out, or in a folder, names are {DEFAULT_VIDEO_NAME}. Names, prompts
files and seeds are else as in `hart-infer generate --help`.

examples:
  hart-infer video "fireworks" -m {VILA_U} -o fireworks.webp
  hart-infer video "waves" "rain" -n 2 -m ./vila-u -o "{{prompt}}-{{seed}}.mp4"
  hart-infer video "a cat" -m ./vila-u -o frames.png --fps 4
"""


def add_parser(commands: options.Commands) -> None:
    """Add the subcommand."""
    parser = options.add_command(
        commands,
        "video",
        usage="PROMPT... -m MODEL [-o OUT] [options]",
        summary="Draw videos from prompts.",
        details=DETAILS,
        epilog=EPILOG,
    )
    parser.set_defaults(run=run)
    add_prompts(parser, "what the video shows, in quotes")
    parser.add_argument(
        "--fps", metavar="N", type=options.number(MIN_FPS, MAX_FPS), default=float(FPS), help=f"frames per second ({FPS})"
    )
    add_video_drawing(parser)


def run(args: argparse.Namespace) -> int:
    """Draw the prompts. Raises UsageError or HartError."""
    task = Task(
        ability="draw videos",
        things="videos",
        default_name=DEFAULT_VIDEO_NAME,
        draw=_draw,
        lacks=frozenset({"size"}),
        check=check_video_path,
        save=partial(save_video, fps=args.fps),
    )
    draw(prompts_of(args), DrawOptions.of(args), task, metadata={"fps": args.fps})
    return 0


def _draw(pipe: Any, prompt: Any, **arguments: Any) -> Sequence[Any]:
    frames: Sequence[Any] = pipe.video(prompt, **arguments).frames
    return frames

"""`hart-infer answer`: ask a model about pictures and videos."""

from __future__ import annotations

import argparse
import os
import secrets
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import HartError, InputError
from ..images.reading import read_image
from ..images.video import check_video, is_video
from ..pipelines.checks import MAX_SEED, check_prompts
from . import options
from .console import StdoutError, UsageError, emit_json, emit_piece, note
from .families import family_of
from .loading import load_pipeline
from .options import VILA_U, MachineOptions, ModelOptions

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..pipelines.vila_u import VilaUPipeline

LOWEST, HIGHEST = 1e-6, 1e6  # temperatures
MAX_TOKENS = 2**20

DETAILS = """\
A VILA-U model answers. What it looks at stands before the QUESTION, in this order:
pictures, video files, folders of frames; or nothing. The answer goes to stdout
while it is drawn."""

EPILOG = f"""\
Of a video or a folder (of pictures, sorted by name) the model sees 8 frames, evenly
chosen. Animated GIF, WebP and PNG are videos too; other files need PyAV or imageio
(pip install 'hart-infer[video]').

The checkpoint says how an answer is drawn, and how long it may get; the released
one draws at temperature 0.6 from the likeliest 0.9.

examples:
  hart-infer answer cat.png "What is this?" -m {VILA_U}
  hart-infer answer before.jpg after.jpg "What has changed?" -m ./vila-u --greedy
  hart-infer answer walk.mp4 "Where does he go?" -m ./vila-u --json
"""


@dataclass(frozen=True)
class AnswerOptions:
    """How an answer is drawn, by the arguments of a call; None: as the checkpoint says."""

    max_new_tokens: int | None
    do_sample: bool | None
    temperature: float | None
    top_p: float | None
    seed: int | None

    @staticmethod
    def of(args: argparse.Namespace) -> AnswerOptions:
        """Read the options, of which some mean that tokens are drawn. Raises UsageError for --greedy beside one of these."""
        flags = {"--temperature": args.temperature, "--top-p": args.top_p, "--seed": args.seed}
        drawing = [flag for flag, value in flags.items() if value is not None]
        if args.greedy and drawing:
            raise UsageError(f"--greedy draws nothing, so {drawing[0]} has no effect; leave one of them out.")
        do_sample = False if args.greedy else True if drawing else None
        return AnswerOptions(args.max_new_tokens, do_sample, args.temperature, args.top_p, args.seed)


def add_parser(commands: options.Commands) -> None:
    """Add the subcommand."""
    parser = options.add_command(
        commands,
        "answer",
        usage="[PICTURE|VIDEO|FOLDER]... QUESTION -m MODEL [options]",
        summary="Answer a question about pictures or a video.",
        details=DETAILS,
        epilog=EPILOG,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "media", metavar="PICTURE", nargs="*", type=options.picture, help="what the question is about; or a video, or a folder"
    )
    parser.add_argument("question", metavar="QUESTION", help="the question, in quotes")
    group = parser.add_argument_group("sampling", "Defaults are the checkpoint's.")
    add = group.add_argument
    add("--max-new-tokens", metavar="N", type=options.whole(1, MAX_TOKENS), help="most tokens of the answer")
    add("--temperature", metavar="X", type=options.number(LOWEST, HIGHEST), help="above 1 more varied, below 1 less")
    add("--top-p", metavar="P", type=options.number(0, 1), help="probability kept, 1 for all")
    add("--greedy", action="store_true", help="take the likeliest token every time")
    add("-s", "--seed", type=options.whole(0, MAX_SEED), help="seed of the draws (default: random)")
    options.add_json(parser, "one JSON object with question, media, answer and seed, once it is whole")
    options.add_vila_u_model(parser)
    options.add_machine(parser)
    options.add_quiet(parser)


def run(args: argparse.Namespace) -> int:
    """Read the pictures, load, answer. Raises UsageError or HartError."""
    asked = AnswerOptions.of(args)
    _check_question(args.question)
    media = [_read(name) for name in args.media]
    model = ModelOptions.of(args)
    family = family_of(model, ability="answer questions")
    pipe: Any = load_pipeline(family, model, MachineOptions.of(args), text_encoder=None, quiet=args.quiet)
    seed = _seed(asked, pipe)
    if seed is not None and asked.seed is None and not args.quiet:
        note(f"seed {seed}")
    pieces = pipe.answer(media or None, args.question, stream=True, **{**asdict(asked), "seed": seed})
    if not args.json:
        _stream(pieces)
        return 0
    emit_json({"question": args.question, "media": args.media, "answer": "".join(pieces), "seed": seed})
    return 0


def _check_question(question: str) -> None:
    """Raise UsageError for a question that is empty, no text, or a file, before which the question is missing."""
    if not question.strip():
        raise UsageError("the question is empty.")
    if os.path.exists(question):
        raise UsageError(
            f"no question: the last argument, {question}, is a file or folder; put a question behind it, in quotes."
        )
    try:
        check_prompts(question, "question")
    except InputError as error:
        raise UsageError(str(error)) from error


def _read(name: str) -> Image | Path:
    """Return a picture, or the path of a video that can be opened. Raises InputError."""
    if not os.path.exists(name):
        raise InputError(f"{name} cannot be read: no such file or directory.")
    if not is_video(name):
        return read_image(name)
    check_video(name)
    return Path(name)


def _seed(asked: AnswerOptions, pipe: VilaUPipeline) -> int | None:
    """Return the seed of the draws, a new one if none was given; None if nothing is drawn."""
    draws = pipe.answers.do_sample if asked.do_sample is None else asked.do_sample
    if not draws:
        return None
    return secrets.randbelow(2**32) if asked.seed is None else asked.seed


def _stream(pieces: Iterable[str]) -> None:
    """Write pieces as they come, and a line break behind the last, even if an error or Ctrl-C ends them."""
    try:
        for piece in pieces:
            emit_piece(piece)
    except (KeyboardInterrupt, HartError) as error:
        if not isinstance(error, StdoutError):
            emit_piece("\n")
        raise
    emit_piece("\n")

"""Options that several subcommands share, their types, and the pipeline they ask for."""

from __future__ import annotations

import argparse
import math
import os
import textwrap
from typing import TYPE_CHECKING, Any, Literal

from ..checkpoints.layouts import EMBEDDED_MODEL, RELEASED_MODEL

if TYPE_CHECKING:
    from ..pipelines.hart import HartPipeline


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of descriptions, and model ids in one piece."""

    def __init__(self, prog: str, **settings: Any) -> None:
        """A wider column for the options than argparse's."""
        super().__init__(prog, **{"max_help_position": 28, **settings})

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)


Commands = Any  # argparse keeps the type of add_subparsers' result private

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def add_command(commands: Commands, name: str, *, usage: str, summary: str, details: str = "", epilog: str = "") -> Any:
    """A subcommand's parser, with the options that every subcommand has."""
    parser = commands.add_parser(
        name,
        help=summary[0].lower() + summary[1:].rstrip("."),
        description=f"{summary}\n\n{details}".strip(),
        epilog=epilog,
        formatter_class=HelpFormatter,
        usage=f"%(prog)s {usage}",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error, and what the library logs")
    return parser


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """--quiet."""
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress and no notes on stderr, only errors")


def add_json(parser: Any, what: str) -> None:
    """--json."""
    parser.add_argument("--json", action="store_true", help=f"print {what}")


def add_model(parser: argparse.ArgumentParser) -> Any:
    """--model and where to find it; returns the group of options."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "-m",
        "--model",
        metavar="PATH|ID",
        help=f"checkpoint folder or Hugging Face id (default: {EMBEDDED_MODEL}, which is in the package)",
    )
    add_source(group)
    return group


def add_source(group: Any) -> None:
    """Options on where a checkpoint comes from and which weights are taken."""
    group.add_argument("--revision", metavar="REV", help="branch, tag or commit of a Hugging Face id")
    group.add_argument("--local-files-only", action="store_true", help="download nothing, use what is on this machine")
    group.add_argument(
        "--no-ema",
        dest="use_ema",
        action="store_false",
        help="the plain weights instead of their running average",
    )


def add_text_encoder(group: Any) -> None:
    """--text-encoder."""
    group.add_argument(
        "--text-encoder",
        metavar="PATH|ID",
        help="text encoder's folder or id (default: the one beside the checkpoint, else the released one)",
    )


def add_machine(parser: argparse.ArgumentParser) -> None:
    """--device and --dtype."""
    group = parser.add_argument_group("machine")
    group.add_argument("--device", metavar="DEVICE", help="cuda, cuda:1, mps or cpu (default: the first there is)")
    group.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        help="number format (default: bf16 on CUDA, else as stored; see doctor)",
    )


def load_pipeline(args: argparse.Namespace, *, text_encoder: str | Literal[False] | None) -> HartPipeline:
    """The pipeline that the options ask for, on its device and in its dtype."""
    from ..pipelines.hart import HartPipeline
    from .console import note
    from .machine import choose

    choice = choose(args.device, args.dtype)
    quiet = getattr(args, "quiet", False)
    is_default = args.model is None
    args.model = args.model or EMBEDDED_MODEL
    if quiet:
        silence_others()
    else:
        note(f"loading {args.model} on {choice.device} in {choice.dtype}")
    pipe = HartPipeline.from_pretrained(
        args.model,
        text_encoder=text_encoder,
        revision=args.revision,
        local_files_only=args.local_files_only,
        use_ema=args.use_ema,
        torch_dtype=choice.torch_dtype,
        device=choice.device,
    )
    if quiet:
        pipe.set_progress_bar_config(disable=True)
    elif is_default:
        note(f"{EMBEDDED_MODEL} knows emoji, in {max(pipe.sizes)} px; for all else, in 1024: -m {RELEASED_MODEL} (a download)")
    return pipe


def public_name(path_or_id: str) -> str:
    """A model's id, or only the name of its folder: where someone keeps it is nobody else's business."""
    if os.path.exists(path_or_id):
        return os.path.basename(os.path.realpath(path_or_id))
    return path_or_id


def positive_int(text: str) -> int:
    """argparse type: an integer from 1."""
    return _integer(text, 1, "a whole number of 1 or more")


def natural_int(text: str) -> int:
    """argparse type: an integer from 0."""
    return _integer(text, 0, "a whole number of 0 or more")


def seed_int(text: str) -> int:
    """argparse type: a seed that every generator takes."""
    from ..pipelines.arguments import MAX_SEED

    value = _integer(text, 0, "a whole number of 0 or more")
    if value > MAX_SEED:
        raise argparse.ArgumentTypeError(f"{text} is too large for a seed (at most {MAX_SEED})")
    return value


def finite_float(text: str) -> float:
    """argparse type: a number that is neither infinite nor NaN."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return value


def probability(text: str) -> float:
    """argparse type: a number from 0 to 1."""
    value = finite_float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def _integer(text: str, least: int, expected: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
    return value


def silence_others() -> None:
    """Progress bars and warnings of the libraries that load the weights."""
    from huggingface_hub.utils.tqdm import disable_progress_bars
    from transformers.utils import logging

    disable_progress_bars()
    logging.set_verbosity_error()
    logging.disable_progress_bar()

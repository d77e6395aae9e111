"""`hart-infer convert`: any checkpoint into one clean folder."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from ..errors import OutputError
from . import options
from .console import UsageError, emit, note

DETAILS = """\
Writes safetensors in the chosen dtype and one model_index.json, without the
buffers and weights that inference never reads. The folder loads back
identically, and faster than the released layout. Its path goes to stdout."""

EPILOG = """\
examples:
  hart-infer convert mit-han-lab/hart-0.7b-1024px ./hart-bf16 --dtype bf16
  hart-infer generate "a cat" -o cat.png --model ./hart-bf16
"""


def add_parser(commands: options.Commands) -> None:
    """Add the subcommand."""
    parser = options.add_command(
        commands,
        "convert",
        usage="SRC DST [options]",
        summary="Write a checkpoint as one clean folder.",
        details=DETAILS,
        epilog=EPILOG,
    )
    parser.set_defaults(run=run)
    parser.add_argument("model", metavar="SRC", help="checkpoint folder or Hugging Face id")
    parser.add_argument("destination", metavar="DST", help="folder to write; must be new or empty")
    parser.add_argument("--dtype", choices=tuple(options.DTYPES), help="number format (default: as stored)")
    parser.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        type=_size,
        default="5GB",
        help="largest file, such as 500MB (default: 5GB)",
    )
    options.add_source(parser)
    group = parser.add_mutually_exclusive_group()
    options.add_text_encoder(group)
    group.add_argument("--no-text-encoder", action="store_true", help="leave the text encoder out")
    options.add_quiet(parser)


def run(args: argparse.Namespace) -> int:
    """Load on the CPU, save."""
    import torch

    from ..pipeline import HartPipeline

    destination = Path(args.destination)
    _check_destination(args.model, destination)
    if args.quiet:
        options.silence_others()
    else:
        note(f"loading {args.model}")
    pipe = HartPipeline.from_pretrained(
        args.model,
        text_encoder=False if args.no_text_encoder else args.text_encoder,
        revision=args.revision,
        local_files_only=args.local_files_only,
        use_ema=args.use_ema,
        torch_dtype=getattr(torch, options.DTYPES[args.dtype]) if args.dtype else None,
        device="cpu",
    )
    if not args.quiet:
        note(f"writing {destination}")
    pipe.save_pretrained(destination, max_shard_size=args.max_shard_size)
    emit(str(destination))
    return 0


def _check_destination(source: str, destination: Path) -> None:
    """Refuse, before anything is loaded, a destination that can't or shouldn't be written."""
    if os.path.exists(source) and destination.exists() and os.path.samefile(source, destination):
        raise UsageError("SRC and DST are the same folder.")
    try:
        if destination.exists() and any(destination.iterdir()):
            raise OutputError(f"{destination} is not empty; give a new folder, or empty this one.")
    except NotADirectoryError as error:
        raise OutputError(f"{destination} is a file, not a folder.") from error
    except PermissionError as error:
        raise OutputError(f"{destination} cannot be read: permission denied.") from error
    existing = destination
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise OutputError(f"{destination} cannot be made: {existing} is a file.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise OutputError(f"{destination} cannot be written: permission denied in {existing}.")


def _size(text: str) -> str:
    """argparse type: a number and a unit."""
    if not re.fullmatch(r"[1-9]\d*(\.\d+)?\s*[KMGT]i?B", text, re.IGNORECASE):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500MB or 5GB")
    return text.replace(" ", "").upper().replace("IB", "iB")

"""`hart-infer convert`: write any checkpoint as one clean folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import InputError
from . import options
from .console import UsageError, emit, note
from .families import family_of
from .loading import load_pipeline
from .machine import DTYPES
from .options import MachineOptions, ModelOptions

DETAILS = """\
Writes safetensors in the chosen dtype and one model_index.json, without the
buffers and weights that inference never reads. The folder loads back
identically, and faster than the released layout. Its path goes to stdout."""

EPILOG = """\
examples:
  hart-infer convert mit-han-lab/hart-0.7b-1024px ./hart-bf16 --dtype bf16
  hart-infer generate "a cat" -o cat.png --model ./hart-bf16
  hart-infer convert FoundationVision/var ./var-d16 --variant d16
  hart-infer convert mit-han-lab/vila-u-7b-256 ./vila-u
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
    parser.add_argument("model", metavar="SRC", type=options.named, help="checkpoint folder or Hugging Face id")
    parser.add_argument(
        "destination", metavar="DST", type=options.named, help="folder to write: new, empty, or converted before"
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="number format (default: as stored)")
    parser.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        default="5GB",
        help="largest file, such as 500MB (default: 5GB)",
    )
    options.add_source(parser)
    group = parser.add_mutually_exclusive_group()
    options.add_text_encoder(group)
    group.add_argument("--no-text-encoder", action="store_true", help="HART: leave the text encoder out")
    options.add_quiet(parser)


def run(args: argparse.Namespace) -> int:
    """Load on the CPU and save."""
    convert(
        ModelOptions.of(args),
        Path(args.destination),
        dtype=args.dtype,
        max_shard_size=args.max_shard_size,
        with_text_encoder=not args.no_text_encoder,
        quiet=args.quiet,
    )
    return 0


def convert(
    model: ModelOptions, destination: Path, *, dtype: str | None, max_shard_size: str, with_text_encoder: bool, quiet: bool
) -> None:
    """Check the arguments, load, save, print the path. Raises UsageError or HartError."""
    from ..checkpoints.saving import check_destination, check_shard_size

    try:
        check_shard_size(max_shard_size)
    except InputError as error:
        raise UsageError(f"--max-shard-size: {error}") from error
    check_destination(destination)
    pipe = load_pipeline(
        family_of(model, None if with_text_encoder else {"no_text_encoder"}),
        model,
        MachineOptions(device="cpu", dtype=dtype, threads=None),
        text_encoder=model.text_encoder if with_text_encoder else False,
        quiet=quiet,
    )
    if not quiet:
        note(f"writing {destination}")
    pipe.save_pretrained(destination, max_shard_size=max_shard_size)
    emit(str(destination))

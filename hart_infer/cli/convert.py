"""`hart-infer convert`: any checkpoint into one clean folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import InputError
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
    parser.add_argument("destination", metavar="DST", help="folder to write: new, empty, or converted before")
    parser.add_argument("--dtype", choices=tuple(options.DTYPES), help="number format (default: as stored)")
    parser.add_argument(
        "--max-shard-size",
        metavar="SIZE",
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

    from ..checkpoints.saving import check_destination, check_shard_size
    from ..pipelines.hart import HartPipeline

    destination = Path(args.destination)
    try:
        check_shard_size(args.max_shard_size)
    except InputError as error:
        raise UsageError(f"--max-shard-size: {error}") from error
    check_destination(destination)
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

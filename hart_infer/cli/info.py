"""`hart-infer info`: show what a checkpoint is, or what made a picture; no weights are loaded."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..images.files import FORMATS, read_metadata
from . import options
from .console import emit, emit_json, emit_table
from .families import family_of
from .options import ModelOptions

DETAILS = """\
For a checkpoint: parameters, scales or positions, memory, costs and flags, from
its configuration and its files' headers. Of a Hugging Face id only the
configuration is downloaded; VAR's is read from its weights, which must be on this
machine. For a picture or a video that hart-infer wrote: prompt, seed and settings."""

EPILOG = """\
examples:
  hart-infer info mit-han-lab/hart-0.7b-1024px
  hart-infer info ./hart-bf16 --json
  hart-infer info FoundationVision/var --variant d16
  hart-infer info mit-han-lab/vila-u-7b-256
  hart-infer info cat.png

VILA-U's costs are those of a picture's last position, its prompt not counted:
weights read for all rows together, and the arithmetic of one row (guidance takes
two rows a picture).
"""

KIB, MIB, GIB = 2**10, 2**20, 2**30
GIGA, MEGA = 10**9, 10**6
COUNTED = ("parameters", "schedule", "positions", "memory", "cost_per_position")  # the others are named as in configurations


def add_parser(commands: options.Commands) -> None:
    """Add the subcommand."""
    parser = options.add_command(
        commands,
        "info",
        usage="PATH|ID [options]",
        summary="Show what a checkpoint is, or what made a picture.",
        details=DETAILS,
        epilog=EPILOG,
    )
    parser.set_defaults(run=run)
    parser.add_argument("model", metavar="PATH|ID", type=options.named, help="checkpoint folder, Hugging Face id, or picture")
    options.add_source(parser)
    options.add_json(parser, "everything as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the report, or a picture's metadata. Raises HartError."""
    path = Path(args.model)
    if path.suffix.lower() in FORMATS and not path.is_dir():
        return _show_picture(args.model, as_json=args.json)
    from ..checkpoints.families import inspect_checkpoint
    from ..checkpoints.report import report

    model = ModelOptions.of(args)
    family_of(model)
    found = report(inspect_checkpoint(model.name, use_ema=model.use_ema, variant=model.variant, hub=model.hub))
    if args.json:
        emit_json(found, indent=2)
        return 0
    emit(f"{model.name} ({found['family']})")
    for name, section in found.items():
        if name == "files":
            emit_table(_named(section or {"": "not on this machine"}), title=name)
        elif name != "family":
            rows = _rows if name in COUNTED else _named
            emit_table(rows(section), title=name.replace("_", " "))
    return 0


def _show_picture(name: str, *, as_json: bool) -> int:
    metadata = read_metadata(name)
    if metadata is None:
        raise InputError(f"{name} carries no metadata of hart-infer.")
    if as_json:
        emit_json(metadata, indent=2)
    else:
        emit_table([(name.replace("_", " "), str(value)) for name, value in metadata.items()], title=name)
    return 0


def _named(values: dict[str, Any]) -> list[tuple[str, str]]:
    return [(name, _shown(value)) for name, value in values.items()]


def _rows(values: dict[str, Any]) -> list[tuple[str, str]]:
    return [(name.replace("_", " "), _shown(value)) for name, value in values.items()]


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(_entry(name, item) for name, item in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)


def _entry(name: str, value: Any) -> str:
    words = name.replace("bytes_", "").removesuffix("bytes").removesuffix("flops").strip("_").replace("_", " ")
    shown = _size(value) if "bytes" in name else _flops(value) if name.endswith("flops") else _shown(value)
    return f"{words} {shown}".strip()


def _flops(count: int) -> str:
    return f"{count / GIGA:.2f} GFLOP" if count >= GIGA else f"{count / MEGA:.2f} MFLOP"


def _size(count: int) -> str:
    if count < MIB:
        return f"{count / KIB:.1f} KiB"
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / MIB:.1f} MiB"

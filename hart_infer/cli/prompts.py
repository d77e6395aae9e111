"""Read the prompts of `generate` and `video`: from the command line, from a file, from stdin."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..batch.reading import lines_of
from ..errors import InputError
from ..pipelines.checks import check_prompts
from .console import UsageError


def add_prompts(parser: argparse.ArgumentParser, what: str) -> None:
    """Add PROMPT, which is `what`, and --prompts."""
    parser.add_argument("prompt", metavar="PROMPT", nargs="*", help=what)
    parser.add_argument("--prompts", metavar="FILE", help="more prompts, one per line; - reads stdin")


def prompts_of(args: argparse.Namespace) -> list[str]:
    """Return the prompts of the command line, then those of the file. Raises UsageError or InputError."""
    prompts = [*args.prompt, *(_read(args.prompts) if args.prompts is not None else [])]
    if not prompts:
        raise UsageError("no prompt: give one in quotes, or a file of them with --prompts.")
    try:
        return check_prompts(prompts)
    except InputError as error:
        raise UsageError(str(error)) from error


def _read(name: str) -> list[str]:
    shown = "stdin" if name == "-" else name
    if name == "-" and sys.stdin is None:
        raise InputError("stdin cannot be read: it is closed.")
    try:
        content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise InputError(f"{shown} cannot be read: {(error.strerror or str(error)).lower()}.") from error
    prompts = lines_of(content, shown)
    if not prompts:
        raise InputError(f"{shown} holds no prompt.")
    return prompts

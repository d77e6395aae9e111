"""Parse the command line of `hart-infer`, run the subcommand, and return the exit code."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from ..errors import HartError
from ..version import __version__
from . import answer, batch, convert, doctor, edit, generate, info, reconstruct, serve, ui, video
from .console import PROGRAM, StdoutError, UsageError, library_messages, note
from .options import HelpFormatter

DESCRIPTION = """\
Pictures from prompts with HART, and of ImageNet's classes with VAR; pictures,
videos, and answers about both with VILA-U."""

EPILOG = """\
`hart-infer COMMAND --help` tells all about a command.

examples:
  hart-infer generate "a lighthouse in the snow" -o lighthouse.png
  hart-infer generate "golden retriever" --model FoundationVision/var --variant d16
  hart-infer batch prompts.csv --out pictures/
  hart-infer edit photo.png --mask mask.png "a cat" -o edited.png
  hart-infer video "fireworks" --model mit-han-lab/vila-u-7b-256 -o fireworks.webp
  hart-infer answer cat.png "What is this?" --model mit-han-lab/vila-u-7b-256
  hart-infer ui
  hart-infer info ./hart-0.7b-1024px
  hart-infer doctor

Results go to stdout, progress and messages to stderr.

exit codes:
  0    done
  1    something went wrong; a sentence on stderr says what, --debug more
  2    the command line is wrong
  130  interrupted with Ctrl-C; pictures finished before that are kept
  141  the reader of stdout went away
"""

OK, FAILED, USAGE, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 130, 141


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one sentence and a hint, and whose commands take arguments between options."""

    _mixes = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse a command's arguments wherever they stand: `edit IMAGE --mask FILE PROMPT`, which argparse alone refuses.

        After `--`, which argparse loses when it mixes, all must stand together.
        """
        if self._subparsers is not None or self._mixes or "--" in (args or ()):
            return super().parse_known_args(args, namespace)
        self._mixes = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._mixes = False

    def error(self, message: str) -> NoReturn:
        """Report an invalid command line and exit."""
        note(f"{self.prog}: {message}")
        note(f"Try '{self.prog} --help'.")
        self.exit(USAGE)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the whole command; imports nothing heavy."""
    parser = Parser(prog=PROGRAM, description=DESCRIPTION, epilog=EPILOG, formatter_class=HelpFormatter)
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for module in (generate, batch, edit, video, answer, reconstruct, serve, ui, info, convert, doctor):
        module.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    try:
        code = _run(argv)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except BrokenPipeError:
        _discard_stdout()
        return BROKEN_PIPE
    except KeyboardInterrupt:
        note(f"{PROGRAM}: interrupted")
        return INTERRUPTED


def _run(argv: Sequence[str] | None) -> int:
    parser = build_parser()
    try:
        args = parser.parse_args(argv)
    except SystemExit as stop:  # --help, --version, or a usage error
        return stop.code if isinstance(stop.code, int) else OK
    debug, quiet = args.debug, getattr(args, "quiet", False)
    try:
        with library_messages(quiet=quiet, debug=debug):
            code: int = args.run(args)
        return code
    except (UsageError, HartError) as error:
        if isinstance(error, StdoutError):
            _discard_stdout()
        if debug and sys.stderr is not None:  # else it would go to stdout
            traceback.print_exc()
        usage = isinstance(error, UsageError)
        program = f"{PROGRAM} {args.command}"
        note(f"{program}: {error}")
        if usage:
            note(f"Try '{program} --help'.")
        return USAGE if usage else FAILED


def _discard_stdout() -> None:
    """Redirect stdout to the null device, so that the interpreter's flush at exit raises nothing."""
    if sys.stdout is None:
        return
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)

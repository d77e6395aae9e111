"""Parse the command line of `hart-infer`, run the subcommand, and return the exit code."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from ..errors import HartError
from ..version import __version__
from . import convert, doctor, generate, info, reconstruct
from .console import PROGRAM, StdoutError, UsageError, library_messages, note
from .options import HelpFormatter

DESCRIPTION = "Pictures from prompts with HART, the hybrid autoregressive transformer."

EPILOG = """\
`hart-infer COMMAND --help` tells all about a command.

examples:
  hart-infer generate "a lighthouse in the snow" -o lighthouse.png
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
    """An ArgumentParser whose errors are one sentence and a hint instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        """Report an invalid command line and exit."""
        self.exit(USAGE, f"{self.prog}: {message}\nTry '{self.prog} --help'.\n")


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the whole command; imports nothing heavy."""
    parser = Parser(prog=PROGRAM, description=DESCRIPTION, epilog=EPILOG, formatter_class=HelpFormatter)
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for module in (generate, reconstruct, info, convert, doctor):
        module.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    try:
        code = _run(argv)
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
        if debug:
            traceback.print_exc()
        usage = isinstance(error, UsageError)
        program = f"{PROGRAM} {args.command}"
        hint = f"\nTry '{program} --help'." if usage else ""
        note(f"{program}: {error}{hint}")
        return USAGE if usage else FAILED


def _discard_stdout() -> None:
    """Redirect stdout to the null device, so that the interpreter's flush at exit raises nothing."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)

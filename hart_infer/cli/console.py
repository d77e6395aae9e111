"""Write results to stdout and everything else to stderr."""

from __future__ import annotations

import json
import logging
import sys
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from ..errors import OutputError

PROGRAM = "hart-infer"
JOINERS = "\u200c\u200d"


class UsageError(Exception):
    """Invalid command line; exit code 2."""


class StdoutError(OutputError):
    """stdout can't be written."""


def emit(line: str) -> None:
    """Write one result line to stdout and flush it, so that a pipe gets it while the command runs."""
    _to_stdout(escaped(line, keep="\t"))


def emit_piece(text: str) -> None:
    """Write a piece of a text that may have several lines to stdout, and flush it."""
    _to_stdout(escaped(text, keep="\t\n"), end="")


def emit_json(values: Any, *, indent: int | None = None) -> None:
    """Write one JSON value to stdout."""
    _to_stdout(json.dumps(values, indent=indent))


def emit_table(rows: Iterable[tuple[str, str]], *, title: str | None = None) -> None:
    """Write a title and aligned name-value rows to stdout, one line each."""
    rows = [(escaped(name), escaped(value)) for name, value in rows]
    width = max((len(name) for name, _ in rows), default=0)
    if title:
        emit(title)
    for name, value in rows:
        emit(f"  {name:<{width}}  {value}".rstrip())


def note(line: str) -> None:
    """Write one line of a message to stderr."""
    _to_stderr(escaped(line, keep="\t"))


def escaped(text: str, *, keep: str = "") -> str:
    """Escape what steers a terminal or breaks a line, except the characters of `keep`.

    That is Unicode's control, format (of which some reverse the order of what follows) and line separating characters. The two
    joiners, which emoji and Persian are written with, stay.
    """
    return "".join(c.encode("unicode_escape").decode() if _steers(c) and c not in keep else c for c in text)


def _steers(character: str) -> bool:
    return character not in JOINERS and unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp")


def _to_stdout(text: str, end: str = "\n") -> None:
    """Write text and `end`. Raises StdoutError, BrokenPipeError."""
    if sys.stdout is None:  # closed before Python began
        raise StdoutError("standard output cannot be written: it is closed.")
    try:
        _write(sys.stdout, text + end)
    except BrokenPipeError:
        raise
    except OSError as error:  # a full disk behind a redirection, say
        raise StdoutError(f"standard output cannot be written: {(error.strerror or str(error)).lower()}.") from error


def _to_stderr(text: str) -> None:
    """Write text and a line break, if stderr can be written."""
    if sys.stderr is not None:
        with suppress(OSError):
            _write(sys.stderr, text + "\n")


def _write(stream: TextIO, text: str) -> None:
    """Write text and flush; escape what the encoding lacks."""
    encoding = stream.encoding or "utf-8"
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
    stream.flush()


@contextmanager
def library_messages(*, quiet: bool, debug: bool) -> Iterator[None]:
    """Show what the library logs on stderr: warnings, with `quiet` only errors, with `debug` everything."""
    logger = logging.getLogger("hart_infer")
    before = logger.level, logger.propagate
    handler = _Handler()
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if debug else logging.ERROR if quiet else logging.WARNING)
    logger.propagate = False
    try:
        with warnings.catch_warnings():
            if quiet:
                warnings.simplefilter("ignore")
            else:
                warnings.showwarning = _show_warning
            yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    """Print UserWarnings as one line, drop others, such as deprecations."""
    if category is UserWarning:
        note(f"{PROGRAM}: warning: {message}")


class _Handler(logging.Handler):
    """Writes one line that names the program and the level in lower case; a traceback follows if the record has one."""

    def emit(self, record: logging.LogRecord) -> None:
        note(f"{PROGRAM}: {record.levelname.lower()}: {record.getMessage()}")
        if record.exc_info:
            _to_stderr(escaped(logging.Formatter().formatException(record.exc_info), keep="\t\n"))

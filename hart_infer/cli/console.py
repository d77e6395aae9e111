"""Write results to stdout and everything else to stderr."""

from __future__ import annotations

import json
import logging
import sys
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from ..errors import OutputError

PROGRAM = "hart-infer"


class UsageError(Exception):
    """Invalid command line; exit code 2."""


class StdoutError(OutputError):
    """stdout can't be written."""


def emit(line: str) -> None:
    """Write one result line to stdout and flush it, so that a pipe gets it while the command runs."""
    _write(sys.stdout, line)


def emit_json(values: Any, *, indent: int | None = None) -> None:
    """Write one JSON value to stdout."""
    emit(json.dumps(values, indent=indent))


def emit_table(rows: Iterable[tuple[str, str]], *, title: str | None = None) -> None:
    """Write a title and aligned name-value rows to stdout."""
    rows = list(rows)
    width = max((len(name) for name, _ in rows), default=0)
    if title:
        emit(title)
    for name, value in rows:
        emit(f"  {name:<{width}}  {value}".rstrip())


def note(line: str) -> None:
    """Write one line of a message to stderr."""
    _write(sys.stderr, line)


def _write(stream: TextIO, line: str) -> None:
    """Write a line; escape control characters and what the encoding lacks. Raises StdoutError, BrokenPipeError."""
    encoding = stream.encoding or "utf-8"
    plain = "".join(c if c in "\t\n" or unicodedata.category(c) != "Cc" else c.encode("unicode_escape").decode() for c in line)
    try:
        stream.write(plain.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        stream.flush()
    except BrokenPipeError:
        raise
    except OSError as error:  # a full disk behind a redirection, say
        if stream is sys.stdout:
            raise StdoutError(f"standard output cannot be written: {(error.strerror or str(error)).lower()}.") from error


@contextmanager
def library_messages(*, quiet: bool, debug: bool) -> Iterator[None]:
    """Show what the library logs on stderr: warnings, with `quiet` only errors, with `debug` everything."""
    logger = logging.getLogger("hart_infer")
    before = logger.level, logger.propagate
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter())
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


class _Formatter(logging.Formatter):
    """One line that names the program and the level in lower case; a traceback follows if the record has one."""

    def __init__(self) -> None:
        super().__init__(f"{PROGRAM}: %(levelname)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        return super().formatMessage(logging.makeLogRecord(record.__dict__ | {"levelname": record.levelname.lower()}))

"""Read the file of a batch: lines of text, CSV, JSONL or Parquet, on disk or in an object store."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from ..errors import InputError
from ..pipelines.checks import check_seeds, shown
from .rows import COLUMNS, SUBJECTS, Row, make_rows
from .storage import read_file

Found = tuple[str, Mapping[str, Any] | InputError]  # where a row is, and what it holds by column, or what is wrong


@dataclass(frozen=True)
class Table:
    """The rows of a file, and the columns that mean nothing here."""

    rows: list[Row]
    ignored: tuple[str, ...]


def read_table(path: str, base_seed: int = 0) -> Table:
    """Read all rows of .txt, .csv, .jsonl or .parquet; one that can't be drawn has an `error`.

    Raises InputError for a file that can't be read, holds no row, or is a table without a column of prompts.
    """
    suffix = PurePosixPath(path).suffix.lower()
    if suffix not in READERS:
        raise InputError(f"{path} must end in {', '.join(READERS)}, which say how its rows are written.")
    check_seeds(base_seed, 1)
    columns, found = READERS[suffix](read_file(path), path)
    if not set(SUBJECTS) & set(columns) and suffix != ".jsonl":
        raise InputError(f"{path} has no column prompt (or label, for a model of classes); it has {_listed(columns)}.")
    rows = make_rows(found, base_seed)
    if not rows:
        raise InputError(f"{path} holds no row.")
    return Table(rows, tuple(name for name in columns if name not in COLUMNS))


def lines_of(content: bytes, name: str) -> list[str]:
    """Return the prompts of a text file, one a line; empty lines and those that begin with # are skipped.

    Raises InputError for what is not UTF-8.
    """
    return [line for _, line in _lines(content, name) if not line.startswith("#")]


def _lines(content: bytes, name: str) -> Iterator[tuple[int, str]]:
    """Yield the number and the text of every line that is not empty."""
    lines = _text(content, name).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield number, line.strip()


def _text(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 text (byte {error.start}).") from error


def _from_text(content: bytes, name: str) -> tuple[list[str], Iterable[Found]]:
    lines = [(number, line) for number, line in _lines(content, name) if not line.startswith("#")]
    return ["prompt"], ((f"line {number}", {"prompt": line}) for number, line in lines)


def _from_csv(content: bytes, name: str) -> tuple[list[str], Iterable[Found]]:
    table = csv.reader(io.StringIO(_text(content, name), newline=""))
    try:
        header = [column.strip() for column in next(table, [])]
    except csv.Error as error:
        raise InputError(f"{name} is not CSV ({error}).") from error

    def rows() -> Iterator[Found]:
        while True:
            try:
                cells = next(table)
            except StopIteration:
                return
            except csv.Error as error:
                yield f"line {table.line_num}", InputError(f"it is not CSV ({error}).")
                continue
            if len(cells) > len(header):
                yield f"line {table.line_num}", InputError(f"it has {len(cells)} cells for {len(header)} columns.")
            elif any(cells):
                yield f"line {table.line_num}", _chosen(zip(header, cells, strict=False))

    return header, rows()


def _from_jsonl(content: bytes, name: str) -> tuple[list[str], Iterable[Found]]:
    columns: dict[str, None] = {}
    found: list[Found] = []
    for number, line in _lines(content, name):
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            values = None
        if isinstance(values, dict):
            columns |= dict.fromkeys(values)
            found.append((f"line {number}", _chosen(values.items())))
        else:
            found.append((f"line {number}", InputError("it is not a JSON object.")))
    return list(columns), found


def _from_parquet(content: bytes, name: str) -> tuple[list[str], Iterable[Found]]:
    from .manifest import import_pyarrow

    import_pyarrow()
    from pyarrow import ArrowException, BufferReader, parquet

    try:
        file = parquet.ParquetFile(BufferReader(content))
        columns = list(file.schema_arrow.names)
        values = file.read([column for column in columns if column in COLUMNS], use_threads=False).to_pylist()
    except (ArrowException, OSError) as error:
        raise InputError(f"{name} is not a Parquet file that can be read ({shown(str(error))}).") from error
    return columns, ((f"row {number}", row) for number, row in enumerate(values, 1))


def _chosen(cells: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    return {column: value for column, value in cells if column in COLUMNS}


def _listed(columns: list[str]) -> str:
    return ", ".join(shown(column) for column in columns[:10]) or "no columns"


READERS: dict[str, Callable[[bytes, str], tuple[list[str], Iterable[Found]]]] = {
    ".txt": _from_text,
    ".csv": _from_csv,
    ".jsonl": _from_jsonl,
    ".parquet": _from_parquet,
}

"""The manifest: one line per row of the input, as Parquet; a part per finished chunk, put together at the end of a run."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

from ..errors import InputError
from .storage import Storage
from .writers import SHARDS, SHEETS

MANIFEST = "manifest.parquet"
SHEETS_KEY = b"hart_infer.sheets"  # of its metadata: a JSON list of the sheets that are complete
PARTS = "manifest"  # folder
READ_TOGETHER = 256  # parts
OWN = re.compile(r"\d{6,}-[0-9a-f]{8}\.(tar|png)")  # names of shards and sheets, which are those of chunks
TYPES = {  # of Arrow
    "id": "string",
    "prompt": "string",
    "seed": "uint64",
    "file": "string",
    "sha256": "string",
    "model": "string",
    "settings": "string",
    "seconds": "float64",
    "error": "string",
}


@dataclass(frozen=True)
class Record:
    """What became of a row: a picture in `file`, or an `error`."""

    id: str
    prompt: str | None = None
    seed: int | None = None
    file: str | None = None  # relative to the run's folder; in a shard as shards/NAME.tar/NAME.png
    sha256: str | None = None  # of the PNG file
    model: str | None = None
    settings: str | None = None  # JSON object: the call's arguments, which weights, device, dtype and software
    seconds: float | None = None  # the row's share of the time that its batch took to draw
    error: str | None = None


def import_pyarrow() -> ModuleType:
    """Return pyarrow. Raises InputError where it is not installed."""
    try:
        import pyarrow
    except ImportError as error:
        raise InputError("batch needs pyarrow: pip install 'hart-infer[batch]'.") from error
    return pyarrow


def write_part(storage: Storage, name: str, records: Sequence[Record]) -> None:
    """Write a part, which makes its rows finished."""
    _write(storage, f"{PARTS}/{name}.parquet", _table(records))


def finished_prompts(storage: Storage) -> dict[str, str | None]:
    """Return the prompts of rows that have a picture, by id."""
    table = _read(storage, [MANIFEST, *storage.names(PARTS)], ["id", "prompt", "error"])
    lines = zip(*(table.column(name).to_pylist() for name in table.column_names), strict=True)
    return {row_id: prompt for row_id, prompt, error in lines if error is None}


def compact(storage: Storage, order: Sequence[str]) -> None:
    """Put all parts into one file, one line per id, and remove a chunk's shards and sheets that it does not name.

    A picture stands above an error, and among equals the last counts. Lines come in the `order` of ids, then pictures of
    other ids, whose errors are dropped. A kill leaves all parts, or the whole file, or both, which say the same; the rows
    of the shards and sheets that it leaves besides are in others by now.
    """
    parts = storage.names(PARTS)
    table = _read(storage, [MANIFEST, *parts], list(TYPES))
    ids, errors = table.column("id").to_pylist(), table.column("error").to_pylist()
    chosen: dict[str, int] = {}
    for i, (row_id, error) in enumerate(zip(ids, errors, strict=True)):
        if row_id not in chosen or error is None or errors[chosen[row_id]] is not None:
            chosen[row_id] = i
    ordered = [chosen.pop(row_id) for row_id in order if row_id in chosen]
    ordered += [i for i in chosen.values() if errors[i] is None]
    lines, sheets = table.take(ordered), _known_sheets(storage)
    if parts or len(ordered) != len(ids):
        _write(storage, MANIFEST, lines.replace_schema_metadata({SHEETS_KEY: json.dumps(sorted(sheets)).encode()}))
        storage.remove(parts)
    known = sheets | {file.rpartition("/")[0] for file in lines.column("file").to_pylist() if file is not None}
    there = [*storage.names(SHARDS), *storage.names(SHEETS)]
    storage.remove(name for name in there if name not in known and OWN.fullmatch(name.rpartition("/")[2]))


def _known_sheets(storage: Storage) -> set[str]:
    """Return the sheets of parts, and those that the whole manifest names; one that names none, not even none, knows all."""
    known = {name.replace(PARTS, SHEETS, 1).removesuffix(".parquet") + ".png" for name in storage.names(PARTS)}
    sheets = storage.names(SHEETS)
    if sheets and MANIFEST in storage.names(""):
        told = _metadata(storage.read([MANIFEST])[0]).get(SHEETS_KEY)
        known |= set(sheets if told is None else json.loads(told))
    return known & set(sheets)


def _metadata(content: bytes) -> dict[bytes, bytes]:
    pyarrow = import_pyarrow()
    from pyarrow import parquet

    return parquet.read_schema(pyarrow.BufferReader(content)).metadata or {}


def _schema() -> Any:
    pyarrow = import_pyarrow()
    return pyarrow.schema([(name, getattr(pyarrow, kind)()) for name, kind in TYPES.items()])


def _table(records: Sequence[Record]) -> Any:
    return import_pyarrow().Table.from_pylist([asdict(record) for record in records], schema=_schema())


def _write(storage: Storage, name: str, table: Any) -> None:
    import_pyarrow()
    from pyarrow import parquet

    with storage.whole(name) as file:
        parquet.write_table(table, file)


def _read(storage: Storage, names: Sequence[str], columns: list[str]) -> Any:
    """Return the lines of those files that exist. Raises InputError for one that is no manifest."""
    pyarrow = import_pyarrow()
    from pyarrow import parquet

    present = [name for name in names if name != MANIFEST or name in storage.names("")]
    tables = [_schema().empty_table().select(columns)]
    for first in range(0, len(present), READ_TOGETHER):
        some = present[first : first + READ_TOGETHER]
        for name, content in zip(some, storage.read(some), strict=True):
            try:
                # Without threads: one that outlives the read aborts the interpreter's exit (apache/arrow issues 34314, 50482).
                file = parquet.ParquetFile(pyarrow.BufferReader(content))
                tables.append(file.read(columns, use_threads=False).cast(tables[0].schema))
            except (pyarrow.ArrowException, OSError, KeyError, ValueError) as error:
                raise InputError(f"{storage.title}/{name} is not a part of a manifest; move it away.") from error
    return pyarrow.concat_tables(tables)

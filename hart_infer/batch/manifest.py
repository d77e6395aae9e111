"""The manifest: one line per row of the input, as Parquet; a part per finished chunk, put together at the end of a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

from ..errors import InputError
from .storage import Storage

MANIFEST = "manifest.parquet"
PARTS = "manifest"  # folder
READ_TOGETHER = 256  # parts
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
    settings: str | None = None  # JSON object: the call's arguments, the weights, device, dtype and software
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


def finished_ids(storage: Storage) -> set[str]:
    """Return the ids of rows that have a picture."""
    table = _read(storage, [MANIFEST, *storage.names(PARTS)], ["id", "error"])
    ids, errors = table.column("id").to_pylist(), table.column("error").to_pylist()
    return {row_id for row_id, error in zip(ids, errors, strict=True) if error is None}


def compact(storage: Storage, order: Iterable[str]) -> None:
    """Put all parts into one file, one line per id.

    A picture stands above an error, and among equals the last counts. Lines come in the `order` of ids, then those of
    other ids. A kill leaves all parts, or the whole file, or both, which say the same.
    """
    parts = storage.names(PARTS)
    table = _read(storage, [MANIFEST, *parts], list(TYPES))
    ids, errors = table.column("id").to_pylist(), table.column("error").to_pylist()
    chosen: dict[str, int] = {}
    for i, (row_id, error) in enumerate(zip(ids, errors, strict=True)):
        if row_id not in chosen or error is None or errors[chosen[row_id]] is not None:
            chosen[row_id] = i
    ordered = [chosen.pop(row_id) for row_id in order if row_id in chosen]
    ordered += chosen.values()
    if parts or len(ordered) != len(ids):
        _write(storage, MANIFEST, table.take(ordered))
        storage.remove(parts)


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

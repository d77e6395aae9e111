"""Run a batch: find what is still to draw, have it drawn, here or by a pool of workers, and put the manifest together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .claim import claim
from .manifest import Record, compact, finished_prompts, import_pyarrow, write_part
from .plan import Chunk, make_chunks
from .rows import Row
from .storage import Storage, open_storage
from .worker import Done, Worker, WorkerOptions
from .writers import IMAGES, SHARDS, SHEETS

Pool = Callable[[WorkerOptions, Sequence[Chunk]], Iterable[Done]]  # finishes all chunks, and yields as each is finished


@dataclass(frozen=True)
class Progress:
    """Rows of the input: in all, with a picture, and with an error.

    `before`: those that earlier runs drew; `changed`: those of them that have another prompt now.
    """

    total: int
    drawn: int
    failed: int
    before: int
    changed: int = 0

    @property
    def left(self) -> int:
        """Rows that nobody has tried yet in this run."""
        return self.total - self.drawn - self.failed


def run_batch(
    rows: Sequence[Row],
    options: WorkerOptions,
    *,
    chunk_size: int,
    described: Mapping[str, Any],
    pool: Pool | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Draw what has no picture yet, and return how it ended; the manifest then has a line for every row.

    Called again with the same rows, after whatever ended it, it goes on. Rows that have failed are tried again. `described` is
    what all pictures of the folder share, in JSON's types: a folder begun with another is refused. `pool` None draws in this
    process. Raises InputError, also while another run writes into the folder, OutputError, and what loading a model raises.
    """
    import_pyarrow()
    storage = open_storage(options.out)
    with storage.alone():
        claim(storage, described)
        finished = finished_prompts(storage)
        good = [row for row in rows if row.error is None]
        bad = [row for row in rows if row.error is not None]
        before = sum(row.id in finished for row in rows)
        drawn, failed = before, sum(row.id not in finished for row in bad)
        changed = sum(row.id in finished and finished[row.id] != row.prompt for row in good)
        _record(storage, [row for row in bad if row.id not in finished])
        on_progress(Progress(len(rows), drawn, failed, before, changed))
        chunks = make_chunks(good, chunk_size, finished)
        for done in (pool or run_here)(options, chunks) if chunks else ():
            drawn, failed = drawn + done.drawn, failed + done.failed
            on_progress(Progress(len(rows), drawn, failed, before, changed))
        compact(storage, [row.id for row in rows])
        for folder in (IMAGES, SHARDS, SHEETS, ""):
            storage.tidy(folder)
        return Progress(len(rows), drawn, failed, before, changed)


def run_here(options: WorkerOptions, chunks: Sequence[Chunk]) -> Iterator[Done]:
    """Finish the chunks in this process, one after the other."""
    worker = Worker(options)
    for chunk in chunks:
        yield worker.finish(chunk)


def record_deaths(storage: Storage, chunk: Chunk, reason: str) -> Done:
    """Record rows that can't be drawn because their worker dies of them."""
    _write_errors(storage, chunk.name, [(row, reason) for row in chunk.rows])
    return Done(0, len(chunk.rows))


def _record(storage: Storage, bad: Sequence[Row]) -> None:
    """Record rows of the input that say nothing that could be drawn."""
    if bad:
        _write_errors(storage, f"refused-{Chunk(0, tuple(bad)).name}", [(row, row.error or "") for row in bad])


def _write_errors(storage: Storage, name: str, failures: Iterable[tuple[Row, str]]) -> None:
    write_part(storage, name, [Record(row.id, row.prompt, row.seed, error=error) for row, error in failures])

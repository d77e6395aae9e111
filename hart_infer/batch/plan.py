"""Cut the rows into chunks, which are drawn and recorded whole, and a chunk into batches of equal settings."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from .rows import Row, Settings


@dataclass(frozen=True)
class Chunk:
    """Rows that one worker draws, and that are finished together; `deaths`: of workers that had it."""

    index: int
    rows: tuple[Row, ...]
    deaths: int = 0

    @property
    def name(self) -> str:
        """A name that the same rows give again, so that a chunk done twice leaves its files once."""
        ids = "\n".join(row.id for row in self.rows)
        return f"{self.index:06d}-{hashlib.sha256(ids.encode()).hexdigest()[:8]}"

    def batches(self, batch_size: int) -> Iterator[tuple[Row, ...]]:
        """Yield rows of equal settings, at most `batch_size` together."""
        for rows in _grouped(self.rows).values():
            for first in range(0, len(rows), batch_size):
                yield tuple(rows[first : first + batch_size])

    def without(self, ids: Collection[str]) -> Chunk:
        """Return the chunk without rows that are finished."""
        return replace(self, rows=tuple(row for row in self.rows if row.id not in ids))

    def after_death(self) -> Chunk:
        """Return the chunk with one more death counted."""
        return replace(self, deaths=self.deaths + 1)

    def halves(self) -> tuple[Chunk, Chunk]:
        """Return two chunks of half the rows each."""
        middle = len(self.rows) // 2
        return replace(self, rows=self.rows[:middle]), replace(self, rows=self.rows[middle:])


def make_chunks(rows: Sequence[Row], size: int, finished: Collection[str]) -> list[Chunk]:
    """Cut all rows into chunks of `size`, those of equal settings beside each other, and leave out the finished ones.

    The finished ones are left out last: an interrupted run that goes on cuts as it did before.
    """
    ordered = [row for group in _grouped(rows).values() for row in group]
    cut = [Chunk(i, tuple(ordered[first : first + size])) for i, first in enumerate(range(0, len(ordered), size))]
    return [chunk for chunk in (chunk.without(finished) for chunk in cut) if chunk.rows]


def _grouped(rows: Sequence[Row]) -> dict[Settings, list[Row]]:
    """Return the rows by their settings, in the order of their first."""
    groups: dict[Settings, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.settings, []).append(row)
    return groups

"""A model's queue: rows of equal settings are drawn together, in the order in which they came."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Hashable
from dataclasses import dataclass, replace

from ..errors import InputError
from .jobs import (
    AskJob,
    BusyError,
    DeadlineError,
    DrawJob,
    Job,
    RowFailedError,
    Ticket,
    TooLargeError,
    UnavailableError,
)
from .metrics import EngineMetrics
from .protocol import (
    Ask,
    Draw,
    Drop,
    Facts,
    Failed,
    Finished,
    FromWorker,
    Outcome,
    Piece,
    Preview,
    Reconstruct,
    Row,
    RowId,
    Work,
)
from .supervisor import Process, Supervisor, WorkerDiedError

LOG = logging.getLogger(__name__)
MAX_RETRY_AFTER = 60  # seconds
DIED = "The worker that was drawing this has died; another one starts. Send the request again."


@dataclass(frozen=True)
class Limits:
    """How much is drawn together, and how long things may take; in rows and seconds."""

    max_batch: int = 8
    max_wait: float = 0.01  # of a row, for others to be drawn with
    max_queue: int = 256
    max_queue_bytes: int = 2**29  # of given pictures
    deadline: float = 300.0  # of a job
    patience: float = 300.0  # with a worker that goes on drawing what nobody waits for


@dataclass(frozen=True)
class Waiting:
    """A row in the queue."""

    id: RowId
    ticket: Ticket
    key: Hashable  # of what may be drawn together
    since: float  # time.monotonic()
    work: Work  # for this row alone


class Scheduler:
    """An Engine: a queue before a supervised worker."""

    def __init__(self, name: str, supervisor: Supervisor, limits: Limits, metrics: EngineMetrics) -> None:
        self.name = name
        self._supervisor, self._limits, self._metrics = supervisor, limits, metrics
        self._queue: dict[RowId, Waiting] = {}  # in the order in which they came
        self._running: dict[RowId, Waiting] = {}  # rows at the worker that somebody waits for
        self._process: Process | None = None  # that has the running rows
        self._tickets: dict[Ticket, asyncio.TimerHandle] = {}
        self._held: dict[Ticket, int] = {}  # bytes of given pictures
        self._batches = 0
        self._changed = asyncio.Event()
        self._closed: str | None = None
        self._row_seconds = 1.0  # of late

    @property
    def facts(self) -> Facts | None:
        """What is known of the model."""
        return self._supervisor.facts

    @property
    def is_ready(self) -> bool:
        """Whether a worker is there and jobs are taken."""
        return self._supervisor.is_ready and self._closed is None

    @property
    def is_idle(self) -> bool:
        """Whether no job is open."""
        return not self._tickets

    async def loaded(self) -> Facts:
        """Wait until the model is loaded for the first time; return what is known of it."""
        return await self._supervisor.loaded()

    def submit(self, job: Job) -> Ticket:
        """Queue a job. Raises BusyError, UnavailableError, TooLargeError; InputError for more than may ever wait."""
        if self._closed is not None:
            raise UnavailableError(self._closed)
        self._check_size(job)
        if len(self._queue) + job.count > self._limits.max_queue:
            waiting = f"{len(self._queue)} pictures wait already, and at most {self._limits.max_queue} may"
            raise BusyError(f"{waiting}; try again later.", self.retry_after())
        if sum(self._held.values()) + job.size > self._limits.max_queue_bytes:
            raise BusyError("Too many given pictures wait already; try again later.", self.retry_after())
        ticket = Ticket(job.count, self._left)
        self._queue |= {row.id: row for row in _rows(ticket, job)}
        loop = asyncio.get_running_loop()
        self._tickets[ticket] = loop.call_later(self._limits.deadline, self._expire, ticket)
        self._held |= {ticket: job.size} if job.size else {}
        self._metrics.queued.set(len(self._queue))
        self._changed.set()
        return ticket

    def _check_size(self, job: Job) -> None:
        """Refuse a job that would not be taken by an empty queue either."""
        if job.count > self._limits.max_queue:
            raise InputError(f"At most {self._limits.max_queue} pictures may wait here, so {job.count} at once are too many.")
        if job.size > self._limits.max_queue_bytes:
            limit = f"{self._limits.max_queue_bytes:,} bytes that may wait here"
            raise TooLargeError(f"The given pictures have {job.size:,} bytes of pixels, more than the {limit}.")

    def retry_after(self) -> int:
        """Return in how many seconds there will be room, by the pace of late."""
        seconds = self._row_seconds * len(self._queue)
        return max(1, min(MAX_RETRY_AFTER, math.ceil(seconds)))

    def close(self, reason: str) -> None:
        """Take no more jobs, and let nobody wait for the model; jobs that are open go on."""
        self._closed = reason
        self._supervisor.give_up(reason)
        self._changed.set()

    def abandon(self, reason: str) -> None:
        """Take no more jobs, and end those that are open."""
        self.close(reason)
        for ticket in list(self._tickets):
            ticket.fail(UnavailableError(reason))

    async def run(self) -> None:
        """Draw what is queued, batch by batch, for ever."""
        while True:
            self._process = await self._supervisor.ready()
            batch = await self._next_batch()
            if self._process.died.is_set():  # while we waited; the rows are still in the queue
                continue
            for row in batch:
                del self._queue[row.id]
                self._metrics.waited.observe(time.monotonic() - row.since)
            self._metrics.queued.set(len(self._queue))
            self._metrics.batch_rows.observe(len(batch))
            self._running = {row.id: row for row in batch}
            try:
                await self._draw(self._process, _message(batch), len(batch))
            except WorkerDiedError:
                for row in list(self._running.values()):
                    row.ticket.fail(UnavailableError(DIED))
            self._running = {}
            self._batches += 1

    async def _next_batch(self) -> list[Waiting]:
        """Return the rows to draw next, as soon as there are enough or the first has waited long enough."""
        while True:
            self._changed.clear()
            rows = self._mates()
            waits = self._limits.max_wait - (time.monotonic() - rows[0].since) if rows else None
            if waits is not None and (waits <= 0 or len(rows) >= self._limits.max_batch or not isinstance(rows[0].work, Draw)):
                return rows
            try:
                await asyncio.wait_for(self._changed.wait(), waits)
            except asyncio.TimeoutError:
                continue

    def _mates(self) -> list[Waiting]:
        """Return the row that has waited longest and those that may be drawn with it."""
        found: list[Waiting] = []
        for row in self._queue.values():
            if not found or row.key == found[0].key:
                found.append(row)
                if len(found) == self._limits.max_batch:
                    break
        return found

    async def _draw(self, process: Process, message: Work, count: int) -> None:
        """Have a batch drawn, and hand out what comes back. Raises WorkerDiedError."""
        process.send(message)
        while not isinstance(event := await process.receive(), Finished):
            self._hand_out(event)
        self._metrics.batch_seconds.observe(event.seconds)
        self._row_seconds += (event.seconds / count - self._row_seconds) / 4

    def _hand_out(self, event: FromWorker) -> None:
        """Give a row's ticket what the worker says of it, if somebody waits for it still."""
        if not isinstance(event, Preview | Piece | Outcome) or event.row not in self._running:
            return
        ticket = self._running[event.row].ticket
        if isinstance(event, Outcome):
            del self._running[event.row]
        if isinstance(event, Failed):
            self._metrics.failed.inc()
            ticket.fail(RowFailedError(event))
            return
        if isinstance(event, Outcome):
            self._metrics.drawn.inc()
        ticket.put(event)

    def _expire(self, ticket: Ticket) -> None:
        seconds = self._limits.deadline
        ticket.fail(DeadlineError(f"The request was not finished within {seconds:g} seconds, and is given up."))

    def _left(self, ticket: Ticket) -> None:
        """Forget a ticket that is closed: drop its rows from the queue, and tell the worker of those that are drawn."""
        self._tickets.pop(ticket).cancel()
        self._held.pop(ticket, None)
        queued = [row for row in ticket.rows if self._queue.pop(row, None) is not None]
        running = [row for row in ticket.rows if self._running.pop(row, None) is not None]
        self._metrics.dropped.inc(len(queued) + len(running))
        if queued:
            self._metrics.queued.set(len(self._queue))
            self._changed.set()
        if running and self._process is not None:
            self._process.send(Drop(tuple(running)))
            if not self._running:
                loop = asyncio.get_running_loop()
                loop.call_later(self._limits.patience, self._lose_patience, self._process, self._batches)

    def _lose_patience(self, process: Process, batch: int) -> None:
        """Kill a worker that still draws a batch which nobody waits for."""
        if self._batches == batch:
            LOG.error("a worker goes on drawing what nobody waits for, and is killed", extra={"pid": process.pid})
            process.kill()


def _rows(ticket: Ticket, job: Job) -> list[Waiting]:
    """Return a job's rows. What is no picture to draw is done alone: it shares its key with nothing."""
    now = time.monotonic()
    if isinstance(job, DrawJob):
        rows = [Row(row, job.prompt, seed, job.previews) for row, seed in zip(ticket.rows, job.seeds, strict=True)]
        return [Waiting(row.id, ticket, job.settings, now, Draw((row,), job.settings, job.given)) for row in rows]
    (alone,) = ticket.rows
    work = Ask(alone, job.question, job.history, job.options) if isinstance(job, AskJob) else Reconstruct(alone, job.picture)
    return [Waiting(alone, ticket, alone, now, work)]


def _message(batch: list[Waiting]) -> Work:
    """Return what the worker is told to do of rows that are done together."""
    first = batch[0].work
    if not isinstance(first, Draw):
        return first
    return replace(first, rows=tuple(row for each in batch if isinstance(each.work, Draw) for row in each.work.rows))

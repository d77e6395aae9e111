"""What a client asks of an engine, and the stream of what comes back."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

from ..errors import HartError
from .protocol import Answered, Drawn, Facts, Failed, Given, Options, Picture, Piece, Preview, Rebuilt, RowId, Settings

Event = Preview | Drawn | Piece | Rebuilt
MAX_UNSENT = 2**24  # bytes of a job's previews that wait for its client; beyond them only each row's newest is kept
_numbers = itertools.count(1)


class JobError(HartError):
    """A job ends without its result."""


class RowFailedError(JobError):
    """The worker could not draw or answer; `failed` says whose fault it is."""

    def __init__(self, failed: Failed) -> None:
        super().__init__(failed.message)
        self.failed = failed


class BusyError(JobError):
    """The queue is full; try again after so many seconds."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class TooLargeError(JobError):
    """The job's given pictures are larger than all that may wait."""


class UnavailableError(JobError):
    """There is no worker for this job: it died, is not there yet, or the server is ending."""


class DeadlineError(JobError):
    """The job took longer than it may."""


@dataclass(frozen=True)
class DrawJob:
    """Pictures of one prompt, a seed each; with `given`, of what is painted anew of it."""

    prompt: str
    seeds: tuple[int, ...]
    settings: Settings
    previews: int = 0
    given: Given | None = None

    @property
    def count(self) -> int:
        """How many pictures it asks for."""
        return len(self.seeds)

    @property
    def size(self) -> int:
        """Bytes of its given picture."""
        return 0 if self.given is None else len(self.given.picture.pixels) + len(self.given.mask.pixels)


@dataclass(frozen=True)
class AskJob:
    """A question after a conversation; questions are texts and pictures as they follow each other."""

    question: tuple[str | Picture, ...]
    history: tuple[tuple[tuple[str | Picture, ...], str], ...] = ()
    options: Options = ()
    count: ClassVar[int] = 1

    @property
    def size(self) -> int:
        """Bytes of its given pictures."""
        parts = [*self.question, *(part for question, _ in self.history for part in question)]
        return sum(len(part.pixels) for part in parts if isinstance(part, Picture))


@dataclass(frozen=True)
class ReconstructJob:
    """A picture to send through the tokenizer and back."""

    picture: Picture
    count: ClassVar[int] = 1

    @property
    def size(self) -> int:
        """Bytes of the picture."""
        return len(self.picture.pixels)


Job = DrawJob | AskJob | ReconstructJob


class Engine(Protocol):
    """What draws and answers with one model."""

    @property
    def name(self) -> str:
        """The model's name."""
        ...

    @property
    def facts(self) -> Facts | None:
        """What is known of the model; None until it is loaded for the first time."""
        ...

    @property
    def is_ready(self) -> bool:
        """Whether a worker is there and jobs are taken."""
        ...

    async def loaded(self) -> Facts:
        """Wait until the model is loaded for the first time; return what is known of it."""
        ...

    def submit(self, job: Job) -> Ticket:
        """Queue a job. Raises BusyError, UnavailableError, TooLargeError; InputError for more than may ever wait."""
        ...


class Ticket:
    """A job in an engine: iterate over its events, which end when all is done, or raise JobError. Leave early by `cancel`."""

    def __init__(self, count: int, leave: Callable[[Ticket], None]) -> None:
        """`count`: rows of the job; `leave` is called once, when nobody waits for the job any more."""
        self.number = next(_numbers)
        self.rows = [RowId(self.number, place) for place in range(count)]
        self._missing = set(self.rows)
        self._leave: Callable[[Ticket], None] | None = leave
        self._events: deque[Event | JobError | None] = deque()
        self._has_events = asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Yield the events. Raises JobError."""
        while (event := await self._next()) is not None:
            if isinstance(event, JobError):
                raise event
            yield event

    @property
    def is_open(self) -> bool:
        """Whether something is still to come."""
        return self._leave is not None

    def put(self, event: Preview | Piece | Drawn | Answered | Rebuilt) -> None:
        """Take what the worker says of one of the rows; the last row's result ends the stream."""
        if not self.is_open:
            return
        if not isinstance(event, Answered):
            self._add(event)
        if isinstance(event, Preview):
            self._thin()
        if isinstance(event, Drawn | Answered | Rebuilt):
            self._missing.discard(event.row)
            if not self._missing:
                self._close(None)

    def fail(self, error: JobError) -> None:
        """End the stream with an error."""
        if self.is_open:
            self._close(error)

    def cancel(self) -> None:
        """Leave: the rows that are not finished are dropped. Does nothing to a job that has ended."""
        if self.is_open:
            self._close(None)

    async def _next(self) -> Event | JobError | None:
        await self._has_events.wait()
        event = self._events.popleft()
        if not self._events:
            self._has_events.clear()
        return event

    def _add(self, event: Event | JobError | None) -> None:
        self._events.append(event)
        self._has_events.set()

    def _thin(self) -> None:
        """Drop all but the newest preview of each row, where the client takes them too slowly."""
        previews = [event for event in self._events if isinstance(event, Preview)]
        if sum(len(event.picture.pixels) for event in previews) > MAX_UNSENT:
            newest = {event.row: event for event in previews}
            self._events = deque(each for each in self._events if not isinstance(each, Preview) or newest[each.row] is each)

    def _close(self, error: JobError | None) -> None:
        self._add(error)
        if self._leave is not None:
            leave, self._leave = self._leave, None
            leave(self)

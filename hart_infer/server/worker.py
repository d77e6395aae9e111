"""The worker's process: it owns a pipeline, draws what it is sent, and ends with the server."""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

from ..errors import HartError
from . import drawing
from .model import Model
from .protocol import Ask, Draw, Drop, Finished, FromWorker, LoadFailed, Ready, RowId, Stop, ToWorker, Work


class Inbox:
    """Receives in a thread of its own, so that a Drop arrives while the model draws."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._jobs: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._dropped: set[RowId] = set()
        threading.Thread(target=self._receive, name="inbox", daemon=True).start()

    def __iter__(self) -> Iterator[Work]:
        """Yield the jobs; end after Stop."""
        while (job := self._jobs.get()) is not None:
            yield job

    def is_dropped(self, row: RowId) -> bool:
        """Return whether nobody waits for a row any more."""
        return row in self._dropped

    def forget(self) -> None:
        """Forget who left, when a job is finished: the next one is sent only when the server knows that."""
        self._dropped.clear()

    def _receive(self) -> None:
        while True:
            try:
                message: ToWorker = self._connection.recv()
            except (EOFError, OSError):
                os._exit(1)  # the server is gone, and nobody else wants what is being drawn
            if isinstance(message, Drop):
                self._dropped.update(message.rows)
            else:
                self._jobs.put(None if isinstance(message, Stop) else message)


def main(connection: Connection, load: Callable[[], Model]) -> None:
    """Load the model, then draw until the server says Stop or is gone. `load` must be a function that a new process can import.

    Ends with an exception where the device has failed for good: only a new process can draw then.
    """
    for name in (signal.SIGINT, signal.SIGTERM):  # sent to all processes of a terminal or a service; the server decides
        signal.signal(name, signal.SIG_IGN)
    inbox = Inbox(connection)

    def send(message: FromWorker) -> None:
        try:
            connection.send(message)
        except OSError:
            os._exit(1)  # as in Inbox

    try:
        model = load()
    except HartError as error:
        return send(LoadFailed(str(error)))
    send(Ready(model.facts()))
    for job in inbox:
        start = time.perf_counter()
        if isinstance(job, Draw):
            drawing.draw(model, job, send, inbox.is_dropped)
        elif isinstance(job, Ask):
            drawing.answer(model, job, send, inbox.is_dropped)
        else:
            drawing.reconstruct(model, job, send)
        inbox.forget()
        send(Finished(time.perf_counter() - start))

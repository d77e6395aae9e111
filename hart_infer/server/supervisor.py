"""Start a worker's process, talk to it, and start another when it dies."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import queue
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

from . import worker
from .jobs import UnavailableError
from .metrics import EngineMetrics
from .model import Model
from .protocol import Facts, FromWorker, LoadFailed, Ready, Stop, ToWorker

LOG = logging.getLogger(__name__)
MAX_PAUSE = 30.0  # seconds between two starts of a worker that dies at once
LIVED_LONG = 60.0  # seconds after which a death counts as the first
NOT_LOADED = "The model could not be loaded, and the server is ending."
Load = Callable[[], Model]


class WorkerDiedError(Exception):
    """The process has ended."""


class Process:
    """One worker's process. Made in a running event loop, which gets its messages."""

    def __init__(self, load: Load) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=worker.main, args=(theirs, load), name="hart-infer-worker", daemon=True)
        self._process.start()
        theirs.close()
        self.died = asyncio.Event()
        self._inbox: asyncio.Queue[FromWorker | None] = asyncio.Queue()
        self._outbox: queue.SimpleQueue[ToWorker | None] = queue.SimpleQueue()
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._receive, args=(loop, self._connection), name="from-worker", daemon=True).start()
        threading.Thread(target=self._send, args=(self._connection,), name="to-worker", daemon=True).start()

    @property
    def pid(self) -> int | None:
        """The process's number."""
        return self._process.pid

    async def receive(self) -> FromWorker:
        """Return the next message. Raises WorkerDiedError after the last."""
        message = await self._inbox.get()
        if message is None:
            self._inbox.put_nowait(None)
            raise WorkerDiedError
        return message

    def send(self, message: ToWorker) -> None:
        """Send a message; one to a dead worker is lost."""
        self._outbox.put(message)

    async def stop(self, seconds: float) -> None:
        """Ask the process to end, and kill it if it has not after so long."""
        self.send(Stop())
        try:
            await asyncio.wait_for(self.died.wait(), seconds)
        except asyncio.TimeoutError:  # another class before Python 3.11
            self.kill()
            await self.died.wait()

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()

    def _receive(self, loop: asyncio.AbstractEventLoop, connection: Connection) -> None:
        while True:
            try:
                message: FromWorker = connection.recv()
            except (EOFError, OSError):
                break
            _call(loop, self._inbox.put_nowait, message)
        self._process.join()
        self._outbox.put(None)
        connection.close()
        _call(loop, self.died.set)
        _call(loop, self._inbox.put_nowait, None)

    def _send(self, connection: Connection) -> None:
        while (message := self._outbox.get()) is not None:
            try:
                connection.send(message)
            except (OSError, ValueError):  # it has died, or is closed
                return


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: object) -> None:
    """Call a function in a loop's thread, if the loop still runs."""
    try:
        loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:
        return


class LoadError(Exception):
    """The first worker could not load the model, and a second one could not either."""


class Supervisor:
    """Keeps a worker alive."""

    def __init__(self, load: Load, metrics: EngineMetrics) -> None:
        self.facts: Facts | None = None
        self._load, self._metrics = load, metrics
        self._process: Process | None = None
        self._starting: Process | None = None
        self._is_ready = asyncio.Event()
        self._is_settled = asyncio.Event()  # the model is loaded for the first time, or nobody should wait for that
        self._given_up = ""

    @property
    def is_ready(self) -> bool:
        """Whether a worker has loaded the model and lives."""
        return self._is_ready.is_set()

    async def loaded(self) -> Facts:
        """Wait until a first worker has loaded the model; return what it says of it. Raises UnavailableError if none will."""
        if self.facts is None:
            await self._is_settled.wait()
        if self.facts is None:
            raise UnavailableError(self._given_up)
        return self.facts

    def give_up(self, reason: str) -> None:
        """Let nobody wait any longer for a first worker."""
        self._given_up = reason
        self._is_settled.set()

    async def ready(self) -> Process:
        """Return a worker that has loaded the model, as soon as there is one."""
        while True:
            await self._is_ready.wait()
            if self._process is not None and not self._process.died.is_set():
                return self._process
            await asyncio.sleep(0)

    async def run(self) -> None:
        """Start workers, one after the other. Raises LoadError where the first can't load the model."""
        pause = 0.0
        while True:
            started = time.monotonic()
            self._starting = process = Process(self._load)
            try:
                await self._live(process)
            except LoadError:
                self.give_up(NOT_LOADED)
                raise
            finally:
                self._is_ready.clear()
                self._process = None
            pause = 0.0 if time.monotonic() - started > LIVED_LONG else min(MAX_PAUSE, 2 * pause or 0.5)
            LOG.error("a worker died; another one starts", extra={"pause": pause})
            self._metrics.restarts.inc()
            await asyncio.sleep(pause)

    async def stop(self, seconds: float) -> None:
        """End the worker, at once or after so long."""
        if self._starting is not None:
            await self._starting.stop(seconds)

    async def _live(self, process: Process) -> None:
        """Return when a process has died."""
        try:
            message = await process.receive()
        except WorkerDiedError:
            if self.facts is None:
                raise LoadError("The worker died while it loaded the model; its last messages say why.") from None
            return
        if isinstance(message, LoadFailed):
            if self.facts is None:
                raise LoadError(message.message)
            LOG.error("a worker could not load the model", extra={"reason": message.message})
        elif isinstance(message, Ready):
            self.facts, self._process = message.facts, process
            self._is_ready.set()
            self._is_settled.set()
            LOG.info("ready", extra={"model": message.facts.name, "device": message.facts.device, "pid": process.pid})
        await process.died.wait()

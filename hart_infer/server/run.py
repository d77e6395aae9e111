"""Run a server: bind its port, start its workers, and end in order."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import anyio
import uvicorn
from fastapi import FastAPI

from ..errors import ConfigError, HartError
from . import log
from .app import Background, create_app
from .keys import Allowance, Keys
from .metrics import EngineMetrics, Metrics
from .pictures import PictureStore
from .scheduler import Scheduler
from .service import Service
from .settings import ServerSettings
from .supervisor import Load, LoadError, Supervisor

LOG = logging.getLogger(__name__)
BACKLOG = 2048
ENDING = "The server is ending; send the request to another, or again later."
STOP_SECONDS = 5.0  # for a worker to end by itself
GRACE_SECONDS = 10.0  # beyond the drain, to send the last answers
IDLE_SECONDS = 75  # an open connection may wait for its next request: longer than httpx (5) and load balancers (60) do
POLL_SECONDS = 0.05


class LoadFailedError(HartError):
    """A model could not be loaded when the server started."""


class Server:
    """Models behind a port."""

    def __init__(self, loads: Mapping[str, Load], settings: ServerSettings, *, page: bool = False) -> None:
        """`loads` load the models in their workers, by name; `page` puts the web page at /. Raises ConfigError, OutputError."""
        self.settings = settings
        metrics = Metrics()
        self._supervisors = {name: Supervisor(load, EngineMetrics(metrics, name)) for name, load in loads.items()}
        self._schedulers = {
            name: Scheduler(name, supervisor, settings.limits, EngineMetrics(metrics, name))
            for name, supervisor in self._supervisors.items()
        }
        keys = None if settings.keys is None else Keys.read(settings.keys)
        store = None if settings.keep is None else PictureStore(settings.keep)
        allowance = Allowance(0 if keys is None else settings.rate)
        service = Service(settings, self._schedulers, metrics, keys, store, allowance)
        background: list[Background] = [partial(self._supervise, each) for each in self._supervisors.values()]
        background += [each.run for each in self._schedulers.values()]
        self._failure: LoadFailedError | None = None
        self._uvicorn = _Uvicorn(create_app(service, *background, page=page), settings, self.drain)

    def run(self, listening: socket.socket, announce: Callable[[str], object] = lambda address: None) -> None:
        """Serve until SIGTERM or Ctrl-C, then finish what is open. `announce` gets the address. Raises LoadFailedError."""
        log.set_up()
        host, port = listening.getsockname()[:2]
        announce(f"http://{f'[{host}]' if ':' in host else host}:{port}/v1")
        with _handled((signal.SIGTERM, signal.SIGINT)):
            self._uvicorn.run(sockets=[listening])
        if self._failure is not None:
            raise self._failure

    async def drain(self) -> None:
        """Take no more jobs, let those that are open finish for a while, then end them."""
        schedulers = self._schedulers.values()
        for scheduler in schedulers:
            scheduler.close(ENDING)
        LOG.info("draining", extra={"seconds": self.settings.drain})
        try:
            with anyio.move_on_after(self.settings.drain):
                while not all(scheduler.is_idle for scheduler in schedulers):
                    await asyncio.sleep(POLL_SECONDS)
        finally:
            for scheduler in schedulers:
                scheduler.abandon(ENDING)

    async def _supervise(self, supervisor: Supervisor) -> None:
        """Keep a model's worker alive; end the server where the first can't load the model."""
        try:
            await supervisor.run()
        except LoadError as error:
            self._failure = LoadFailedError(str(error))
            self._uvicorn.should_exit = True
        finally:
            await supervisor.stop(STOP_SECONDS)


class _Uvicorn(uvicorn.Server):
    """Uvicorn's server, which drains before it ends."""

    def __init__(self, app: FastAPI, settings: ServerSettings, drain: Callable[[], Coroutine[Any, Any, None]]) -> None:
        config = uvicorn.Config(
            app,
            access_log=False,
            log_config=None,
            backlog=BACKLOG,
            server_header=False,
            timeout_keep_alive=IDLE_SECONDS,
            timeout_graceful_shutdown=round(settings.drain + GRACE_SECONDS),
        )
        super().__init__(config)
        self._drain = drain

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the port; wait for what is open, for a while."""
        draining = asyncio.create_task(self._drain())
        watching = asyncio.create_task(self._cancel_when_forced(draining))
        await super().shutdown(sockets)
        await asyncio.wait([draining])
        watching.cancel()
        if not draining.cancelled():
            draining.result()
        if self.force_exit:  # Uvicorn leaves this out then
            await self.lifespan.shutdown()

    async def _cancel_when_forced(self, draining: asyncio.Task[None]) -> None:
        """Wait for a second signal, and end the draining."""
        while not self.force_exit:
            await asyncio.sleep(POLL_SECONDS)
        draining.cancel()


@contextmanager
def _handled(signals: Iterable[signal.Signals]) -> Iterator[None]:
    """Do nothing on signals that Uvicorn raises again after it has ended by them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {each: signal.signal(each, lambda number, frame: None) for each in signals}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 takes a free one. Raises ConfigError."""
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with ExitStack() as opened:
            listening = opened.enter_context(socket.socket(family, kind, protocol))
            if os.name == "posix":  # on Windows it would let two servers share a port
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(where)
            listening.listen(BACKLOG)
            opened.pop_all()
    except UnicodeError as error:
        raise ConfigError(f"Port {port} of {host} can't be opened: {host} is not the name of a host.") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"Port {port} of {host} is taken by another program; stop it, or take another --port.") from error
        raise ConfigError(f"Port {port} of {host} can't be opened: {(error.strerror or str(error)).lower()}.") from error
    return listening

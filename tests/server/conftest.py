"""Servers to talk to: in this process, and in one of their own."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")  # by `make newest` and `make oldest`

SECONDS = 180  # for a server to start, on a busy machine
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Running:
    """A server's process; its output is read as it comes, for a full pipe would stop it."""

    def __init__(self, *command: str) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HART_INFER_SERVE")}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, **pipes)
        self.log: list[str] = []
        self._lines: dict[str, queue.SimpleQueue[str]] = {name: queue.SimpleQueue() for name in ("stdout", "stderr")}
        for name in self._lines:
            threading.Thread(target=self._read, args=(name,), daemon=True).start()

    def _read(self, stream: str) -> None:
        for line in getattr(self.process, stream):
            self.log.append(line)
            self._lines[stream].put(line)

    def line(self, stream: str) -> str:
        """The next line of a stream."""
        try:
            return self._lines[stream].get(timeout=SECONDS)
        except queue.Empty:
            raise AssertionError("".join(self.log)) from None

    def end(self, number: int = signal.SIGTERM, seconds: float = 20) -> tuple[int, str]:
        """Send a signal, 0 for none; return the exit status and all that was written."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        status = self.process.wait(timeout=seconds)
        return status, "".join(self.log)


@contextmanager
def stand_in(**settings: object) -> Iterator[tuple[str, Running]]:
    """Serve the stand-in; yield the address, without /v1, and the process."""
    running = Running("-m", "tests.server.stand_in", *(f"{name}={value}" for name, value in settings.items()))
    try:
        address = running.line("stdout").strip()
        assert address.endswith("/v1"), running.end()
        yield address.removesuffix("/v1"), running
    finally:
        running.end(signal.SIGKILL)


@pytest.fixture(scope="session")
def mini_address() -> Iterator[str]:
    """The address of a server of hart-mini and of the page, with /v1."""
    running = Running("-m", "hart_infer", "serve", "--ui", "--port", "0")
    try:
        address = running.line("stderr").split(" at ")[1].split(",")[0]
        yield address
    finally:
        running.end(signal.SIGKILL)

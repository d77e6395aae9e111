"""Servers to talk to: in this process, and in one of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")  # by `make newest` and `make oldest`

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Running:
    """A server's process."""

    def __init__(self, *command: str) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HART_INFER_SERVE")}
        self.process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.log: list[str] = []

    def line(self, stream: str) -> str:
        line = getattr(self.process, stream).readline()
        self.log.append(line)
        return line

    def end(self, number: int = signal.SIGTERM, seconds: float = 20) -> tuple[int, str]:
        """Send a signal; return the exit status and what is left of stderr."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=seconds)
        return self.process.returncode, "".join(self.log) + errors


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
    """The address of a server of hart-mini, with /v1."""
    running = Running("-m", "hart_infer", "serve", "--port", "0")
    try:
        address = running.line("stderr").split(" at ")[1].split(",")[0]
        yield address
    finally:
        running.end(signal.SIGKILL)

"""Wait for a job as long as its client does, and stream its events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import TypeVar

from fastapi import Request
from sse_starlette import EventSourceResponse, ServerSentEvent

from .problems import CLIENT_LEFT, ApiError

T = TypeVar("T")
SEND_TIMEOUT = 60.0  # seconds for a client to take an event
GRACE_SECONDS = 5.0  # beyond the drain, for the last event


async def unless_left(request: Request, work: Awaitable[T]) -> T:
    """Return what `work` returns; cancel it and raise ApiError when the client leaves."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watcher = asyncio.ensure_future(work), asyncio.ensure_future(watch())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(CLIENT_LEFT, "The client has left.", code="client_left")
        return task.result()
    finally:
        watcher.cancel()
        task.cancel()


def event_stream(events: AsyncIterator[ServerSentEvent], drain: float) -> EventSourceResponse:
    """Return the answer that sends events; when the server ends it goes on for `drain` seconds."""
    grace = drain + GRACE_SECONDS
    return EventSourceResponse(events, send_timeout=SEND_TIMEOUT, shutdown_grace_period=grace)

"""What every request passes: its id, its key, its limits, and its line in the log."""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable

import anyio
from sse_starlette.sse import SendTimeoutError
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .log import origin
from .problems import CLIENT_LEFT, ApiError
from .service import Service
from .settings import is_loopback

LOG = logging.getLogger(__name__)
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
BODY_SECONDS = 60.0  # for a request's body to arrive
ANYONE = "anyone"  # the caller's name where no keys are asked for
OWN_SITES = (None, "same-origin", "none")  # Sec-Fetch-Site of programs, of the page, and of an address typed in


_MISTAKE = ApiError(500, "The server has made a mistake; its log says more.", code="internal_error")


class Gate:
    """Lets requests through to an app."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        scope["caller"] = ANYONE
        start, status = time.perf_counter(), 0

        async def marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            self._check_host(headers)
            self._check_key(scope, headers)
            limited = _limited(receive, headers, self._service.settings.max_body)
            await self._app(scope, limited, marked)
        except ApiError as error:
            await error.response(scope, receive, marked)
        except (ClientDisconnect, SendTimeoutError):
            raise
        except Exception as error:
            noted = {"id": request_id, "reason": type(error).__name__, "traceback": origin(error)}
            LOG.error("a request failed", extra=noted)  # without what the exception says, which may quote the request
            if status:
                status = 500
                raise  # breaks off what has been sent of the answer
            await _MISTAKE.response(scope, receive, marked)
        finally:
            self._note(scope, request_id, status or CLIENT_LEFT, time.perf_counter() - start)

    def _check_host(self, headers: Headers) -> None:
        """Keep web pages from using a local server, under a name of theirs (DNS rebinding) or across sites. Raises ApiError."""
        if not self._service.settings.is_local:
            return
        host = headers.get("host", "").lower()
        if not _is_local(host):
            raise ApiError(403, f"This server is for localhost alone, not for {host[:100]!r}.", code="wrong_host")
        if headers.get("sec-fetch-site") not in OWN_SITES:
            raise ApiError(403, "This server is not for pages of other sites.", code="cross_site")

    def _check_key(self, scope: Scope, headers: Headers) -> None:
        """Find the caller's name. Raises ApiError for a wrong key, and for none where one is needed."""
        keys = self._service.keys
        if keys is None or not needs_key(scope["path"]):
            return
        kind, _, key = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not key:
            raise ApiError(401, "Send an API key: Authorization: Bearer KEY.", code="missing_api_key")
        name = keys.name_of(key.strip())
        if name is None:
            raise ApiError(401, "The API key is wrong.", code="invalid_api_key")
        scope["caller"] = name

    def _note(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        """Count a request, and log it by its route, which has nothing of what the client wrote."""
        path = getattr(scope.get("route"), "path", "other")
        self._service.metrics.requests.labels(path, status).inc()
        self._service.metrics.seconds.labels(path).observe(seconds)
        noted = {"id": request_id, "method": scope["method"][:10], "route": path, "status": status}
        LOG.info("request", extra=noted | {"seconds": round(seconds, 3), "caller": scope["caller"]})


def needs_key(path: str) -> bool:
    """Return whether a path is for callers with a key, where there are keys. Names of kept pictures are secrets themselves."""
    return path == "/metrics" or (path.startswith("/v1/") and not path.startswith("/v1/pictures/"))


def _is_local(host: str) -> bool:
    """Return whether a Host header names this machine: localhost, or a loopback address."""
    found = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([^:]+))(?::\d+)?", host)
    return found is not None and is_loopback(found[1] or found[2])


def _limited(receive: Receive, headers: Headers, limit: int) -> Callable[[], Awaitable[Message]]:
    """Return a `receive` that raises ApiError for a body that is too large, or that takes too long to arrive."""
    too_large = ApiError(413, f"The request is larger than the {limit:,} bytes that are taken.", code="too_large")
    length = headers.get("content-length", "")
    if length.isdigit() and (len(length) > 18 or int(length) > limit):
        raise too_large
    deadline = anyio.current_time() + BODY_SECONDS
    size, is_complete = 0, False

    async def limited() -> Message:
        nonlocal size, is_complete
        if is_complete:
            return await receive()
        try:
            with anyio.fail_after(deadline - anyio.current_time()):
                message = await receive()
        except TimeoutError:
            raise ApiError(408, "The request's body did not arrive in time.", code="timeout") from None
        size += len(message.get("body", b""))
        is_complete = not message.get("more_body", False)
        if size > limit:
            raise too_large
        return message

    return limited

"""Put the parts of a server together into one ASGI app."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI
from starlette.formparsers import MultiPartParser
from starlette.routing import Match, Mount
from starlette.types import Scope

from ..version import __version__
from .gate import Gate, needs_key
from .page import Page
from .problems import add_handlers
from .routes import chat, images, reconstructions, status
from .service import Service

Background = Callable[[], Coroutine[Any, Any, None]]


def create_app(service: Service, *background: Background, page: bool = False) -> FastAPI:
    """Return the app; `background` runs beside it, and `page` puts the web page at /."""
    app = FastAPI(
        title="hart-infer",
        version=__version__,
        description="Pictures by OpenAI's API, drawn by HART, VAR and VILA-U.",
        docs_url=None,  # those pages load scripts from elsewhere
        redoc_url=None,
        lifespan=_beside(background),
    )
    app.state.service = service
    MultiPartParser.spool_max_size = service.settings.max_body  # what is uploaded stays in memory, which the limit bounds
    for router in (images.router, reconstructions.router, chat.router, status.router):
        app.include_router(router)
    if page:
        app.router.routes.append(_PageMount("/", Page(), name="page"))
    add_handlers(app)
    app.add_middleware(Gate, service=service)
    _describe(app, has_keys=service.keys is not None)
    return app


class _PageMount(Mount):
    """The page at /, which leaves what is wrong with a request for the API to the API."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Match all but paths of the API."""
        return (Match.NONE, {}) if scope["path"].startswith("/v1/") else super().matches(scope)


def _beside(background: tuple[Background, ...]) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(run()) for run in background]
        yield
        for task in tasks:
            task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError):
                await task

    return lifespan


def _describe(app: FastAPI, *, has_keys: bool) -> None:
    """Say in the app's OpenAPI which paths want a key, and that what is invalid gets 400, not FastAPI's usual 422."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = make()
            if has_keys:
                schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            for path, methods in schema["paths"].items():
                for method in methods.values():
                    method["responses"].pop("422", None)
                    if has_keys and needs_key(path):
                        method["security"] = [{"key": []}]
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]

"""What all routes share: the models, the settings, and what a request may ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

import anyio
from fastapi import Depends, Request

from ..errors import HartError, InputError
from ..pipelines.checks import check_prompts
from .jobs import Engine, Job, Ticket, TooLargeError
from .keys import Allowance, Keys
from .metrics import Metrics
from .pictures import PictureStore
from .problems import RETRY_SOON, ApiError
from .protocol import Facts
from .settings import ServerSettings


@dataclass(frozen=True)
class Service:
    """The parts of a server."""

    settings: ServerSettings
    engines: Mapping[str, Engine]  # by name; the first is the default
    metrics: Metrics = field(default_factory=Metrics)
    keys: Keys | None = None
    store: PictureStore | None = None
    allowance: Allowance = field(default_factory=lambda: Allowance(0))

    async def engine(self, model: str | None) -> tuple[Engine, Facts]:
        """Return the model that a request names, the first for None, and what it can do, once it is loaded. Raises ApiError."""
        name = next(iter(self.engines)) if model is None else model
        if name not in self.engines:
            told = f"There is no model {name[:100]!r} here; there is {', '.join(self.engines)}."
            raise ApiError(404, told, code="model_not_found", param="model")
        engine = self.engines[name]
        with anyio.move_on_after(self.settings.timeout):
            return engine, await engine.loaded()
        raise ApiError(503, f"{name} is still being loaded; try again later.", code="loading", retry_after=RETRY_SOON)

    def check_text(self, text: str, name: str) -> str:
        """Return a prompt that is not too long. Raises InputError."""
        if len(text) > self.settings.max_prompt:
            raise InputError(f"{name} has {len(text):,} characters; at most {self.settings.max_prompt:,} are taken.")
        try:
            return check_prompts(text)[0]
        except InputError as error:
            raise InputError(str(error).replace("prompt[0]", name)) from None

    def take(self, caller: str, count: int) -> None:
        """Take `count` pictures of a caller's allowance. Raises ApiError."""
        seconds = self.allowance.take(caller, count)
        if seconds > 0:
            told = f"This key may ask for {self.allowance.rate} pictures a minute; try again later."
            raise ApiError(429, told, code="rate_limit_exceeded", retry_after=int(seconds) + 1)

    def submit(self, engine: Engine, job: Job, caller: str) -> Ticket:
        """Queue a job whose pictures `take` took; give them back if it is refused. Raises HartError, ApiError."""
        try:
            return engine.submit(job)
        except HartError as error:
            self.allowance.take(caller, -job.count)
            if isinstance(error, TooLargeError):
                raise ApiError(413, str(error), code="too_large") from None
            raise


def service_of(request: Request) -> Service:
    """Return the service of a request's app."""
    service: Service = request.app.state.service
    return service


def caller_of(request: Request) -> str:
    """Return the name of the key that a request came with."""
    caller: str = request.scope["caller"]
    return caller


TheService = Annotated[Service, Depends(service_of)]
TheCaller = Annotated[str, Depends(caller_of)]

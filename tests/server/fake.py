"""An engine in this process that draws at once, and the client of an app before it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2

from hart_infer.server.app import create_app
from hart_infer.server.drawing import sent
from hart_infer.server.jobs import DrawJob, Job, JobError, ReconstructJob, Ticket
from hart_infer.server.keys import Allowance, Keys
from hart_infer.server.pictures import PictureStore
from hart_infer.server.protocol import Answered, Drawn, Facts, Piece, Preview, Rebuilt
from hart_infer.server.service import Service
from hart_infer.server.settings import make_settings
from tests.server import stand_in

MODES = ("discrete", "hybrid")
OPTIONS = frozenset({"guidance_scale", "negative_prompt", "top_k"})


class FakeEngine:
    """Draws what the stand-in draws; `error` instead, where it is set; nothing ever, where `is_stuck`."""

    def __init__(self, name: str = stand_in.NAME, *, edits: bool = True, answers: bool = True) -> None:
        self.name = name
        sizes = (stand_in.SIDE, 2 * stand_in.SIDE)
        self.facts: Facts | None = Facts(
            name, "HART", sizes, OPTIONS, edits, answers, MODES, (), 1.0, stand_in.STEPS, "cpu", "float32"
        )
        self.is_ready = True
        self.is_stuck = False
        self.error: JobError | None = None
        self.fails_after: JobError | None = None  # the first preview
        self.jobs: list[Job] = []
        self.left: list[Ticket] = []

    async def loaded(self) -> Facts:
        assert self.facts is not None
        return self.facts

    def submit(self, job: Job) -> Ticket:
        if self.error is not None:
            raise self.error
        self.jobs.append(job)
        ticket = Ticket(len(job.seeds) if isinstance(job, DrawJob) else 1, self.left.append)
        if self.is_stuck:
            return ticket
        if isinstance(job, ReconstructJob):
            made = tuple((mode, job.picture) for mode in MODES)
            ticket.put(Rebuilt(ticket.rows[0], job.picture, made))
            return ticket
        if not isinstance(job, DrawJob):
            for text in ("It is", " a ", "cat."):
                ticket.put(Piece(ticket.rows[0], text))
            ticket.put(Answered(ticket.rows[0]))
            return ticket
        for row, seed in zip(reversed(ticket.rows), reversed(job.seeds), strict=True):
            for number in range(job.previews):
                ticket.put(Preview(row, number, sent(stand_in.painted((number, 0, 0), job.settings.size))))
            if self.fails_after is not None:
                ticket.fail(self.fails_after)
            ticket.put(Drawn(row, sent(stand_in.picture(job.prompt, seed, job.settings.size))))
        return ticket


@asynccontextmanager
async def client(
    *engines: FakeEngine,
    keys: Keys | None = None,
    keep: Path | None = None,
    rate: int = 0,
    page: bool = False,
    base_url: str = "http://localhost",
    **settings: Any,
) -> AsyncIterator[httpx2.AsyncClient]:
    """Yield a client of an app whose models are these engines."""
    served = {engine.name: engine for engine in engines or (FakeEngine(),)}
    store = None if keep is None else PictureStore(keep)
    service = Service(make_settings(**settings), served, keys=keys, store=store, allowance=Allowance(rate))
    transport = httpx2.ASGITransport(create_app(service, page=page), raise_app_exceptions=False)
    async with httpx2.AsyncClient(transport=transport, base_url=base_url) as made:
        yield made

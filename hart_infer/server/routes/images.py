"""POST /v1/images/generations and /v1/images/edits: pictures at once, or as a stream with previews."""

from __future__ import annotations

import base64
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Literal

from anyio import to_thread
from fastapi import APIRouter, Form, Request
from fastapi.responses import FileResponse, Response
from sse_starlette import JSONServerSentEvent, ServerSentEvent

from ...errors import InputError, OutputError
from ...pipelines.checks import check_int, check_seeds
from ..jobs import DrawJob, Event, JobError, Ticket
from ..model import CLIENT_OPTIONS
from ..pictures import encode, in_turn, read_given
from ..problems import ApiError, as_api_error
from ..protocol import Drawn, Facts, Given, Picture, Preview, Settings
from ..schemas import (
    STREAM,
    EditRequest,
    GenerationRequest,
    ImageData,
    ImageEvent,
    ImagesAnswer,
    PictureRequest,
    Usage,
    documented,
)
from ..service import Service, TheCaller, TheService
from ..streams import event_stream, unless_left
from .bodies import FIELDS_ONCE, JSON_ONLY

LOG = logging.getLogger(__name__)
FRESH_SEEDS = 2**32
router = APIRouter()
ERRORS = documented(400, 401, 404, 408, 413, 429, 500, 503, 504, 507)
Kind = Literal["image_generation", "image_edit"]


@router.post("/v1/images/generations", response_model=ImagesAnswer, responses=ERRORS | STREAM, dependencies=JSON_ONLY)
async def generations(request: Request, body: GenerationRequest, service: TheService, caller: TheCaller) -> Response:
    """Draw pictures of a prompt."""
    return await _draw(request, body, service, caller, "image_generation")


@router.post("/v1/images/edits", response_model=ImagesAnswer, responses=ERRORS | STREAM, dependencies=FIELDS_ONCE)
async def edits(
    request: Request,
    body: Annotated[EditRequest, Form(media_type="multipart/form-data")],
    service: TheService,
    caller: TheCaller,
) -> Response:
    """Paint the transparent parts of a picture, or of its mask, anew."""
    _, facts = await service.engine(body.model)
    if not facts.edits:
        raise ApiError(400, f"{facts.name} does not edit pictures.", code="unsupported", param="model")
    images = [*([body.image] if body.image is not None else []), *body.image_list]
    if len(images) != 1:
        raise ApiError(400, f"Send one image, not {len(images)}.", code="invalid_value", param="image")
    mask = None if body.mask is None else await body.mask.read()
    read = partial(read_given, await images[0].read(), mask, service.settings.max_pixels)
    return await _draw(request, body, service, caller, "image_edit", read)


@router.get("/v1/pictures/{name}", response_class=FileResponse, responses=documented(404))
async def pictures(name: str, service: TheService) -> Response:
    """Send a picture that was kept."""
    path = None if service.store is None else service.store.path(name)
    if path is None:
        raise ApiError(404, "There is no such picture.", code="not_found")
    return FileResponse(path, media_type=f"image/{path.suffix[1:]}")


@dataclass(frozen=True)
class _Answer:
    """What the answer to a request needs beside the pictures."""

    kind: Kind
    body: PictureRequest
    job: DrawJob
    service: Service
    base_url: str

    @property
    def size(self) -> str:
        return f"{self.job.settings.size}x{self.job.settings.size}"

    async def content(self, picture: Picture) -> bytes:
        return await to_thread.run_sync(encode, picture, self.body.encoding)

    async def data(self, event: Drawn) -> ImageData:
        """Return a finished picture as the body has it. Raises ApiError where it can't be kept."""
        content, seed = await self.content(event.picture), self.job.seeds[event.row.place]
        name = await self._kept(content)
        if self.body.response_format == "url":
            return ImageData(url=f"{self.base_url}v1/pictures/{name}", seed=seed)
        return ImageData(b64_json=_base64(content), seed=seed)

    async def event(self, event: Preview | Drawn) -> JSONServerSentEvent:
        """Return a picture as the stream has it."""
        preview = isinstance(event, Preview)
        content = await self.content(event.picture)
        if not preview:
            await self._kept(content)
        name = f"{self.kind}.{'partial_image' if preview else 'completed'}"
        data = ImageEvent(
            type=name,
            b64_json=_base64(content),
            created_at=int(time.time()),
            size=self.size,
            output_format=self.body.encoding.format,
            index=event.row.place,
            seed=self.job.seeds[event.row.place],
            partial_image_index=event.number if isinstance(event, Preview) else None,
            usage=None if preview else Usage(),
        )
        return JSONServerSentEvent(data.model_dump(exclude_none=True), event=name)

    async def _kept(self, content: bytes) -> str | None:
        """Keep a picture if that was asked for, and return its name. Raises ApiError if the client wants its address."""
        if self.service.store is None:
            return None
        try:
            return await to_thread.run_sync(self.service.store.keep, content, self.body.encoding.format)
        except OutputError as error:
            LOG.error("a picture could not be kept", extra={"reason": error.strerror or type(error.__cause__).__name__})
            if self.body.response_format != "url":
                return None
            raise ApiError(
                507, "The picture could not be kept, so it has no address; ask for b64_json.", code="not_kept"
            ) from None


async def _draw(
    request: Request, body: PictureRequest, service: Service, caller: str, kind: Kind, read: Callable[[], Given] | None = None
) -> Response:
    engine, facts = await service.engine(body.model)
    job = _job(body, service, facts)
    service.take(caller, job.count)
    if read is not None:
        given = await in_turn(read)
        job = replace(job, given=given, settings=replace(job.settings, edited=given.digest))
    answer = _Answer(kind, body, job, service, str(request.base_url))
    ticket = service.submit(engine, job, caller)
    try:
        if not body.stream:
            return await unless_left(request, _whole(ticket, answer))
        events = aiter(ticket)
        first = await unless_left(request, anext(events))  # what fails before it still has a status of its own
    except BaseException:
        ticket.cancel()
        raise
    return event_stream(_stream(ticket, first, events, answer), service.settings.drain)


async def _whole(ticket: Ticket, answer: _Answer) -> Response:
    """Wait for all pictures of a ticket."""
    data: dict[int, ImageData] = {}
    async for event in ticket:
        if isinstance(event, Drawn):
            data[event.row.place] = await answer.data(event)
    whole = ImagesAnswer(
        created=int(time.time()),
        data=[data[index] for index in sorted(data)],
        output_format=answer.body.encoding.format,
        size=answer.size,
    )
    return Response(whole.model_dump_json(exclude_none=True), media_type="application/json")


async def _stream(
    ticket: Ticket, first: Event, events: AsyncIterator[Event], answer: _Answer
) -> AsyncIterator[ServerSentEvent]:
    """Yield previews and pictures as they come, and at last an error if there was one."""
    try:
        event: Event | None = first
        while event is not None:
            if isinstance(event, Preview | Drawn):
                yield await answer.event(event)
            event = await anext(events, None)
    except JobError as error:
        yield JSONServerSentEvent({"type": "error", **as_api_error(error).body.model_dump()}, event="error")
    finally:
        ticket.cancel()


def _job(body: PictureRequest, service: Service, facts: Facts) -> DrawJob:
    """Check a request. Raises ApiError and InputError."""
    count = check_int(1 if body.n is None else body.n, "n", 1, service.settings.max_n)
    if body.partial_images and not body.stream:
        raise InputError("partial_images goes with stream: true.")
    if body.stream and body.response_format == "url":
        raise InputError("A stream sends pictures as b64_json, not by url.")
    if body.response_format == "url" and service.store is None:
        raise InputError("This server keeps no pictures, so they have no url; ask for response_format b64_json.")
    if body.output_compression not in (None, 100) and body.encoding.format == "png":
        raise InputError("output_compression is for jpeg and webp; a png is always exact.")
    options = {name: getattr(body, name) for name in CLIENT_OPTIONS if getattr(body, name) is not None}
    for name in options:
        if name not in facts.options:
            raise ApiError(400, f"{facts.name} does not take {name}; leave it out.", code="unsupported_parameter", param=name)
    if body.negative_prompt is not None:
        service.check_text(body.negative_prompt, "negative_prompt")
    first = secrets.randbelow(FRESH_SEEDS) if body.seed is None else check_seeds(body.seed, count)
    return DrawJob(
        prompt=service.check_text(body.prompt, "prompt"),
        seeds=tuple(range(first, first + count)),
        settings=Settings(_side(body.size, facts), tuple(sorted(options.items()))),
        previews=body.partial_images or 0,
    )


def _side(size: str | None, facts: Facts) -> int:
    """Return the side that a size means, by default the largest. Raises InputError."""
    if size is None or size == "auto":
        return max(facts.sizes)
    sizes = {f"{side}x{side}": side for side in sorted(facts.sizes)}
    if size not in sizes:
        raise InputError(f"{facts.name} draws {' or '.join(sizes)}, not {size}.")
    return sizes[size]


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")

"""POST /v1/chat/completions: answers about pictures, for models that give them."""

from __future__ import annotations

import base64
import binascii
import secrets
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from sse_starlette import JSONServerSentEvent, ServerSentEvent

from ...errors import InputError
from ..jobs import AskJob, Event, JobError, Ticket
from ..pictures import Budget, in_turn, read_picture
from ..problems import ApiError, as_api_error
from ..protocol import Picture, Piece
from ..schemas import STREAM, ChatRequest, Message, documented
from ..service import Service, TheCaller, TheService
from ..streams import event_stream, unless_left
from .bodies import JSON_ONLY

router = APIRouter()
Question = tuple[str | Picture, ...]
NO_USAGE = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}  # tokens are not counted here
ANSWERS = STREAM | documented(400, 401, 404, 408, 413, 429, 500, 503, 504)


@router.post("/v1/chat/completions", responses=ANSWERS, dependencies=JSON_ONLY)
async def completions(request: Request, body: ChatRequest, service: TheService, caller: TheCaller) -> Response:
    """Answer the last message of a conversation."""
    engine, facts = await service.engine(body.model)
    if not facts.answers:
        raise ApiError(400, f"{facts.name} draws pictures and answers no questions.", code="unsupported", param="model")
    if body.stream_options is not None and not body.stream:
        raise InputError("stream_options goes with stream: true.")
    service.take(caller, 1)
    job = await in_turn(partial(_job, body, service))
    ticket = service.submit(engine, job, caller)
    try:
        if not body.stream:
            return await unless_left(request, _whole(ticket, facts.name))
        events = aiter(ticket)
        first = await unless_left(request, anext(events, None))
    except BaseException:
        ticket.cancel()
        raise
    has_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    return event_stream(_stream(ticket, first, events, facts.name, has_usage=has_usage), service.settings.drain)


async def _whole(ticket: Ticket, model: str) -> Response:
    text = "".join([event.text async for event in ticket if isinstance(event, Piece)])
    message = {"role": "assistant", "content": text, "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
    return JSONResponse(_answer("chat.completion", model) | {"choices": [choice], "usage": NO_USAGE})


async def _stream(
    ticket: Ticket, first: Event | None, events: AsyncIterator[Event], model: str, *, has_usage: bool
) -> AsyncIterator[ServerSentEvent]:
    """Yield pieces as they come, the usage where it is asked for, and [DONE] or an error."""
    head = _answer("chat.completion.chunk", model) | ({"usage": None} if has_usage else {})

    def chunk(delta: dict[str, str], reason: str | None = None) -> JSONServerSentEvent:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return JSONServerSentEvent(head | {"choices": [choice]})

    try:
        yield chunk({"role": "assistant", "content": ""})
        event = first
        while event is not None:
            if isinstance(event, Piece):
                yield chunk({"content": event.text})
            event = await anext(events, None)
        yield chunk({}, "stop")
        if has_usage:
            yield JSONServerSentEvent(head | {"choices": [], "usage": NO_USAGE})
        yield ServerSentEvent("[DONE]")
    except JobError as error:
        yield JSONServerSentEvent(as_api_error(error).body.model_dump(), event="error")
    finally:
        ticket.cancel()


def _answer(kind: str, model: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": model}


def _job(body: ChatRequest, service: Service) -> AskJob:
    """Check a request and read its pictures. Raises InputError and ApiError."""
    budget = Budget(service.settings.max_pixels)
    history: list[tuple[Question, str]] = []
    question: Question = ()
    for number, message in enumerate(body.messages):
        name = f"messages[{number}]"
        if message.role in ("system", "developer"):
            raise InputError(f"{name}: the model has no {message.role} messages; put it into the user's.")
        parts = _parts(message, name, service, budget)
        if message.role == "user":
            question += parts
        elif not question:
            raise InputError(f"{name}: an assistant's message must follow a user's.")
        elif any(isinstance(part, Picture) for part in parts):
            raise InputError(f"{name}: an assistant's message must be a text.")
        else:
            history.append((question, "".join(part for part in parts if isinstance(part, str))))
            question = ()
    if not question:
        raise InputError("The last message must be a user's.")
    return AskJob(question, tuple(history), _options(body))


def _options(body: ChatRequest) -> tuple[tuple[str, Any], ...]:
    greedy = body.temperature == 0
    given = {
        "do_sample": None if body.temperature is None else not greedy,
        "max_new_tokens": body.max_completion_tokens or body.max_tokens,
        "seed": body.seed,
        "temperature": None if greedy else body.temperature,
        "top_p": body.top_p,
    }
    return tuple((name, value) for name, value in given.items() if value is not None)


def _parts(message: Message, name: str, service: Service, budget: Budget) -> Question:
    if isinstance(message.content, str):
        return (service.check_text(message.content, name),)
    found: list[str | Picture] = []
    for part in message.content:
        if part.type == "text":
            found.append(service.check_text(part.text, name))
        else:
            found.append(read_picture(_data(part.image_url.url, name), name, budget))
    return tuple(found)


def _data(url: str, name: str) -> bytes:
    """Return the content of a data: URL. Raises InputError."""
    head, comma, data = url.partition(",")
    if not head.startswith("data:image/") or not head.endswith(";base64") or not comma:
        raise InputError(f"{name}: send pictures as data:image/png;base64,...; nothing is fetched from elsewhere.")
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error:
        raise InputError(f"{name}: the picture is not valid base64.") from None

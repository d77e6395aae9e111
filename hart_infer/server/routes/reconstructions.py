"""POST /v1/images/reconstructions: a picture through the tokenizer and back, which OpenAI's API does not have."""

from __future__ import annotations

import base64
import time
from functools import partial
from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Form, Request

from ..jobs import ReconstructJob, Ticket, UnavailableError
from ..pictures import Budget, Encoding, encode, in_turn, read_picture
from ..protocol import Picture, Rebuilt
from ..schemas import ReconstructedData, ReconstructionAnswer, ReconstructionRequest, documented
from ..service import TheCaller, TheService
from ..streams import unless_left
from .bodies import FIELDS_ONCE

router = APIRouter()


ANSWERS = documented(400, 401, 404, 408, 413, 429, 500, 503, 504)


@router.post("/v1/images/reconstructions", responses=ANSWERS, dependencies=FIELDS_ONCE)
async def reconstructions(
    request: Request,
    body: Annotated[ReconstructionRequest, Form(media_type="multipart/form-data")],
    service: TheService,
    caller: TheCaller,
) -> ReconstructionAnswer:
    """Encode a picture to tokens and decode them, in every mode of the model's."""
    engine, _ = await service.engine(body.model)
    content = await body.image.read()
    service.take(caller, 1)
    picture = await in_turn(partial(read_picture, content, "image", Budget(service.settings.max_pixels)))
    ticket = service.submit(engine, ReconstructJob(picture), caller)
    try:
        rebuilt = await unless_left(request, _rebuilt(ticket))
    finally:
        ticket.cancel()
    encoding = Encoding(body.output_format or "png")

    async def data(made: Picture) -> str:
        return base64.b64encode(await to_thread.run_sync(encode, made, encoding)).decode("ascii")

    return ReconstructionAnswer(
        created=int(time.time()),
        original=await data(rebuilt.original),
        data=[ReconstructedData(mode=mode, b64_json=await data(made)) for mode, made in rebuilt.modes],
        output_format=encoding.format,
        size=f"{rebuilt.original.width}x{rebuilt.original.height}",
    )


async def _rebuilt(ticket: Ticket) -> Rebuilt:
    async for event in ticket:
        if isinstance(event, Rebuilt):
            return event
    raise UnavailableError("The picture was given up; send it again.")

"""Which models there are, and whether they are ready."""

from __future__ import annotations

import time

from fastapi import APIRouter
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from ..problems import ApiError
from ..schemas import ModelInfo, ModelList, documented
from ..service import Service, TheService

router = APIRouter()
STARTED = int(time.time())


@router.get("/healthz", response_class=PlainTextResponse)
async def healthz() -> str:
    """Say that the server runs."""
    return "ok\n"


@router.get("/readyz", responses={503: {"description": "A model is being loaded, or the server is ending"}})
async def readyz(service: TheService) -> Response:
    """Say of each model whether it takes jobs; 503 unless all do."""
    ready = {name: engine.is_ready for name, engine in service.engines.items()}
    return JSONResponse(ready, 200 if all(ready.values()) else 503)


@router.get("/metrics", responses={200: {"content": {"text/plain": {}}}, **documented(401)})
async def metrics(service: TheService) -> Response:
    """Return what Prometheus reads."""
    return Response(service.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/v1/models", responses=documented(401))
async def models(service: TheService) -> ModelList:
    """List the models."""
    return ModelList(data=[_info(service, name) for name in service.engines])


@router.get("/v1/models/{model:path}", responses=documented(401, 404))
async def model(model: str, service: TheService) -> ModelInfo:
    """Describe a model."""
    if model not in service.engines:
        raise ApiError(404, f"There is no model {model[:100]!r} here.", code="model_not_found", param="model")
    return _info(service, model)


def _info(service: Service, name: str) -> ModelInfo:
    facts = service.engines[name].facts
    if facts is None:
        return ModelInfo(id=name, created=STARTED)
    return ModelInfo(
        id=name,
        created=STARTED,
        family=facts.family,
        sizes=sorted(facts.sizes),
        options=sorted(facts.options),
        edits=facts.edits,
        answers=facts.answers,
        modes=list(facts.modes),
        speeds=list(facts.speeds),
        guidance_scale=facts.guidance_scale,
        num_scales=facts.num_scales,
        max_n=service.settings.max_n,
    )

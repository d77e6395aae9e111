"""Errors as OpenAI's API has them: {"error": {"message", "type", "param", "code"}} and a status."""

from __future__ import annotations

import re
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from ..errors import InputError
from .jobs import BusyError, DeadlineError, JobError, RowFailedError, UnavailableError
from .protocol import Reason

CLIENT_LEFT = 499  # as nginx logs it; nobody sees it
RETRY_SOON = 2  # seconds
STATUS: dict[Reason, tuple[int, str]] = {
    "input": (400, "invalid_value"),
    "refused": (400, "content_policy_violation"),
    "memory": (503, "out_of_memory"),
    "failed": (500, "drawing_failed"),
}


class ErrorBody(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorBody


class ApiError(HTTPException):
    """An answer that is not a success."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None, retry_after: int | None = None
    ) -> None:
        headers = None if retry_after is None else {"Retry-After": str(retry_after)}
        super().__init__(status, message, headers)
        self.code, self.param = code, param

    @property
    def body(self) -> ErrorAnswer:
        """The body to send."""
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status_code, "server_error" if self.status_code >= 500 else "invalid_request_error")
        return ErrorAnswer(error=ErrorBody(message=self.detail, type=kind, param=self.param, code=self.code))

    @property
    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body.model_dump(), self.status_code, self.headers)


def as_api_error(error: InputError | JobError) -> ApiError:
    """Return the answer to what was wrong with a request, or became of its job."""
    message = str(error)
    if isinstance(error, RowFailedError):
        status, code = STATUS[error.failed.reason]
        return ApiError(status, message, code=code, retry_after=RETRY_SOON if status == 503 else None)
    if isinstance(error, BusyError):
        return ApiError(429, message, code="queue_full", retry_after=error.retry_after)
    if isinstance(error, UnavailableError):
        return ApiError(503, message, code="unavailable", retry_after=RETRY_SOON)
    if isinstance(error, DeadlineError):
        return ApiError(504, message, code="deadline_exceeded")
    return ApiError(400, message, code="invalid_value")


def add_handlers(app: FastAPI) -> None:
    """Have an app answer every error in this form."""

    async def known(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, InputError | JobError)
        return as_api_error(error).response

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        if not isinstance(error, ApiError):
            headers = error.headers
            error = ApiError(error.status_code, _plain(request, error))
            error.headers = headers
        return error.response

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return _invalid(error).response

    async def unforeseen(request: Request, error: Exception) -> JSONResponse:
        return ApiError(500, "The server has made a mistake; its log says more.", code="internal_error").response

    for kind in (InputError, JobError):
        app.add_exception_handler(kind, known)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Exception, unforeseen)


def _plain(request: Request, error: HTTPException) -> str:
    path = request.url.path[:100]
    texts = {404: f"There is nothing at {path}.", 405: f"{request.method} is not a method of {path}."}
    return texts.get(error.status_code, f"{str(error.detail).rstrip('.')}.")


def _invalid(error: RequestValidationError) -> ApiError:
    """Say what is wrong with the first wrong field, without repeating what it holds."""
    first: dict[str, Any] = error.errors()[0]
    names = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    param = ".".join(names) or None
    if first["type"] == "json_invalid":
        return ApiError(400, "The body is not valid JSON.", code="invalid_json")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"There is no parameter {param!r} here; leave it out.", code="unknown_parameter", param=param)
    if first["type"] == "missing":
        return ApiError(400, f"The parameter {param or 'body'!r} is missing.", code="missing_parameter", param=param)
    told = re.sub(r"^\w+ should ", "it should ", first["msg"].removeprefix("Value error, ")).rstrip(".")
    wrong = f"The parameter {param!r} is wrong" if param else "The body is wrong"
    return ApiError(400, f"{wrong}: {told}.", code="invalid_value", param=param)

"""What FastAPI lets pass in a request's body, and this API does not."""

from __future__ import annotations

from collections import Counter

from fastapi import Depends, Request

from ..problems import ApiError

LISTS = ("image[]",)  # fields of a form that may come more than once


async def _as_json(request: Request) -> None:
    """Raise ApiError for a body that does not say that it is JSON; other pages can send such bodies without asking."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    is_json = kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))
    if not is_json and await request.body():
        raise ApiError(400, "The body must say that it is JSON: send Content-Type: application/json.", code="invalid_type")


async def _fields_once(request: Request) -> None:
    """Raise ApiError for a form's field that comes twice, of which all but one would be lost."""
    counts = Counter(name for name, _ in (await request.form()).multi_items())
    for name, count in counts.items():
        if count > 1 and name not in LISTS:
            raise ApiError(400, f"Send {name[:100]} once, not {count} times.", code="invalid_value", param=name[:100])


JSON_ONLY = [Depends(_as_json)]
FIELDS_ONCE = [Depends(_fields_once)]

"""The web page: static files, sent so that a browser runs nothing else and other pages can't frame it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fastapi.staticfiles import StaticFiles
from starlette.responses import Response

FOLDER = Path(__file__).with_name("static")
POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob: data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",  # no text becomes HTML
        "trusted-types 'none'",
    ]
)
HEADERS = {
    "Cache-Control": "no-cache",  # asks whether a file has changed, as it does with an upgrade
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Page(StaticFiles):
    """The files of a folder, index.html first."""

    def __init__(self, folder: Path = FOLDER) -> None:
        super().__init__(directory=folder, html=True)

    def file_response(self, full_path: str | os.PathLike[str], *arguments: Any, **named: Any) -> Response:
        """Return a file with its headers."""
        response = super().file_response(full_path, *arguments, **named)
        response.headers.update(HEADERS)
        return response

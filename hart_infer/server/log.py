"""Log lines as JSON objects, one each; what a request says is never among them."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from datetime import datetime, timezone

MAX_CHAIN = 10  # exceptions behind each other
LOGGERS = ("hart_infer", "uvicorn.error", "asyncio")
PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message", "taskName"}


class JsonFormatter(logging.Formatter):
    """Writes time, level, logger, message, the record's extra values, and where an exception comes from.

    What an exception says is left out, for it may quote a request.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return a record's line."""
        time = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        line = {"time": time, "level": record.levelname.lower(), "logger": record.name, "message": record.getMessage()}
        line |= {name: value for name, value in vars(record).items() if name not in PLAIN}
        if record.exc_info and record.exc_info[1] is not None:
            line["traceback"] = origin(record.exc_info[1])
        return json.dumps(line, default=str)


def origin(error: BaseException) -> str:
    """Return the frames and types of an exception and of those behind it."""
    parts: list[str] = []
    behind: BaseException | None = error
    while behind is not None and len(parts) < MAX_CHAIN:
        parts.append("".join(traceback.format_tb(behind.__traceback__)) + type(behind).__name__)
        behind = behind.__cause__ or behind.__context__
    return "\nbehind it:\n".join(parts)


def set_up(level: int = logging.INFO) -> None:
    """Write the records of LOGGERS to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level if name == "hart_infer" else max(level, logging.WARNING))
        logger.propagate = False

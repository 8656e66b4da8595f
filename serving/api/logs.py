"""Lines of the log, as text or as one JSON object each, and the request that a line is about.

Of a user or an item no line says anything.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any, Literal

import msgspec

LogFormat = Literal["text", "json"]
TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
TIME = "%Y-%m-%dT%H:%M:%SZ"
# Start, stop and swap of bundles: few lines, which everybody wants
LIFECYCLE = "serving.lifecycle"
ACCESS = "serving.access"
HEADER = b"x-request-id"
# What callers may name a request: nothing that ends a line or a quote
REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
# Of the request that this task answers; "" outside of one
request_id: ContextVar[str] = ContextVar("request_id", default="")
trace_id: ContextVar[str] = ContextVar("trace_id", default="")


class JsonFormatter(logging.Formatter):
    """A line as a JSON object: time, level, logger, process and message, with request and trace where there are any;
    and the fields that a call gave as `extra={"fields": {…}}`.

    Example:
        >>> handler.setFormatter(JsonFormatter())
    """

    def format(self, record: logging.LogRecord) -> str:
        at = time.gmtime(record.created)
        line: dict[str, Any] = {
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', at)}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "process": record.process,
        }
        named = {"request_id": request_id.get(), "trace_id": trace_id.get()}
        line |= {name: value for name, value in named.items() if value}
        fields = getattr(record, "fields", None)
        line |= {"message": record.getMessage()} if fields is None else fields
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


class TextFormatter(logging.Formatter):
    """A line as text, with the request behind it where there is one.

    Example:
        >>> handler.setFormatter(TextFormatter(TEXT, TIME))
    """

    def formatTime(
        self, record: logging.LogRecord, datefmt: str | None = None
    ) -> str:  # logging's name
        return time.strftime(datefmt or TIME, time.gmtime(record.created))

    def formatMessage(self, record: logging.LogRecord) -> str:  # logging's name
        line = super().formatMessage(record)
        named = request_id.get()
        return f"{line} (request {named})" if named and record.name != ACCESS else line


def formatter_of(kind: LogFormat) -> logging.Formatter:
    """The formatter of all lines of a process."""
    return JsonFormatter() if kind == "json" else TextFormatter(TEXT, TIME)


def configure(kind: LogFormat) -> None:
    """Send what the process has to say to its standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(formatter_of(kind))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in (ACCESS, LIFECYCLE):
        logging.getLogger(name).setLevel(logging.INFO)


def of_http_server(kind: LogFormat) -> dict[str, Any]:
    """The HTTP server's own lines in the same format, so that one parser reads both."""
    made = {"()": "serving.api.logs.formatter_of", "kind": kind}
    return {"formatters": dict.fromkeys(("generic", "access"), made)}


def request_id_of(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The id that a caller gave a request by `X-Request-Id`, or a new one where the caller gave nothing that can
    stand in a log.
    """
    for name, value in headers:
        if name == HEADER and REQUEST_ID.fullmatch(value):
            return value.decode()
    return os.urandom(8).hex()

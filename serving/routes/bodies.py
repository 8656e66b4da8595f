"""Bodies in, answers out: media types, what is read of a body and for how long, and clients that leave."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from serving.api.errors import (
    BodyTooLargeError,
    BrokenBodyError,
    SlowBodyError,
    UnsupportedMediaError,
)
from serving.api.messages import JSON, MSGPACK, ErrorBody, encoded
from serving.routes.admission import Admission

T = TypeVar("T")


def error_response(status: int, kind: str, message: str) -> Response:
    """An error as clients read it."""
    headers = {"Retry-After": "1"} if status == 503 else {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if kind in (SlowBodyError.kind, BrokenBodyError.kind):
        # What else comes is the rest of that body
        headers["Connection"] = "close"
    body = msgspec.json.encode(ErrorBody(kind, message))
    return Response(body, status_code=status, media_type=JSON, headers=headers)


def media_of(request: Request) -> str:
    """Return the media type of a body, lower case; "" without a Content-Type."""
    return request.headers.get("content-type", "").split(";")[0].strip().lower()


def answered_with(request: Request, answer: Any, headers: dict[str, str] | None = None) -> Response:
    """Return an answer in the request's media type, or in the only one that it accepts."""
    accepted = request.headers.get("accept", "")
    media = media_of(request)
    if MSGPACK in accepted and JSON not in accepted:
        media = MSGPACK
    elif JSON in accepted and MSGPACK not in accepted:
        media = JSON
    return Response(encoded(answer, media), media_type=media, headers=headers)


async def unless_left(request: Request, answering: Awaitable[T]) -> T:
    """An answer, unless the client leaves before it is there.

    Raises:
        ClientDisconnect: they left; the work is cancelled.
    """

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working = asyncio.ensure_future(answering)
    watching = asyncio.ensure_future(left())
    try:
        await asyncio.wait([working, watching], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        for task in (working, watching):
            task.cancel()


async def read_body(
    request: Request, limit: int, seconds: float = 5.0, admission: Admission | None = None
) -> bytes:
    """The body, read no further than the limit and no longer than its time.

    Args:
        admission: which bounds how much of all bodies is held; default: nothing does.

    Raises:
        UnsupportedMediaError: declared as something other than JSON or msgpack, as nothing, or
            compressed.
        BodyTooLargeError: longer than the limit.
        SlowBodyError: not there in time, or the slowest of too many.
        BrokenBodyError: it ended before it was whole.
    """
    # Required: a page of another site may send what declares nothing without asking first.
    if (declared := media_of(request)) not in (JSON, MSGPACK):
        raise UnsupportedMediaError(
            f"Content-Type must be {JSON} or {MSGPACK}, not {declared!r}"
            if declared
            else f"Content-Type is required: {JSON} or {MSGPACK}"
        )
    charset = request.headers.get("content-type", "").lower().partition("charset=")[2].strip('" ')
    if declared == JSON and charset not in ("", "utf-8", "utf8", "us-ascii"):
        raise UnsupportedMediaError(f"JSON is read in UTF-8, not in {charset!r}")
    # A compressed body could become larger than the limit once it is unpacked.
    if encoding := request.headers.get("content-encoding"):
        raise UnsupportedMediaError(
            f"Content-Encoding {encoding!r} is not accepted: send it as it is"
        )
    too_large = BodyTooLargeError(f"the body may have {limit:,} bytes at most")
    # Refuse by the declared length first, before any of the body is read.
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > limit:
        raise too_large
    body = bytearray()
    admission = admission or Admission(1)
    try:
        async with asyncio.timeout(seconds) as timeout:
            with admission.arriving(timeout) as arriving:
                async for chunk in request.stream():
                    body += chunk
                    admission.came(arriving, len(chunk))
                    # The declared length may be missing or wrong, so that the bytes are counted too.
                    if len(body) > limit:
                        raise too_large
    except TimeoutError as error:
        raise SlowBodyError(f"the body did not arrive within {seconds:g} s") from error
    except ClientDisconnect as error:
        raise BrokenBodyError(
            "the body ended before it was whole, or its chunks are broken"
        ) from error
    return bytes(body)

"""Answers: status lines, common headers, and JSON bodies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, TypeAlias

import msgspec
from klein import Response

#: The type of the headers of klein's ``Response``; ours are all bytes.
Headers: TypeAlias = Mapping[str | bytes, str | bytes | Sequence[str | bytes]]

SERVER = b"webhookd"

# The first bytes of an answer by its status, up to the value of Date.
_HEADS: Mapping[int, bytes] = {
    status.value: b"HTTP/1.1 %d %b\r\nServer: %b\r\nDate: " % (status.value, status.phrase.encode(), SERVER)
    for status in HTTPStatus
}

JSON: Headers = {b"Content-Type": b"application/json"}
CORS: Headers = {b"Access-Control-Allow-Origin": b"*"}  # signatures protect us, not CORS
JSON_CORS: Headers = {**JSON, **CORS}
RETRY_AFTER: Headers = {b"Retry-After": b"3"}

_encode_json = msgspec.json.encode


def json_response(status: int, content: object, headers: Headers = JSON) -> Response:
    """Return an answer with ``content`` as JSON."""
    body = _encode_json(content) + b"\n"
    return Response(status, {**headers, b"Content-Length": b"%d" % len(body)}, body)


def error_response(status: int, code: str, message: str, headers: Headers = JSON) -> Response:
    """Return the answer for an error: ``code`` is for machines, ``message`` for people."""
    return json_response(status, {"error": {"code": code, "message": message}}, headers)


def encode(response: Response, date: bytes, request_id: bytes, *, has_body: bool, closes: bool) -> bytes:
    """Return the bytes of an answer; ``closes`` marks the last answer of a connection."""
    parts: list[Any] = [_HEADS[response.code], date, b"\r\nX-Request-Id: ", request_id]
    for name, value in response.headers.items():
        parts += (b"\r\n", name, b": ", value)
    parts.append(b"\r\nConnection: close\r\n\r\n" if closes else b"\r\n\r\n")
    if has_body:
        parts.append(response.body)
    return b"".join(parts)

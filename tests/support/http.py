"""HTTP/1.1 in bytes, for requests that a client such as treq cannot send."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from http.client import HTTPResponse

from attrs import frozen

ANSWER_DEADLINE_S = 30.0


@frozen
class Response:
    """One answer. The names of its headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def request_bytes(
    method: str, path: str, headers: Mapping[str, str] | None = None, body: bytes | None = None
) -> bytes:
    """Return a whole request, with ``Content-Length`` if it has a body. It closes the connection."""
    fields = {"Host": "localhost", "Connection": "close"}
    if body is not None:
        fields["Content-Length"] = str(len(body))
    lines = [
        f"{method} {path} HTTP/1.1",
        *(f"{name}: {value}" for name, value in (fields | dict(headers or {})).items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b"")


def connect(port: int) -> socket.socket:
    """Open a connection to a loopback port. Each read and write on it has a deadline."""
    return socket.create_connection(("127.0.0.1", port), timeout=ANSWER_DEADLINE_S)


def read_response(connection: socket.socket, method: str = "GET") -> Response:
    """Read the next answer. Raise `http.client.HTTPException` if it is not HTTP, or if none comes."""
    response = HTTPResponse(connection, method=method)
    response.begin()
    body = response.read()
    return Response(response.status, {name.lower(): value for name, value in response.getheaders()}, body)


def exchange(port: int, request: bytes, method: str = "GET") -> Response:
    """Send any bytes, and read the answer."""
    with connect(port) as connection:
        connection.sendall(request)
        return read_response(connection, method)


def get(port: int, path: str) -> Response:
    """Fetch one path."""
    return exchange(port, request_bytes("GET", path))

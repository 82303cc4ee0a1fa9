"""Refused requests: the edge's own answers, and the record and log line of each refusal."""

from __future__ import annotations

from attrs import frozen
from klein import Response
from twisted.logger import Logger, LogLevel

from webhookd.http.answers import JSON_CORS, RETRY_AFTER, error_response

_MAX_LOGGED_PATH = 256

_log = Logger()


@frozen
class Rejection:
    """An error answer that the edge itself gives: to bytes that are not HTTP, or before the body is read."""

    status: int
    code: str
    message: str

    def response(self) -> Response:
        """Return the answer."""
        headers = {**JSON_CORS, **RETRY_AFTER} if self.status == 429 else JSON_CORS
        return error_response(self.status, self.code, self.message, headers)


BAD_REQUEST = Rejection(400, "bad_request", "this is not an HTTP/1.1 request")
BAD_HOST = Rejection(400, "bad_host", "an HTTP/1.1 request has one Host header")
BAD_PATH = Rejection(400, "bad_path", "the path is not UTF-8")
TOO_LARGE = Rejection(413, "too_large", "the body is larger than allowed")
HEAD_TOO_LARGE = Rejection(431, "head_too_large", "the head is larger than allowed")
TOO_SLOW = Rejection(408, "too_slow", "the request did not arrive in time")
TOO_MANY_CONNECTIONS = Rejection(429, "too_many_connections", "too many connections are open")
TOO_MANY_REQUESTS = Rejection(429, "too_many", "too many requests were sent without waiting for an answer")
TOO_MUCH_AT_ONCE = Rejection(429, "too_many", "too many bodies are arriving, and this is the largest")


@frozen
class RefusedRequest:
    """The record of a refused request; ``reason`` is a detail that the answer does not show."""

    status: int
    code: str
    request_id: bytes
    path: bytes
    client: str | None = None
    source: str | None = None
    reason: str | None = None

    def log(self) -> None:
        """Write the log line of this refusal."""
        is_our_fault = self.status == 429 or self.status >= 500
        _log.emit(
            LogLevel.warn if is_our_fault else LogLevel.info,
            "refused {path} from {client}: {status} {log_why}, request {request_id}",
            status=self.status,
            code=self.code,
            source=self.source,
            path=printable_path(self.path),
            client=self.client or "-",
            request_id=self.request_id.decode(),
            reason=self.reason,
            log_why=self.code if self.reason is None else f"{self.code} ({self.reason})",
        )


def printable_path(path: bytes) -> str:
    """Return a path for a log line: ASCII, and cut to a maximum length."""
    return path[:_MAX_LOGGED_PATH].decode("ascii", "replace") or "-"


def host_of(client: object) -> str | None:
    """Return the IP address in a Twisted address; that of a UNIX socket has none."""
    host: str | None = getattr(client, "host", None)
    return host

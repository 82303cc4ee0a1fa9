"""The HTTP routes: the Klein app for webhooks, its sibling for health, and the table of status codes.

Both are given callables, not the application. Answers are small JSON and never a redirect, which Chatwoot
would follow with a second POST.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import ClassVar

import msgspec
from attrs import define
from klein import Klein
from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.http_headers import Headers
from twisted.web.iweb import IRequest
from twisted.web.resource import IResource
from werkzeug.exceptions import HTTPException, MethodNotAllowed

from webhookd.auth import Credentials
from webhookd.model import (
    BadRequest,
    Delivery,
    JobRefused,
    Outcome,
    QueueUnavailable,
    Receipt,
    Refusal,
    SpoolUnavailable,
    TooLarge,
    TooMany,
    Unauthorized,
    UnknownSource,
    UnsupportedMedia,
)

Accept = Callable[[Delivery, Credentials], Deferred[Receipt]]

STATUS_OF_OUTCOME: Mapping[Outcome, int] = {
    Outcome.QUEUED: 202,
    Outcome.ALREADY_QUEUED: 200,
    Outcome.SPOOLED: 202,
    Outcome.IGNORED: 200,
}

# 500 and not 503 where nothing can take an event: of all errors, Chatwoot's agent bots repeat 429 and 500.
STATUS_OF_ERROR: Mapping[type, int] = {
    BadRequest: 400,
    Unauthorized: 401,
    UnknownSource: 404,
    TooLarge: 413,
    UnsupportedMedia: 415,
    TooMany: 429,
    QueueUnavailable: 500,
    SpoolUnavailable: 500,
    JobRefused: 500,
}

_RETRY_AFTER_S = b"3"
_CODE_OF_HTTP_STATUS = {404: "not_found", 405: "method_not_allowed"}

_encode = msgspec.json.encode
_CORS_PREFLIGHT = {
    b"Access-Control-Allow-Methods": b"POST, OPTIONS",
    b"Access-Control-Allow-Headers": b"*, Authorization",
    b"Access-Control-Max-Age": b"86400",
}


class InFlight:
    """How much is under way, and the limits of it."""

    def __init__(self, max_requests: int, max_bytes: int) -> None:
        self.requests = 0
        self.bytes = 0
        self._max_requests = max_requests
        self._max_bytes = max_bytes

    def enter(self, size_bytes: int) -> None:
        """Count a request in; raises L{TooMany} where that would pass a limit."""
        if self.requests >= self._max_requests or self.bytes + size_bytes > self._max_bytes:
            raise TooMany("too_many", "too many requests are under way")
        self.requests += 1
        self.bytes += size_bytes

    def leave(self, size_bytes: int) -> None:
        """Count a request out."""
        self.requests -= 1
        self.bytes -= size_bytes


def _klein() -> Klein:
    """A Klein app without werkzeug's redirects: a slash at the end, or a doubled one, is no other address."""
    app = Klein()
    app.url_map.strict_slashes = False
    app.url_map.merge_slashes = False
    return app


_log = Logger()


def _error(_app: object, request: IRequest, failure: Failure) -> bytes:
    """The one place where a failure becomes an answer; it tells nothing of what went wrong inside."""
    error = failure.value
    if isinstance(error, HTTPException):
        if isinstance(error, MethodNotAllowed):
            request.setHeader(b"Allow", ", ".join(sorted(error.valid_methods or ())).encode())
        status = error.code or 500
        return _answer_error(request, status, _CODE_OF_HTTP_STATUS.get(status, "bad_request"), error.name)
    status = STATUS_OF_ERROR.get(type(error), 500)
    if status in (429, 500):
        request.setHeader(b"Retry-After", _RETRY_AFTER_S)
    if isinstance(error, Refusal):
        return _answer_error(request, status, error.code, str(error))
    if type(error) not in STATUS_OF_ERROR:
        _log.failure("cannot answer a request", failure)
    return _answer_error(request, status, "unavailable", "the event could not be taken")


def _answer_error(request: IRequest, status: int, code: str, message: str) -> bytes:
    return _answer(request, status, {"error": {"code": code, "message": message}})


def _answer(request: IRequest, status: int, content: object) -> bytes:
    body = _encode(content) + b"\n"
    request.setResponseCode(status)
    request.setHeader(b"Content-Type", b"application/json")
    request.setHeader(b"Content-Length", b"%d" % len(body))
    return body


@define(eq=False)
class WebhookApp:
    """The receiver's routes.

    ``default_source`` is the one behind the short path; ``now_ms`` gives the wall clock.
    """

    app: ClassVar[Klein] = _klein()

    accept: Accept
    default_source: str
    now_ms: Callable[[], int]
    in_flight: InFlight
    health: IResource

    @app.route("/webhook/chatwoot", methods=["POST"])
    def receive_default(self, request: IRequest) -> Deferred[bytes]:
        """A delivery of the default source."""
        return self.receive(request, self.default_source)

    @app.route("/webhook/chatwoot/<source>", methods=["POST"])
    def receive(self, request: IRequest, source: str) -> Deferred[bytes]:
        """A delivery of a named source."""
        request.setHeader(b"Access-Control-Allow-Origin", b"*")
        _check_media_type(request.requestHeaders)
        body = request.content.read()
        self.in_flight.enter(len(body))
        try:
            receipt = self._accept(request, source, body)
        except BaseException:
            self.in_flight.leave(len(body))
            raise
        receipt.addBoth(self._left, len(body))
        return _shielded(receipt).addCallback(self._answer_receipt, request)

    def _accept(self, request: IRequest, source: str, body: bytes) -> Deferred[Receipt]:
        headers = request.requestHeaders
        delivery_id = _header(headers, b"X-Chatwoot-Delivery")
        delivery = Delivery(
            source=source,
            body=body,
            delivery_id=delivery_id.decode("latin-1") if delivery_id is not None else None,
            received_at_ms=self.now_ms(),
        )
        return self.accept(delivery, _credentials(request))

    def _left(self, result: object, size_bytes: int) -> object:
        self.in_flight.leave(size_bytes)
        return result

    def _answer_receipt(self, receipt: Receipt, request: IRequest) -> bytes:
        content = {"status": receipt.outcome.value, "jobId": receipt.job_id}
        if receipt.outcome is Outcome.IGNORED:
            content = {"status": receipt.outcome.value, "event": receipt.event}
        return _answer(request, STATUS_OF_OUTCOME[receipt.outcome], content)

    @app.route("/webhook/chatwoot", methods=["OPTIONS"])
    @app.route("/webhook/chatwoot/<_source>", methods=["OPTIONS"])
    def preflight(self, request: IRequest, _source: str = "") -> bytes:
        """A browser's question whether it may post; CORS guards nothing here, a signature does."""
        request.setResponseCode(204)
        request.setHeader(b"Access-Control-Allow-Origin", b"*")
        for name, value in _CORS_PREFLIGHT.items():
            request.setHeader(name, value)
        return b""

    @app.route("/health", branch=True)
    def sibling(self, _request: IRequest) -> IResource:
        """The health resource has everything below this path."""
        return self.health

    @app.handle_errors(Exception)
    def failed(self, request: IRequest, failure: Failure) -> bytes:
        """Whatever went wrong."""
        request.setHeader(b"Access-Control-Allow-Origin", b"*")
        return _error(self, request, failure)


@define(eq=False)
class HealthApp:
    """The health routes, for whoever decides whether to send requests or to restart the daemon.

    ``report`` gives all that is known; ``is_ready`` whether an event could be accepted now.
    """

    app: ClassVar[Klein] = _klein()

    report: Callable[[], Awaitable[Mapping[str, object]]]
    is_ready: Callable[[], bool]

    @app.route("/", methods=["GET"])
    async def everything(self, request: IRequest) -> bytes:
        """All that is known; 503 while not ready."""
        return _answer(request, self._status(), await self.report())

    @app.route("/live", methods=["GET"])
    def live(self, request: IRequest) -> bytes:
        """That this is answered at all shows that the reactor turns."""
        return _answer(request, 200, {"status": "ok"})

    @app.route("/ready", methods=["GET"])
    def ready(self, request: IRequest) -> bytes:
        """Whether an event could be accepted now."""
        return _answer(request, self._status(), {"status": "ok" if self.is_ready() else "unavailable"})

    def _status(self) -> int:
        return 200 if self.is_ready() else 503

    @app.handle_errors(Exception)
    def failed(self, request: IRequest, failure: Failure) -> bytes:
        """Whatever went wrong."""
        return _error(self, request, failure)


@define(eq=False)
class OpsApp:
    """The routes for those who run the daemon; the world does not see them."""

    app: ClassVar[Klein] = _klein()

    health: IResource

    @app.route("/health", branch=True)
    def sibling(self, _request: IRequest) -> IResource:
        """The same health resource that the receiver has."""
        return self.health

    @app.handle_errors(Exception)
    def failed(self, request: IRequest, failure: Failure) -> bytes:
        """Whatever went wrong."""
        return _error(self, request, failure)


def _shielded(receipt: Deferred[Receipt]) -> Deferred[Receipt]:
    """The same result, out of reach of a cancellation.

    Klein cancels what a handler returned when the client hangs up; a job that is on its way must not be
    stopped half-way for that. A cancelled Deferred passes over the result that comes later.
    """
    shield: Deferred[Receipt] = Deferred()
    receipt.addCallbacks(shield.callback, shield.errback)
    return shield


def _check_media_type(headers: Headers) -> None:
    """JSON, or silent about it; a body that says it is something else is not what Chatwoot sends."""
    given = _header(headers, b"Content-Type")
    if given is None:
        return
    media_type = given.partition(b";")[0].strip().lower()
    if media_type != b"application/json" and not (
        media_type.startswith(b"application/") and media_type.endswith(b"+json")
    ):
        raise UnsupportedMedia("unsupported_media_type", "the body must be application/json")
    if headers.hasHeader(b"Content-Encoding") and _header(headers, b"Content-Encoding") != b"identity":
        raise UnsupportedMedia("unsupported_encoding", "the body must not be compressed")


def _credentials(request: IRequest) -> Credentials:
    headers = request.requestHeaders
    return Credentials(
        signature=_header(headers, b"X-Chatwoot-Signature"),
        timestamp=_header(headers, b"X-Chatwoot-Timestamp"),
        authorization=_header(headers, b"Authorization"),
        token=request.args.get(b"token", (None,))[0] or _header(headers, b"X-Webhook-Token"),
    )


def _header(headers: Headers, name: bytes) -> bytes | None:
    values = headers.getRawHeaders(name)
    return values[-1] if values else None

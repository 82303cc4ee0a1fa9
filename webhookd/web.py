"""The HTTP routes, as Klein apps for webhooks, health and operators; and the table of status codes.

The apps get callables, not the application. Answers are small JSON documents.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, ClassVar

from attrs import define, field
from klein import Response
from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.iweb import IRequest
from twisted.web.resource import IResource
from werkzeug.exceptions import HTTPException, MethodNotAllowed

from webhookd.chatwoot.payload import EVENTS
from webhookd.http import InFlight, KleinApp, WebhookRequest
from webhookd.http.answers import CORS, JSON, JSON_CORS, RETRY_AFTER, Headers, error_response, json_response
from webhookd.intake import Accept
from webhookd.intake.auth import Credentials, Network, client_address
from webhookd.model import (
    BadRequest,
    Delivery,
    JobRefused,
    Outcome,
    QueueUnavailable,
    Receipt,
    Refusal,
    SpoolUnavailable,
    TooMany,
    Unauthorized,
    UnknownSource,
    UnsupportedMedia,
)

STATUS_OF_OUTCOME: Mapping[Outcome, int] = {
    Outcome.QUEUED: 202,
    Outcome.ALREADY_QUEUED: 200,
    Outcome.SPOOLED: 202,
    Outcome.IGNORED: 200,
}

# 500, not 503, if neither Redis nor the spool accepts an event: Chatwoot's agent bots retry only 429 and 500.
STATUS_OF_ERROR: Mapping[type, int] = {
    BadRequest: 400,
    Unauthorized: 401,
    UnknownSource: 404,
    UnsupportedMedia: 415,
    TooMany: 429,
    QueueUnavailable: 500,
    SpoolUnavailable: 500,
    JobRefused: 500,
}

_CORS_PREFLIGHT: Headers = {
    **CORS,
    b"Access-Control-Allow-Methods": b"POST, OPTIONS",
    b"Access-Control-Allow-Headers": b"*, Authorization",
    b"Access-Control-Max-Age": b"86400",
}
_CODE_OF_HTTP_STATUS = {404: "not_found", 405: "method_not_allowed"}

_log = Logger()


def _answer_error(
    request: WebhookRequest, failure: Failure, headers: Headers = JSON, **known: str | None
) -> Response:
    """Return the answer to a failed request, without internal details, and record the refusal.

    ``known`` are other fields of the record.
    """
    error = failure.value
    reason = None
    if isinstance(error, HTTPException):  # of werkzeug, for a path or a method
        status = error.code or 500
        code, message = _CODE_OF_HTTP_STATUS.get(status, "bad_request"), error.name
    elif isinstance(error, Refusal):
        status, code, message = STATUS_OF_ERROR.get(type(error), 500), error.code, str(error)
    else:
        status, code, message = 500, "unavailable", "the event could not be accepted"
        reason = type(error).__name__
        if type(error) not in STATUS_OF_ERROR:
            _log.failure("cannot answer a request", failure, request_id=request.request_id.decode())
    if isinstance(error, MethodNotAllowed):
        headers = {**headers, b"Allow": ", ".join(sorted(error.valid_methods or ())).encode()}
    elif status in (429, 500):
        headers = {**headers, **RETRY_AFTER}
    request.add_refusal(status, code, reason=reason, **known)
    return error_response(status, code, message, headers)


# -- routes -------------------------------------------------------------------------------------------------


@define(eq=False)
class WebhookApp:
    """The receiver's routes.

    ``default_source`` is the source of the path without a name. ``now_ms`` is the wall clock. The client's
    address in a header counts only if it comes from ``trusted_proxies``. ``events`` counts by source, event
    and outcome; ``refusals`` counts by code.
    """

    app: ClassVar[KleinApp] = KleinApp()

    accept: Accept
    default_source: str
    now_ms: Callable[[], int]
    in_flight: InFlight
    health: IResource
    trusted_proxies: Sequence[Network] = ()
    events: Counter[tuple[str, str, str]] = field(factory=Counter)
    refusals: Counter[str] = field(factory=Counter)

    @app.route("/webhook/chatwoot", methods=["POST"])
    def receive_default(self, request: WebhookRequest) -> Deferred[Response]:
        """Accept a delivery of the default source."""
        return self.receive(request, self.default_source)

    @app.route("/webhook/chatwoot/<source>", methods=["POST"])
    def receive(self, request: WebhookRequest, source: str) -> Deferred[Response]:
        """Accept a delivery of a named source."""
        fields = request.fields
        _check_media_type(fields)
        body = request.body
        delivery_id = fields.get(b"x-chatwoot-delivery")
        delivery = Delivery(
            source=source,
            body=body,
            delivery_id=None if delivery_id is None else delivery_id.decode("latin-1"),
            received_at_ms=self.now_ms(),
            request_id=request.request_id,
        )
        self.in_flight.enter(len(body))
        try:
            receipt = self.accept(delivery, _credentials(request))
        except BaseException:
            self.in_flight.leave(len(body))
            raise
        arguments = (source, len(body))
        return receipt.addCallbacks(
            self._taken, self._not_taken, callbackArgs=arguments, errbackArgs=arguments
        )

    def _taken(self, receipt: Receipt, source: str, size_bytes: int) -> Response:
        self.in_flight.leave(size_bytes)
        event = receipt.event if receipt.event in EVENTS else "other"
        self.events[source, event, receipt.outcome] += 1
        if receipt.outcome is Outcome.IGNORED:
            content = {"status": receipt.outcome, "event": receipt.event}
        else:
            content = {"status": receipt.outcome, "jobId": receipt.job_id}
        return json_response(STATUS_OF_OUTCOME[receipt.outcome], content, JSON_CORS)

    def _not_taken(self, failure: Failure, source: str, size_bytes: int) -> Failure:
        self.in_flight.leave(size_bytes)
        self.events[source, "unknown", "failed"] += 1
        return failure

    @app.route("/webhook/chatwoot", methods=["OPTIONS"])
    @app.route("/webhook/chatwoot/<_source>", methods=["OPTIONS"])
    def preflight(self, _request: IRequest, _source: str = "") -> Response:
        """Allow a browser to post: any header, from any origin."""
        return Response(204, _CORS_PREFLIGHT, b"")

    @app.route("/health", branch=True)
    def sibling(self, request: IRequest) -> IResource:
        """Pass all paths below to the health resource."""
        return _branch(request, self.health)

    @app.handle_errors(Exception)
    def failed(self, request: WebhookRequest, failure: Failure) -> Response:
        """Answer any error."""
        if isinstance(failure.value, Refusal):
            self.refusals[failure.value.code] += 1
        client = client_address(_credentials(request), self.trusted_proxies)
        known = {} if client is None else {"client": str(client)}
        if not isinstance(failure.value, HTTPException | UnknownSource):
            path = request.path.decode("ascii", "replace")
            known["source"] = path.removeprefix("/webhook/chatwoot").strip("/") or self.default_source
        return _answer_error(request, failure, JSON_CORS, **known)


@define(eq=False)
class HealthApp:
    """The health routes, for load balancers and orchestrators.

    ``report`` returns the full state. ``is_ready`` says whether an event could be accepted now.
    """

    app: ClassVar[KleinApp] = KleinApp()

    report: Callable[[], Awaitable[Mapping[str, object]]]
    is_ready: Callable[[], bool]

    @app.route("/", methods=["GET"])
    async def everything(self, _request: IRequest) -> Response:
        """Report the full state, with 503 while not ready."""
        return json_response(self._status(), await self.report())

    @app.route("/live", methods=["GET"])
    def live(self, _request: IRequest) -> Response:
        """Answer always: any answer shows that the reactor runs."""
        return json_response(200, {"status": "ok"})

    @app.route("/ready", methods=["GET"])
    def ready(self, _request: IRequest) -> Response:
        """Report whether an event could be accepted now."""
        return json_response(self._status(), {"status": "ok" if self.is_ready() else "unavailable"})

    def _status(self) -> int:
        return 200 if self.is_ready() else 503

    @app.handle_errors(Exception)
    def failed(self, request: WebhookRequest, failure: Failure) -> Response:
        """Answer any error."""
        return _answer_error(request, failure)


@define(eq=False)
class OpsApp:
    """The routes for operators, on an endpoint that is not public.

    ``expose`` takes an ``Accept`` header and returns the metrics: media type and text. ``page`` is the status
    page, and ``events`` is the stream that the page reads.
    """

    app: ClassVar[KleinApp] = KleinApp()

    health: IResource
    expose: Callable[[str], Coroutine[Any, Any, tuple[str, bytes]]]
    page: Response
    events: IResource

    @app.route("/", methods=["GET"])
    def status(self, _request: IRequest) -> Response:
        """Show the status page."""
        return self.page

    @app.route("/status/events", branch=True, methods=["GET"])
    def stream(self, request: IRequest) -> IResource:
        """Stream the data of the status page."""
        return _branch(request, self.events)

    @app.route("/metrics", methods=["GET"])
    async def metrics(self, request: WebhookRequest) -> Response:
        """Expose all metrics for Prometheus."""
        accept = request.fields.get(b"accept", b"").decode("latin-1")
        media_type, text = await self.expose(accept)
        headers: Headers = {b"Content-Type": media_type.encode(), b"Content-Length": b"%d" % len(text)}
        return Response(200, headers, text)

    @app.route("/health", branch=True)
    def sibling(self, request: IRequest) -> IResource:
        """Pass all paths below to the health resource, the same as the receiver's."""
        return _branch(request, self.health)

    @app.handle_errors(Exception)
    def failed(self, request: WebhookRequest, failure: Failure) -> Response:
        """Answer any error."""
        return _answer_error(request, failure)


def _branch(request: IRequest, resource: IResource) -> IResource:
    """Return a resource for a branch. With an empty path, werkzeug would answer 404 instead of 405."""
    request.postpath = request.postpath or [b""]
    return resource


# -- headers ------------------------------------------------------------------------------------------------


def _check_media_type(fields: Mapping[bytes, bytes]) -> None:
    """Refuse a body that is declared as something else than plain JSON; no declaration is fine."""
    given = fields.get(b"content-type")
    if given == b"application/json" and b"content-encoding" not in fields:
        return  # the usual case
    if given is not None and not _is_json(given.partition(b";")[0].strip().lower()):
        raise UnsupportedMedia("unsupported_media_type", "the body must be application/json")
    if fields.get(b"content-encoding", b"identity") != b"identity":
        raise UnsupportedMedia("unsupported_encoding", "the body must not be compressed")


def _is_json(media_type: bytes) -> bool:
    return media_type == b"application/json" or (
        media_type.startswith(b"application/") and media_type.endswith(b"+json")
    )


def _credentials(request: WebhookRequest) -> Credentials:
    fields = request.fields
    return Credentials(
        signature=fields.get(b"x-chatwoot-signature"),
        timestamp=fields.get(b"x-chatwoot-timestamp"),
        authorization=fields.get(b"authorization"),
        token=request.args.get(b"token", (None,))[0] or fields.get(b"x-webhook-token"),
        peer=getattr(request.client, "host", None),
        forwarded_for=fields.get(b"x-forwarded-for"),
        real_ip=fields.get(b"x-real-ip"),
    )

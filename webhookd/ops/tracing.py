"""OpenTelemetry traces from the webhook, or its sender, to the worker; exported by OTLP over HTTP.

Each webhook is a span, and its job is a child span. The job carries the W3C ``traceparent`` of its span where
bullmq-otel looks for it, so the worker's span continues the trace. Spans name routes, jobs and queues, and
hold nothing of a message.

Nothing here waits: the SDK exports in its own thread, from a bounded queue, and drops what does not fit.
The module needs the extra ``otel``; it is imported only if tracing is on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from threading import Thread

from msgspec.structs import replace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import INVALID_SPAN, Span, SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from twisted.application.service import Service
from twisted.internet.defer import Deferred
from twisted.internet.defer import TimeoutError as DeadlinePassed
from twisted.logger import Logger
from twisted.python.failure import Failure

from webhookd import __version__
from webhookd.bullmq.options import with_telemetry
from webhookd.http import WebhookRequest
from webhookd.model import ConfigError, Job, Receipt
from webhookd.reactor import IReactor

_LAST_EXPORT_DEADLINE_S = 2.0
_MAX_TRACESTATE_BYTES = 512  # W3C asks to pass on this much; it goes into each job
_MAX_PATH = 256
_QUIET_S = 60.0

_W3C = TraceContextTextMapPropagator()

_log = Logger()

AnswerRequest = Callable[[WebhookRequest], bool]
Deliver = Callable[[Job], Deferred[Receipt]]


def otlp_provider(replica: str) -> TracerProvider:
    """Return the SDK as OpenTelemetry's own environment variables (``OTEL_…``) configure it.

    Raises `ConfigError` if they are invalid.
    """
    sdk = logging.getLogger("opentelemetry")
    sdk.handlers, sdk.propagate = [SdkLog()], False
    ours = {"service.name": "webhookd", "service.version": __version__, "service.instance.id": replica}
    try:
        resource = Resource(ours).merge(OTELResourceDetector().detect())
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    except ValueError as error:
        raise ConfigError(f"tracing: {error}") from None
    return provider


class Tracing(Service):
    """The spans of webhooks and jobs.

    No turn of the reactor comes between a webhook's `trace_requests` and its `trace_jobs`. So one attribute
    is enough to pass the parent span from the first to the second.
    """

    _webhook: Span = INVALID_SPAN

    def __init__(self, reactor: IReactor, provider: TracerProvider) -> None:
        self._reactor = reactor
        self._provider = provider
        self._tracer = provider.get_tracer("webhookd", __version__)

    def trace_requests(self, answer: AnswerRequest) -> AnswerRequest:
        """Return a function like ``answer`` that makes a span of each POST."""

        def traced(request: WebhookRequest) -> bool:
            if request.method != b"POST":
                return answer(request)
            span = self._tracer.start_span(
                "POST", _parent(request.fields), SpanKind.SERVER, attributes=_attributes(request)
            )
            if span.is_recording():
                request.notifyFinish().addBoth(_answered, request, span)
            self._webhook = span
            try:
                return answer(request)
            finally:
                self._webhook = INVALID_SPAN

        return traced

    def trace_jobs(self, deliver: Deliver) -> Deliver:
        """Return a function like ``deliver`` that makes a span of each job, and puts its id into the job.

        If the webhook is not sampled, there is no second span: the job carries the id of the webhook's.
        """

        def traced(job: Job) -> Deferred[Receipt]:
            webhook = self._webhook
            if not webhook.is_recording():
                return deliver(_continuing(webhook, job))
            span = self._tracer.start_span(
                f"add {job.queue}",
                set_span_in_context(webhook, Context()),
                SpanKind.PRODUCER,
                attributes={
                    "messaging.system": "bullmq",
                    "messaging.operation.name": "add",
                    "messaging.operation.type": "send",
                    "messaging.destination.name": job.queue,
                    "messaging.message.id": job.id,
                },
            )
            return deliver(_continuing(span, job)).addCallbacks(
                _taken, _not_taken, callbackArgs=(span,), errbackArgs=(span,)
            )

        return traced

    def stopService(self) -> Deferred[None]:
        """Export the last spans, within a short deadline."""
        super().stopService()
        ended: Deferred[None] = Deferred()
        # A separate thread: the reactor would wait for a thread of its pool without a deadline.
        Thread(target=self._end, args=(ended,), daemon=True).start()
        return ended.addTimeout(_LAST_EXPORT_DEADLINE_S, self._reactor).addErrback(_not_exported)

    def _end(self, ended: Deferred[None]) -> None:
        self._provider.shutdown()
        self._reactor.callFromThread(ended.callback, None)


def _parent(fields: Mapping[bytes, bytes]) -> Context:
    """Return the context with the sender's span, if the request names one."""
    given = {"traceparent": fields.get(b"traceparent", b"").decode("latin-1")}
    state = fields.get(b"tracestate", b"")
    if len(state) <= _MAX_TRACESTATE_BYTES:
        given["tracestate"] = state.decode("latin-1")
    return _W3C.extract(given, Context())


def _continuing(span: Span, job: Job) -> Job:
    """Return the job with the span's id, so that its worker continues the trace."""
    metadata: dict[str, str] = {}
    _W3C.inject(metadata, set_span_in_context(span, Context()))
    return replace(job, options=with_telemetry(job.options, metadata))


def _attributes(request: WebhookRequest) -> Mapping[str, str]:
    return {
        "http.request.method": "POST",
        "url.path": request.path[:_MAX_PATH].decode("ascii", "replace"),
        "url.scheme": "https" if request.isSecure() else "http",
        "network.protocol.version": request.clientproto[5:].decode(),
        "webhookd.request_id": request.request_id.decode(),
    }


def _answered(result: Failure | None, request: WebhookRequest, span: Span) -> None:
    if request.route != "other":
        route = request.route.replace("<", "{").replace(">", "}")
        span.update_name(f"POST {route}")
        span.set_attribute("http.route", route)
    if result is not None:  # the client is gone
        _fail(span, type(result.value).__name__)
    else:
        span.set_attribute("http.response.status_code", request.code)
        if request.code >= 500:
            _fail(span, str(request.code))
    span.end()


def _taken(receipt: Receipt, span: Span) -> Receipt:
    span.set_attribute("webhookd.outcome", receipt.outcome.value)
    span.end()
    return receipt


def _not_taken(failure: Failure, span: Span) -> Failure:
    _fail(span, type(failure.value).__name__)
    span.end()
    return failure


def _fail(span: Span, error_type: str) -> None:
    span.set_attribute("error.type", error_type)
    span.set_status(StatusCode.ERROR)


def _not_exported(failure: Failure) -> None:
    failure.trap(DeadlinePassed)
    _log.warn("the last spans were not exported in time")


class SdkLog(logging.Handler):
    """The SDK's own messages in our log, each at most once a minute.

    Messages about its configuration quote headers, which may hold tokens. So only the exporter's messages are
    logged with their values.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._logged_at_s: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        what = str(record.msg)  # without its values
        if record.created - self._logged_at_s.get(what, 0.0) < _QUIET_S:
            return
        self._logged_at_s[what] = record.created
        is_exporters = record.name.startswith("opentelemetry.exporter")
        _log.warn("tracing: {problem}", problem=record.getMessage() if is_exporters else what)

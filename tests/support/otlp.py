"""An OTLP collector in a thread, which keeps the spans that it receives."""

from __future__ import annotations

from collections.abc import Mapping

from attrs import Factory, frozen
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from .http_server import Handler, ThreadServer


def tracing(endpoint: str) -> dict[str, str]:
    """Return the environment of a daemon that exports to an endpoint without delay."""
    return {
        "WEBHOOK_TRACING": "otlp",
        "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
        "OTEL_BSP_SCHEDULE_DELAY": "50",
    }


@frozen
class ExportedSpan:
    """One span, with ids in hexadecimal. Without a parent, ``parent_id`` is empty."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    kind: str
    is_error: bool
    attributes: Mapping[str, object]
    resource: Mapping[str, object] = Factory(dict)


class Collector(ThreadServer):
    """A collector of spans over HTTP, from daemons with `environ`."""

    def __init__(self) -> None:
        self.spans: list[ExportedSpan] = []
        self.raw = b""
        collector = self

        class Spans(Handler):
            def do_POST(self) -> None:
                collector.take(self.read_body())
                self.answer()

        super().__init__(Spans)

    @property
    def environ(self) -> Mapping[str, str]:
        """The environment of a daemon that exports to it without delay."""
        return tracing(f"http://127.0.0.1:{self.port}")

    def take(self, data: bytes) -> None:
        """Keep a request, as bytes and as spans."""
        self.raw += data
        for resource in ExportTraceServiceRequest.FromString(data).resource_spans:
            of_resource = _read(resource.resource.attributes)
            for scope in resource.scope_spans:
                self.spans += [_span(span, of_resource) for span in scope.spans]


def _span(span: Span, resource: Mapping[str, object]) -> ExportedSpan:
    return ExportedSpan(
        name=span.name,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        kind=Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_").lower(),
        is_error=span.status.code == 2,
        attributes=_read(span.attributes),
        resource=resource,
    )


def _read(attributes: object) -> Mapping[str, object]:
    pairs: list[KeyValue] = list(attributes)  # type: ignore[call-overload]  # a protobuf container
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value") or "string_value") for pair in pairs}

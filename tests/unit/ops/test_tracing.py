"""Spans of webhooks and jobs, with connections and an exporter in memory."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from threading import Event
from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock
from twisted.logger import LogLevel
from twisted.trial.unittest import SynchronousTestCase

from tests.support.fakes import Log
from tests.support.web_client import MemoryClient
from webhookd.bullmq.options import JobOptions
from webhookd.chatwoot.payload import hash_of_body
from webhookd.http import InFlight, Shortcut, WebhookSite
from webhookd.intake import Intake, SourcePolicy, payload
from webhookd.intake.auth import Authenticator
from webhookd.model import Job, Outcome, Receipt, SpoolUnavailable
from webhookd.ops.tracing import SdkLog, Tracing
from webhookd.reactor import IReactor
from webhookd.samples import SAMPLES
from webhookd.web import HealthApp, WebhookApp

SAMPLE = SAMPLES["message_created"]
PATH = "/webhook/chatwoot"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SENDER = "00f067aa0ba902b7"


class Threads(Clock):
    """A clock that threads can call, as they call a reactor."""

    def __init__(self) -> None:
        super().__init__()
        self.called = Event()

    def callFromThread(self, call: Any, *arguments: Any) -> None:
        self.callLater(0, call, *arguments)
        self.called.set()


class TracingCase(SynchronousTestCase):
    """The receiver with its intake; a job is queued unless ``receipt`` is set."""

    def setUp(self) -> None:
        self.clock = Threads()
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        tracing = Tracing(cast(IReactor, self.clock), provider)
        self.jobs: list[Job] = []
        self.receipt: Deferred[Receipt] | None = None
        source = SourcePolicy(Authenticator((), (), 300), None, "support", JobOptions.from_mapping({}))
        intake = Intake({"chatwoot": source}, payload, hash_of_body, tracing.trace_jobs(self.deliver))

        async def report() -> Mapping[str, object]:
            return {}

        app = WebhookApp(
            intake.accept,
            "chatwoot",
            lambda: 0,
            InFlight(10, 1_000_000),
            HealthApp(report, lambda: True).app.resource(),
        )
        self.site = WebhookSite(
            app.app.resource(),
            self.clock,
            max_body_bytes=10_000,
            access_log=False,
            shortcut=tracing.trace_requests(Shortcut(app.app, app.failed)),
        )

    def deliver(self, job: Job) -> Deferred[Receipt]:
        self.jobs.append(job)
        return succeed(Receipt(Outcome.QUEUED, job.id, job.name)) if self.receipt is None else self.receipt

    def send(
        self, path: str = PATH, headers: Mapping[str, str] | None = None, body: bytes = SAMPLE.body
    ) -> int:
        given = {"Content-Type": "application/json", **(headers or {})}
        return MemoryClient(self.site, self.clock).exchange("POST", path, given, body).status

    def spans(self, kind: SpanKind) -> list[ReadableSpan]:
        return [span for span in self.exporter.get_finished_spans() if span.kind is kind]

    def carried(self) -> dict[str, str]:
        """Return the telemetry of the last job."""
        carried: dict[str, str] = json.loads(json.loads(self.jobs[-1].options)["tm"])
        return carried


class SpanTests(TracingCase):
    def test_the_job_is_a_part_of_the_webhook(self) -> None:
        self.assertEqual(self.send(f"{PATH}/chatwoot?token=s3cret"), 202)

        [webhook], [added] = self.spans(SpanKind.SERVER), self.spans(SpanKind.PRODUCER)
        self.assertEqual(webhook.name, "POST /webhook/chatwoot/{source}")
        self.assertEqual(added.name, "add support")
        assert webhook.context
        assert added.context
        assert added.parent
        assert added.attributes
        self.assertEqual(added.parent.span_id, webhook.context.span_id)
        self.assertIsNone(webhook.parent)
        self.assertEqual(added.attributes["messaging.message.id"], SAMPLE.job_id)
        name = f"00-{added.context.trace_id:032x}-{added.context.span_id:016x}"
        self.assertEqual(self.carried().keys(), {"traceparent"})
        self.assertRegex(self.carried()["traceparent"], f"^{name}-0[13]$")  # 2 means that the id is random
        self.assertNotIn("s3cret", "".join(span.to_json() for span in (webhook, added)))
        self.assertEqual(webhook.status.status_code, StatusCode.UNSET)

    def test_tracing_changes_only_the_telemetry_of_a_job(self) -> None:
        self.send()

        options = json.loads(self.jobs[0].options)
        del options["tm"]
        self.assertEqual(options, {"attempts": 0, "jobId": SAMPLE.job_id})

    def test_webhooks_that_wait_do_not_take_each_others_place(self) -> None:
        self.receipt = Deferred()
        waiting = [self.receipt]
        first, second = MemoryClient(self.site, self.clock), MemoryClient(self.site, self.clock)
        request = b"POST /webhook/chatwoot HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n%b"
        first.send(request % (len(SAMPLE.body), SAMPLE.body))
        self.receipt = Deferred()
        waiting.append(self.receipt)
        second.send(request % (len(SAMPLE.body), SAMPLE.body))
        for receipt in reversed(waiting):
            receipt.callback(Receipt(Outcome.SPOOLED, SAMPLE.job_id, SAMPLE.event))
        self.clock.advance(0)

        parents = {span.parent.span_id for span in self.spans(SpanKind.PRODUCER) if span.parent}
        webhooks = {span.context.span_id for span in self.spans(SpanKind.SERVER) if span.context}
        self.assertEqual(len(parents), 2)
        self.assertEqual(parents, webhooks)

    def test_what_is_refused_is_no_job(self) -> None:
        self.assertEqual(self.send(body=b"{"), 400)

        [webhook] = self.spans(SpanKind.SERVER)
        assert webhook.attributes
        self.assertEqual(webhook.attributes["http.response.status_code"], 400)
        self.assertEqual(webhook.status.status_code, StatusCode.UNSET)  # the sender's error, not ours
        self.assertEqual(self.spans(SpanKind.PRODUCER), [])

    def test_what_nothing_can_take_is_an_error(self) -> None:
        self.receipt = fail(SpoolUnavailable("full"))
        self.assertEqual(self.send(), 500)

        for kind, error in ((SpanKind.SERVER, "500"), (SpanKind.PRODUCER, "SpoolUnavailable")):
            [span] = self.spans(kind)
            assert span.attributes
            self.assertEqual(span.status.status_code, StatusCode.ERROR)
            self.assertEqual(span.attributes["error.type"], error)
            self.assertEqual(span.events, ())

    def test_a_sender_that_is_gone(self) -> None:
        self.receipt = Deferred()
        client = MemoryClient(self.site, self.clock)
        head = b"POST /webhook/chatwoot HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % len(SAMPLE.body)
        client.send(head + SAMPLE.body)
        client.hang_up()
        self.assertEqual(self.spans(SpanKind.SERVER)[-1].status.status_code, StatusCode.ERROR)

        self.receipt.callback(Receipt(Outcome.QUEUED, SAMPLE.job_id, SAMPLE.event))

        self.assertEqual(self.spans(SpanKind.PRODUCER)[0].status.status_code, StatusCode.UNSET)

    def test_what_is_no_webhook_has_no_span(self) -> None:
        self.assertEqual(MemoryClient(self.site, self.clock).exchange("GET", "/health/live").status, 200)

        self.assertEqual(self.exporter.get_finished_spans(), ())

    def test_an_unknown_path_has_no_name(self) -> None:
        self.assertEqual(self.send("/nowhere/4915550172839"), 404)

        self.assertEqual(self.spans(SpanKind.SERVER)[0].name, "POST")


class SenderTests(TracingCase):
    def test_the_senders_span_is_the_parent(self) -> None:
        self.send(headers={"traceparent": f"00-{TRACE}-{SENDER}-01", "tracestate": "vendor=x"})

        [webhook] = self.spans(SpanKind.SERVER)
        assert webhook.parent
        self.assertEqual(f"{webhook.parent.span_id:016x}", SENDER)
        self.assertTrue(self.carried()["traceparent"].startswith(f"00-{TRACE}-"))
        self.assertEqual(self.carried()["tracestate"], "vendor=x")

    def test_what_the_sender_does_not_sample(self) -> None:
        self.send(headers={"traceparent": f"00-{TRACE}-{SENDER}-00"})

        self.assertEqual(self.exporter.get_finished_spans(), ())
        self.assertRegex(self.carried()["traceparent"], rf"^00-{TRACE}-[0-9a-f]{{16}}-00$")

    def test_a_long_tracestate_does_not_go_into_the_job(self) -> None:
        state = ",".join(f"v{number}={'x' * 50}" for number in range(10))
        self.send(headers={"traceparent": f"00-{TRACE}-{SENDER}-01", "tracestate": state})

        self.assertNotIn("tracestate", self.carried())

    @given(st.text(alphabet=st.characters(min_codepoint=33, max_codepoint=126), max_size=80))
    def test_an_invalid_traceparent_begins_a_new_trace(self, text: str) -> None:
        for header in (text, f"00-{text}-01", f"00-{'0' * 32}-{SENDER}-01"):
            self.assertEqual(self.send(headers={"traceparent": header, "tracestate": text}), 202)
            self.assertRegex(self.carried()["traceparent"], r"^00-[0-9a-f]{32}-[0-9a-f]{16}-0[13]$")


class EndTests(SynchronousTestCase):
    def stopped(self, provider: Any) -> tuple[Threads, Deferred[None]]:
        clock = Threads()
        return clock, Tracing(cast(IReactor, clock), provider).stopService()

    def test_the_end_waits_for_the_last_export(self) -> None:
        clock, stopped = self.stopped(TracerProvider(shutdown_on_exit=False))
        self.assertNoResult(stopped)
        self.assertTrue(clock.called.wait(10))
        clock.advance(0)

        self.successResultOf(stopped)

    def test_but_not_for_long(self) -> None:
        log, may_end = Log.of(self), Event()

        class Slow(TracerProvider):
            def shutdown(self) -> None:
                may_end.wait(10)

        clock, stopped = self.stopped(Slow(shutdown_on_exit=False))
        clock.advance(2.0)

        self.successResultOf(stopped)
        self.assertEqual(log.at(LogLevel.warn), ["the last spans were not exported in time"])
        may_end.set()
        self.assertTrue(clock.called.wait(10))
        clock.advance(0)  # the thread is late, and that is harmless


class SdkLogTests(SynchronousTestCase):
    def emit(self, name: str, message: str, *arguments: object, at_s: float = 1000.0) -> None:
        record = logging.LogRecord(name, logging.WARNING, "", 0, message, arguments, None)
        record.created = at_s
        self.handler.emit(record)

    def setUp(self) -> None:
        self.log = Log.of(self)
        self.handler = SdkLog()

    def test_the_exporters_trouble_is_logged_once_a_minute(self) -> None:
        for second in range(100):
            self.emit("opentelemetry.exporter.x", "failed: %s", second, at_s=1000.0 + second)

        self.assertEqual(self.log.at(LogLevel.warn), ["tracing: failed: 0", "tracing: failed: 60"])

    def test_what_may_quote_a_header_does_not(self) -> None:
        self.emit("opentelemetry.util.re", "bad header: %s", "authorization=s3cret")

        self.assertEqual(self.log.at(LogLevel.warn), ["tracing: bad header: %s"])
        self.assertNotIn("s3cret", self.log.everything())

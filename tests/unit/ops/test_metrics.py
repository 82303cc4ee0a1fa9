"""Every metric, read from real parts in memory; both text formats; and a scrape that never fails."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from twisted.internet.defer import Deferred, ensureDeferred, succeed
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.resource import Resource
from twisted.web.server import Request

from tests.support.fakes import AcceptingSink, MemorySpool
from tests.support.http import request_bytes
from tests.support.redis_wire import NIL, Line, PoolCase, array, bulk, error, integer
from tests.support.spools import make_job
from tests.support.web_client import MemoryClient
from webhookd.bullmq.keys import QueueKeys
from webhookd.bullmq.script import Wire
from webhookd.chatwoot.payload import hash_of_body
from webhookd.delivery import Drain
from webhookd.http import InFlight, Shortcut, WebhookSite
from webhookd.intake import Intake, SourcePolicy, payload
from webhookd.intake.auth import Authenticator
from webhookd.model import Job, Outcome, Receipt
from webhookd.ops.metrics import Components, DaemonCollector, Exposition, ReactorLag
from webhookd.ops.status import load_page
from webhookd.redis.breaker import BreakerPolicy, CircuitBreaker
from webhookd.redis.queue import RedisQueue
from webhookd.redis.settings import QueueSettings
from webhookd.redis.watch import QueueWatch, RedisWatch
from webhookd.samples import SAMPLES, SECRET
from webhookd.web import OpsApp, WebhookApp

NOW_MS = 1_788_264_005_123
SAMPLE = SAMPLES["message_created"]
PATH = "/webhook/chatwoot"
_OPENMETRICS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"


class Health(Resource):
    """A health resource, of which only the requests count."""

    isLeaf = True

    def render_GET(self, _request: Request) -> bytes:
        return b"well"


class MetricsCase(PoolCase):
    """The parts of a daemon, with a Redis that the test plays, and its ops endpoint."""

    def setUp(self) -> None:
        super().setUp()
        self.spool = MemorySpool()
        self.breaker = CircuitBreaker(BreakerPolicy(), lambda: 0.0)
        self.sink = AcceptingSink()
        self.lag = ReactorLag(self.clock)
        self.queues = [self.queue(), self.queue()]
        queues = [QueueKeys("bull", "chatwoot")]
        self.redis_watch = RedisWatch(self.pool, queues, lambda: None)
        self.queue_watch = QueueWatch(self.clock, self.pool, queues)
        self.intake = Intake(
            {"chatwoot": self.source(), "branch": self.source(SECRET)}, payload, hash_of_body, self.deliver
        )
        self.app = WebhookApp(self.intake.accept, "chatwoot", lambda: NOW_MS, InFlight(2, 100_000), Health())
        self.site = self.make_site(self.app)
        self.collector = DaemonCollector(self.components())
        exposition = Exposition(self.components())
        self.ops = self.make_site(OpsApp(Resource(), exposition.expose, load_page(), Resource()))

    def source(self, *secrets: str) -> SourcePolicy:
        options: Any = SimpleNamespace(encode=lambda _id: b"{}", delay_ms=0, priority=0, lifo=False)
        return SourcePolicy(Authenticator(secrets, (), 300), None, "chatwoot", options)

    def queue(self) -> RedisQueue:
        settings = QueueSettings("bull", Wire.AUTO, 5000, lambda: "now here")
        return RedisQueue(
            self.clock, self.pool, self.breaker, settings, deadline_s=0.5, acknowledged=lambda _jobs: None
        )

    def components(self, **changes: Any) -> Components:
        drain = Drain(self.clock, self.spool, self.sink, lambda: 0.0)
        values: dict[str, Any] = {
            "site": self.site,
            "app": self.app,
            "intake": self.intake,
            "redis_queues": self.queues,
            "pool": self.pool,
            "breaker": self.breaker,
            "redis_watch": self.redis_watch,
            "queue_watch": self.queue_watch,
            "spool": SpoolWithDrain(self.spool, drain),
            "spool_capacity_bytes": 1000,
            "lag": self.lag,
            "now_ms": lambda: NOW_MS,
        }
        return Components(**{**values, **changes})

    def make_site(self, app: WebhookApp | OpsApp) -> WebhookSite:
        return WebhookSite(
            app.app.resource(),
            self.clock,
            max_body_bytes=100_000,
            access_log=False,
            shortcut=Shortcut(app.app, app.failed),
        )

    def deliver(self, job: Job) -> Deferred[Receipt]:
        return succeed(Receipt(Outcome.QUEUED, job.id, job.name))

    def post(
        self, path: str = PATH, body: bytes = SAMPLE.body, headers: Mapping[str, str] | None = None
    ) -> int:
        client = MemoryClient(self.site, self.clock)
        fields = {"Content-Type": "application/json", **(headers or {})}
        return client.exchange("POST", path, fields, body).status

    def families(self) -> dict[str, Metric]:
        return {metric.name: metric for metric in self.collector.collect()}

    def values(self, name: str) -> dict[tuple[str, ...], float]:
        """Return a metric's samples by the values of their labels."""
        (metric,) = (
            metric for metric in self.families().values() if any(one.name == name for one in metric.samples)
        )
        return {
            tuple(sample.labels.values()): sample.value for sample in metric.samples if sample.name == name
        }

    def value(self, name: str, *labels: str) -> float:
        return self.values(name)[labels]

    def scrape(self, accept: str = "") -> tuple[str, str]:
        """Return media type and text."""
        client = MemoryClient(self.ops, self.clock)
        answer = client.exchange("GET", "/metrics", {"Accept": accept})
        self.assertEqual(answer.status, 200)
        self.assertEqual(answer.headers["content-length"], str(len(answer.body)))
        return answer.headers["content-type"], answer.body.decode()


class SpoolWithDrain:
    """The attributes of a SpoolService that metrics read."""

    def __init__(self, spool: MemorySpool, drain: Drain) -> None:
        self._spool = spool
        self.drain = drain

    @property
    def stats(self) -> Any:
        return self._spool.stats

    @property
    def is_up(self) -> bool:
        return self.stats.problem is None


class ZeroTests(MetricsCase):
    """If a counter appears with its first increment, no rate includes that increment."""

    def assert_zeros(self, name: str, *labels: tuple[str, ...]) -> None:
        values = self.values(name)
        for each in labels:
            self.assertEqual(values.get(each), 0, f"{name}{each}")

    def test_answers_that_lose_an_event(self) -> None:
        self.assert_zeros(
            "webhookd_http_requests_total",
            *((route, "POST", code) for route in (PATH, f"{PATH}/<source>") for code in ("429", "500")),
            ("none", "none", "429"),
        )

    def test_each_outcome_of_each_source(self) -> None:
        outcomes = [(outcome.value, "message_created") for outcome in Outcome] + [("failed", "unknown")]
        self.assert_zeros(
            "webhookd_events_total",
            *((source, event, outcome) for source in ("chatwoot", "branch") for outcome, event in outcomes),
        )

    def test_each_reason_to_refuse_a_credential(self) -> None:
        self.assert_zeros(
            "webhookd_signature_failures_total", ("chatwoot", "stale_signature"), ("branch", "bad_token")
        )

    def test_locks_errors_and_changes_of_the_breaker(self) -> None:
        self.assert_zeros("webhookd_lock_total", ("acquired",), ("held",))
        self.assert_zeros("webhookd_redis_errors_total", ("timeout",), ("oom",), ("disconnected",))
        self.assert_zeros("webhookd_circuit_breaker_transitions_total", ("closed", "open"))
        self.assert_zeros("webhookd_spool_replayed_total", ("queued",), ("dead",))
        self.assert_zeros("webhookd_signature_secret_used_total", ("branch", "0"))

    def test_no_request_of_any_kind_makes_a_series(self) -> None:
        before = {name: set(self.values(name)) for name in self.names_of_counters()}
        self.post()
        self.post(body=b"{}")
        self.post(body=b"[]")
        self.post(body=b"no JSON")
        self.post(body=b"\xff")
        self.post(f"{PATH}/branch")
        self.post(f"{PATH}/nobody")
        self.post(f"{PATH}/branch", headers={"X-Chatwoot-Signature": "sha256=0", "X-Chatwoot-Timestamp": "1"})
        self.post(f"{PATH}/branch", headers={"X-Chatwoot-Signature": "sha256=0", "X-Chatwoot-Timestamp": "x"})
        self.post(headers={"Content-Type": "text/plain"})
        self.post(headers={"Content-Encoding": "gzip"})
        self.post(body=b" " * 100_001)
        self.assertEqual(before, {name: set(self.values(name)) for name in self.names_of_counters()})

    def names_of_counters(self) -> list[str]:
        return [f"{family.name}_total" for family in self.families().values() if family.type == "counter"]


class HttpTests(MetricsCase):
    def test_requests_by_route_method_and_code(self) -> None:
        self.post()
        self.post()
        self.post(f"{PATH}/branch")
        self.post(body=b" " * 100_001)
        requests = self.values("webhookd_http_requests_total")
        self.assertEqual(
            {labels: count for labels, count in requests.items() if count},
            {
                (PATH, "POST", "202"): 2,
                (f"{PATH}/<source>", "POST", "401"): 1,
                ("none", "none", "413"): 1,
            },
        )

    def test_durations(self) -> None:
        self.post()
        name = "webhookd_http_request_duration_seconds"
        self.assertEqual((self.value(f"{name}_count", PATH), self.value(f"{name}_sum", PATH)), (1, 0))
        bounds = [bound for route, bound in self.values(f"{name}_bucket") if route == PATH]
        self.assertEqual((bounds[5], bounds[9], bounds[-1]), ("0.05", "1.0", "+Inf"))

    def test_durations_of_deliveries_apart_from_those_of_probes(self) -> None:
        name = "webhookd_http_request_duration_seconds_count"
        self.assertEqual(self.values(name), {(PATH,): 0, (f"{PATH}/<source>",): 0})
        for path in ("/health", "/health/live", "/elsewhere"):
            MemoryClient(self.site, self.clock).exchange("GET", path)
        self.post(f"{PATH}/branch")
        self.assertEqual(
            self.values(name), {(PATH,): 0, (f"{PATH}/<source>",): 1, ("/health",): 2, ("other",): 1}
        )

    def test_in_flight_and_connections(self) -> None:
        self.app.in_flight.enter(100)
        MemoryClient(self.site, self.clock)
        self.assertEqual(self.value("webhookd_http_requests_in_flight"), 1)
        self.assertEqual(self.value("webhookd_http_connections"), 1)


class EventTests(MetricsCase):
    def test_events_by_source_event_and_outcome(self) -> None:
        self.post()
        self.post(body=b'{"event":"a new one"}')
        self.assertEqual(self.value("webhookd_events_total", "chatwoot", "message_created", "queued"), 1)
        self.assertEqual(self.value("webhookd_events_total", "chatwoot", "other", "queued"), 1)

    def test_refusals_and_failed_signatures(self) -> None:
        self.post(f"{PATH}/branch")
        self.post(body=b"[]")
        self.assertEqual(self.value("webhookd_refusals_total", "not_an_object"), 1)
        self.assertEqual(self.value("webhookd_refusals_total", "missing_signature"), 1)
        self.assertEqual(self.value("webhookd_signature_failures_total", "branch", "missing_signature"), 1)

    def test_no_request_can_make_labels(self) -> None:
        for number in range(50):
            self.post(f"{PATH}/source{number}")
            self.post(body=b'{"event":"event%d"}' % number)
            self.post(f"/elsewhere{number}")
        self.assertLess(len(self.values("webhookd_events_total")), 20)
        self.assertLess(len(self.values("webhookd_http_requests_total")), 30)
        self.assertLess(len(self.values("webhookd_http_request_duration_seconds_count")), 5)


class RedisTests(MetricsCase):
    async def add(self, *answers: bytes) -> None:
        """Add one job per answer, each in its own call, through the two queues in turn."""
        line = await self.connect()
        for number, answer in enumerate(answers):
            self.queues[number % 2].add(make_job(number)).addErrback(lambda _failure: None)
            self.clock.advance(0)
            line.commands()
            line.reply(answer)

    async def test_locks_calls_and_batches_of_both_queues(self) -> None:
        await self.add(array(integer(1)), array(integer(2)), array(integer(3)))
        self.assertEqual(self.values("webhookd_lock_total"), {("acquired",): 1, ("held",): 2})
        self.assertEqual(self.value("webhookd_enqueue_duration_seconds_count"), 3)
        self.assertEqual(self.value("webhookd_enqueue_batch_size_bucket", "1.0"), 3)
        self.assertEqual(self.value("webhookd_redis_up"), 1)

    async def test_errors_by_kind_and_the_breaker(self) -> None:
        await self.add(error("OOM no"), error("OOM no"))
        self.assertEqual(self.value("webhookd_redis_errors_total", "oom"), 2)
        self.assertEqual(self.value("webhookd_circuit_breaker_calls_total", "failure"), 2)
        self.assertEqual(self.value("webhookd_circuit_breaker_state", "open"), 1)
        self.assertEqual(self.value("webhookd_circuit_breaker_state", "closed"), 0)
        self.assertEqual(self.value("webhookd_circuit_breaker_transitions_total", "closed", "open"), 1)

    def test_without_a_connection(self) -> None:
        self.assertEqual(self.value("webhookd_redis_up"), 0)
        self.assertEqual(
            self.values("webhookd_redis_safety"), {("safe",): 0, ("unsafe",): 0, ("unknown",): 1}
        )


class SpoolTests(MetricsCase):
    def test_what_it_holds(self) -> None:
        self.spool.append(make_job(1))
        received_at_ms = self.spool.stats.oldest_received_at_ms or 0
        self.collector = DaemonCollector(self.components(now_ms=lambda: received_at_ms + 90_500))
        self.assertEqual(self.value("webhookd_spool_records"), 1)
        self.assertEqual(self.value("webhookd_spool_bytes"), make_job(1).size_bytes)
        self.assertEqual(self.value("webhookd_spool_oldest_age_seconds"), 90.5)
        self.assertEqual(self.value("webhookd_spool_capacity_bytes"), 1000)
        self.assertEqual(self.value("webhookd_spool_up"), 1)

    def test_a_clock_that_was_set_back_makes_no_negative_age(self) -> None:
        self.spool.append(make_job(1))
        self.collector = DaemonCollector(self.components(now_ms=lambda: 0))
        self.assertEqual(self.value("webhookd_spool_oldest_age_seconds"), 0)

    def test_a_broken_one(self) -> None:
        self.spool.problem = "the disk is full"
        self.assertEqual(self.value("webhookd_spool_up"), 0)

    def test_what_left_it(self) -> None:
        drain = Drain(self.clock, self.spool, self.sink, lambda: 0.0)
        self.collector = DaemonCollector(self.components(spool=SpoolWithDrain(self.spool, drain)))
        self.spool.append(make_job(1))
        self.successResultOf(drain.until_empty())
        self.assertEqual(self.values("webhookd_spool_replayed_total"), {("queued",): 1, ("dead",): 0})

    def test_none_at_all(self) -> None:
        self.collector = DaemonCollector(self.components(spool=None))
        self.assertEqual([name for name in self.families() if name.startswith("webhookd_spool")], [])


class LagTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.lag = ReactorLag(self.clock)
        self.lag.startService()
        self.addCleanup(self.lag.stopService)

    def advance(self, *steps_s: float) -> float:
        for step_s in steps_s:
            self.clock.advance(step_s)
        return self.lag.worst_s

    def test_none_while_timers_are_on_time(self) -> None:
        self.assertEqual(self.advance(0.5, 0.5, 0.5), 0)

    def test_the_worst_is_remembered_for_15_s(self) -> None:
        self.assertAlmostEqual(self.advance(0.5, 2.5, 0.5), 2.0)
        self.assertAlmostEqual(self.advance(*[0.5] * 27), 2.0)
        self.assertEqual(self.advance(*[0.5] * 3), 0)


class FormatTests(MetricsCase):
    def test_the_classic_text(self) -> None:
        for accept in ("", "*/*", "text/plain;version=0.0.4", "text/html"):
            media_type, text = self.scrape(accept)
            self.assertEqual(media_type, "text/plain; version=0.0.4; charset=utf-8")
            self.assertIn("webhookd_build_info", [metric.name for metric in parse_text(text)])

    def test_openmetrics_on_request(self) -> None:
        media_type, text = self.scrape(_OPENMETRICS)
        self.assertEqual(media_type, "application/openmetrics-text; version=1.0.0; charset=utf-8")
        families = {metric.name: metric for metric in parse_openmetrics(text)}
        self.assertEqual(families["webhookd_events"].type, "counter")

    def test_each_metric_has_a_help_text_that_is_a_sentence(self) -> None:
        for metric in self.families().values():
            self.assertRegex(metric.documentation, r"^[A-Z].+\.$")


class HeaderTests(MetricsCase):
    def test_no_accept_header_breaks_a_scrape_or_comes_back(self) -> None:
        exposition = Exposition(self.components())

        @given(st.text(alphabet=st.characters(max_codepoint=255), max_size=60))
        def check(junk: str) -> None:
            for accept in (junk, f"application/openmetrics-text;version={junk}"):
                media_type, _ = self.successResultOf(ensureDeferred(exposition.expose(accept)))
                self.assertIn(media_type.partition(";")[0], ("text/plain", "application/openmetrics-text"))
                self.assertLess(len(media_type), 64)

        check()


class QueueTests(MetricsCase):
    """The queues: the only metrics for which a scrape asks Redis."""

    async def begin(self, *replies: bytes) -> tuple[Line, MemoryClient]:
        """Begin a scrape, and have Redis give these replies."""
        await self.connect()
        prober = await self.connect()
        client = MemoryClient(self.ops, self.clock)
        client.send(request_bytes("GET", "/metrics"))
        for reply in replies:
            prober.commands()
            prober.reply(reply)
        return prober, client

    async def test_the_age_of_the_next_job(self) -> None:
        counts = [integer(number) for number in range(6)]
        since = [bulk(b"chatwoot.a.7.1"), array(bulk(b"%d" % (NOW_MS - 12_500)))]
        _, client = await self.begin(*counts, *since)
        self.assertIn(b'webhookd_queue_oldest_wait_age_seconds{queue="chatwoot"} 12.5', client.received)
        self.assertIn(b'bullmq_job_count{queue="chatwoot",state="active"} 4.0', client.received)

    async def test_an_empty_queue_has_age_zero(self) -> None:
        _, client = await self.begin(*[integer(0)] * 6, NIL)
        self.assertIn(b'webhookd_queue_oldest_wait_age_seconds{queue="chatwoot"} 0.0', client.received)

    async def test_a_redis_that_does_not_answer_keeps_only_its_own_numbers_back(self) -> None:
        _, client = await self.begin(integer(5))
        self.assertEqual(client.received, b"")
        self.clock.advance(1.0)
        self.assertIn(b"webhookd_build_info", client.received)
        self.assertNotIn(b"bullmq_job_count{", client.received)

    async def test_a_defect_does_not_break_the_scrape(self) -> None:
        _, client = await self.begin(*[integer(0)] * 6, integer(1))
        self.assertIn(b"200 OK", client.received)
        self.assertNotIn(b"bullmq_job_count{", client.received)
        self.assertEqual(len(self.flushLoggedErrors(AttributeError)), 1)

    def test_without_a_connection_the_rest_is_there(self) -> None:
        _, text = self.scrape()
        names = [metric.name for metric in parse_text(text) if metric.samples]
        self.assertIn("webhookd_build_info", names)
        self.assertNotIn("bullmq_job_count", names)
        self.assertNotIn("webhookd_queue_oldest_wait_age_seconds", names)

"""The status page: rates and percentiles, the history, the stream, and the page's policy."""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections.abc import Mapping
from functools import partial
from hashlib import sha256
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.resource import Resource

from tests.support.http import request_bytes
from tests.support.redis_wire import array, bulk, integer
from tests.support.web_client import MemoryClient
from tests.unit.ops.test_metrics import MetricsCase
from webhookd.histogram import DURATIONS_S, Histogram
from webhookd.http.channel import IDLE_TIMEOUT_S, WRITE_DEADLINE_S
from webhookd.ops.health import Health, describe_spool
from webhookd.ops.metrics import Exposition
from webhookd.ops.status import Sampler, StatusEvents, StatusFeed, load_page
from webhookd.ops.status.feed import MAX_VIEWERS
from webhookd.ops.status.rates import Reading, quantile, rates_between
from webhookd.ops.status.sampler import HISTORY_POINTS, WINDOW_S
from webhookd.samples import SAMPLES
from webhookd.web import OpsApp

NOW_MS = 1_788_264_005_123
PATH = "/webhook/chatwoot"
SAMPLE = SAMPLES["message_created"]


class QuantileTests(SynchronousTestCase):
    def test_within_a_bucket_observations_are_spread_evenly(self) -> None:
        self.assertEqual(quantile((1.0, 2.0, 4.0), (0, 10, 10, 0), 0.5), 2.0)
        self.assertEqual(quantile((1.0, 2.0, 4.0), (0, 10, 10, 0), 0.75), 3.0)
        self.assertEqual(quantile((1.0, 2.0, 4.0), (10, 0, 0, 0), 0.95), 0.95)

    def test_beyond_the_last_bound_nothing_is_known(self) -> None:
        self.assertEqual(quantile((1.0, 2.0), (0, 0, 7), 0.95), 2.0)

    def test_of_nothing(self) -> None:
        self.assertIsNone(quantile((1.0, 2.0), (0, 0, 0), 0.95))

    @given(st.lists(st.floats(0, 4.9), min_size=1), st.sampled_from([0.5, 0.95, 0.99]))
    def test_it_is_in_the_bucket_of_the_true_one(self, values: list[float], share: float) -> None:
        histogram = Histogram(DURATIONS_S)
        for value in values:
            histogram.observe(value)
        found = quantile(DURATIONS_S, histogram.buckets, share)
        assert found is not None
        below = sum(value <= found for value in values)
        upper = min(bound for bound in DURATIONS_S if bound >= found - 1e-12)
        self.assertGreaterEqual(sum(value <= upper for value in values), share * len(values) - 1e-9)
        self.assertLessEqual(below, len(values))


class RateTests(SynchronousTestCase):
    def test_differences_by_time(self) -> None:
        old = Reading(100.0, {"queued": 10, "failed": 1}, 5, [1, 2])
        new = Reading(104.0, {"queued": 30, "failed": 3}, 7, [5, 2])
        rates = rates_between(old, new)
        self.assertEqual(
            (rates.outcomes, rates.refused, rates.durations, rates.events),
            ({"queued": 5.0, "failed": 0.5}, 0.5, [4, 0], 5.0),
        )

    def test_no_time_has_passed(self) -> None:
        reading = Reading(100.0, {"queued": 10}, 5, [1, 2])
        self.assertEqual(rates_between(reading, reading).events, 0)


class StatusCase(MetricsCase):
    """The page's feed over the parts of `MetricsCase`, and its viewers in memory."""

    def setUp(self) -> None:
        super().setUp()
        self.is_redis_up = True
        self.now_ms = NOW_MS
        self.is_defective = self.is_unreadable = False
        self.sampler = self.make_sampler()
        self.feed = StatusFeed(self.clock, self.sampler, self.queue_watch)
        exposition = Exposition(self.components())
        self.ops = self.make_site(OpsApp(Resource(), exposition.expose, load_page(), StatusEvents(self.feed)))
        self.ops.startFactory()
        self.feed.startService()
        self.addCleanup(self.stop_feed)

    def make_sampler(self, **changes: Any) -> Sampler:
        health = Health(
            self.clock,
            can_queue=lambda: self.is_redis_up,
            can_spool=lambda: True,
            sections={
                "redis": self.describe_redis,
                "spool": partial(describe_spool, self.spool, lambda: self.now_ms),
            },
            queue_watch=self.queue_watch,
        )
        components = self.components(now_ms=lambda: self.now_ms, **changes)
        return Sampler(self.clock, components, health, "here:3001")

    def describe_redis(self) -> Mapping[str, object]:
        if self.is_defective:
            raise ZeroDivisionError
        if self.is_unreadable:
            return {"status": "\udcff"}
        return self.redis_watch.describe()

    def stop_feed(self) -> None:
        if self.feed.running:
            self.feed.stopService()

    def pass_seconds(self, count: int = 1) -> None:
        for _ in range(count):
            self.now_ms += 1000
            self.clock.advance(1.0)

    def look(self) -> Viewer:
        return Viewer(MemoryClient(self.ops, self.clock))

    @property
    def state(self) -> dict[str, Any]:
        return dict(self.sampler.state)


class Viewer:
    """A browser that reads the stream."""

    def __init__(self, client: MemoryClient) -> None:
        self.client = client
        client.send(request_bytes("GET", "/status/events", {"Connection": "keep-alive"}))
        self.head, _, self._rest = client.received.partition(b"\r\n\r\n")

    @property
    def status(self) -> int:
        return int(self.head.split(b" ")[1])

    def messages(self) -> list[Any]:
        """Return all messages so far."""
        _, _, chunks = self.client.received.partition(b"\r\n\r\n")
        return [json.loads(text) for text in re.findall(rb"data: (.*)\n\n", chunks)]

    @property
    def is_gone(self) -> bool:
        return self.client.transport.is_closed


class SamplerTests(StatusCase):
    def test_rates_and_percentiles_are_those_of_the_last_seconds(self) -> None:
        for _ in range(20):
            self.post()
        self.pass_seconds()
        self.assertEqual(self.state["eventsPerSecond"], 20)
        self.assertEqual(self.state["outcomes"]["queued"], {"total": 20, "perSecond": 20})
        self.assertEqual(self.state["durationsMs"], {"p50": 0.5, "p95": 0.9, "p99": 1.0})
        self.pass_seconds(WINDOW_S - 1)
        self.assertEqual(self.state["eventsPerSecond"], 2)
        self.pass_seconds(1)
        self.assertEqual(self.state["eventsPerSecond"], 0)
        self.assertEqual(self.state["durationsMs"], {"p50": None, "p95": None, "p99": None})
        self.assertEqual(self.state["outcomes"]["queued"], {"total": 20, "perSecond": 0})

    def test_refusals_say_why_and_nothing_else(self) -> None:
        self.post(f"{PATH}/branch", headers={"X-Request-Id": "its-name"})
        self.post(body=b'["secret-1"]')
        self.post(f"{PATH}/secret-2", headers={"X-Request-Id": "<secret-3>"})
        self.post("/secret-4")
        self.post(body=b"secret-5" * 100_000)
        self.pass_seconds()
        shown = [(one["status"], one["code"], one["source"]) for one in self.state["refusals"]]
        self.assertEqual(
            shown,
            [
                (413, "too_large", None),
                (404, "not_found", None),
                (404, "unknown_source", None),
                (400, "not_an_object", "chatwoot"),
                (401, "missing_signature", "branch"),
            ],
        )
        self.assertEqual(self.state["refusals"][-1]["requestId"], "its-name")
        self.assertEqual(self.state["refusedPerSecond"], 5)
        self.assertNotIn("secret", json.dumps(self.state))

    def test_a_flood_of_refusals_takes_no_room(self) -> None:
        for number in range(50):
            self.post(f"{PATH}/{number}")
        self.pass_seconds()
        self.assertEqual(len(self.state["refusals"]), 12)

    def test_an_event_that_is_lost_is_a_refusal_too(self) -> None:
        self.app.accept = self.fail_to_accept
        self.post()
        self.flushLoggedErrors(ZeroDivisionError)
        self.pass_seconds()
        self.assertEqual(
            [(one["status"], one["code"]) for one in self.state["refusals"]], [(500, "unavailable")]
        )

    def fail_to_accept(self, *_arguments: object) -> Any:
        raise ZeroDivisionError

    def test_since_when_it_is_as_it_is(self) -> None:
        self.pass_seconds(3)
        self.assertEqual((self.state["status"], self.state["statusSince"]), ("ok", NOW_MS))
        self.is_redis_up = False
        self.pass_seconds(3)
        self.assertEqual((self.state["status"], self.state["statusSince"]), ("degraded", NOW_MS + 4000))
        self.assertEqual(self.state["uptimeSeconds"], 6)

    def test_the_history_is_bounded(self) -> None:
        self.pass_seconds(HISTORY_POINTS + 50)
        self.assertEqual(len(self.sampler.points), HISTORY_POINTS)
        self.assertEqual(self.sampler.points[-1][0] - self.sampler.points[0][0], 1000 * (HISTORY_POINTS - 1))

    def test_without_a_spool(self) -> None:
        sampler = self.make_sampler(spool=None)
        sampler.sample()
        self.assertIsNone(sampler.points[-1][4])


class QueueTests(StatusCase):
    async def test_redis_is_asked_while_there_is_a_viewer(self) -> None:
        await self.connect()
        prober = await self.connect()
        self.pass_seconds(3)
        self.assertEqual(prober.commands(), [])
        self.look()
        prober.expect(b"LLEN")

    async def test_the_jobs_that_wait_and_since_when(self) -> None:
        await self.connect()
        prober = await self.connect()
        self.look()
        for reply in (*map(integer, range(6)), bulk(b"chatwoot.a.7.1"), array(bulk(b"%d" % NOW_MS))):
            prober.reply(reply)
        self.pass_seconds(1)
        self.assertEqual(self.state["queues"]["chatwoot"]["jobs"]["prioritized"], 3)
        self.assertEqual(self.state["queues"]["chatwoot"]["waitingSince"], NOW_MS)
        self.assertEqual(self.sampler.points[-1][3], 0 + 1 + 3)

    def test_what_is_not_known(self) -> None:
        self.pass_seconds(1)
        self.assertEqual(self.state["queues"], {"chatwoot": {"jobs": None, "waitingSince": None}})
        self.assertIsNone(self.sampler.points[-1][3])


class StreamTests(StatusCase):
    def test_the_history_at_once_and_then_what_is_new(self) -> None:
        self.pass_seconds(4)
        viewer = self.look()
        self.assertEqual(viewer.status, 200)
        self.assertIn(b"Content-Type: text/event-stream", viewer.head)
        self.assertIn(b"Cache-Control: no-store", viewer.head)
        self.pass_seconds(2)
        self.assertEqual([len(message["points"]) for message in viewer.messages()], [5, 1, 1])
        self.assertEqual(viewer.messages()[-1]["now"]["at"], NOW_MS + 6000)

    def test_all_viewers_get_the_same(self) -> None:
        viewers = [self.look() for _ in range(3)]
        self.pass_seconds()
        first, *others = [viewer.messages()[-1] for viewer in viewers]
        self.assertEqual(others, [first, first])

    def test_no_more_than_some_viewers(self) -> None:
        viewers = [self.look() for _ in range(MAX_VIEWERS)]
        refused = self.look().client.response()
        self.assertEqual(
            (refused.status, json.loads(refused.body)["error"]["code"]), (503, "too_many_viewers")
        )
        viewers[0].client.hang_up()
        self.assertEqual(self.look().status, 200)

    def test_no_deadline_cuts_a_stream(self) -> None:
        viewer = self.look()
        self.pass_seconds(200)
        self.assertEqual(len(viewer.messages()), 201)

    def test_nor_after_it_was_blocked_for_a_moment(self) -> None:
        viewer = self.look()
        viewer.client.transport.protocol.pauseProducing()
        viewer.client.transport.protocol.resumeProducing()
        self.pass_seconds(int(IDLE_TIMEOUT_S + WRITE_DEADLINE_S))
        self.assertFalse(viewer.is_gone)

    def test_a_viewer_that_does_not_read_is_dropped(self) -> None:
        slow, other = self.look(), self.look()
        slow.client.transport.protocol.pauseProducing()
        self.pass_seconds()
        self.assertTrue(slow.client.transport.is_aborted)
        self.assertEqual((len(slow.messages()), len(other.messages())), (1, 2))

    def test_the_end_waits_for_no_stream(self) -> None:
        reading, slow = self.look(), self.look()
        slow.client.transport.protocol.pauseProducing()
        self.feed.stopService()
        self.clock.advance(0)
        self.assertTrue(reading.is_gone)
        self.assertTrue(reading.client.received.endswith(b"0\r\n\r\n"))
        self.assertTrue(slow.client.transport.is_aborted)
        late = self.look().client.response()
        self.assertEqual((late.status, json.loads(late.body)["error"]["code"]), (503, "ending"))

    def test_a_stream_is_the_last_answer_of_its_connection(self) -> None:
        self.assertIn(b"Connection: close", self.look().head)

    def test_a_request_for_the_head_alone_is_no_viewer(self) -> None:
        client = MemoryClient(self.ops, self.clock)
        self.assertEqual(client.exchange("HEAD", "/status/events").status, 200)
        self.assertEqual(client.exchange("POST", "/status/events").status, 405)
        self.assertEqual([self.look().status for _ in range(MAX_VIEWERS)], [200] * MAX_VIEWERS)

    def test_a_defect_does_not_end_the_feed(self) -> None:
        viewer = self.look()
        self.is_defective = True
        self.pass_seconds()
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.is_defective = False
        self.pass_seconds()
        self.assertEqual(len(viewer.messages()), 2)

    def test_nor_does_a_state_that_is_no_json(self) -> None:
        viewer = self.look()
        self.is_unreadable = True
        self.pass_seconds()
        self.assertEqual(len(self.flushLoggedErrors(UnicodeEncodeError)), 1)
        self.is_unreadable = False
        self.pass_seconds()
        self.assertEqual(len(viewer.messages()), 2)


class PageTests(StatusCase):
    def setUp(self) -> None:
        super().setUp()
        response = MemoryClient(self.ops, self.clock).exchange("GET", "/")
        self.assertEqual(response.status, 200)
        self.headers, self.page = response.headers, response.body.decode()

    def test_its_policy_allows_its_own_script_and_style_and_nothing_else(self) -> None:
        policy = dict(part.split(" ", 1) for part in self.headers["content-security-policy"].split("; "))
        self.assertEqual(policy["default-src"], "'none'")
        for element in ("script", "style"):
            (content,) = re.findall(f"<{element}>(.*?)</{element}>", self.page, re.DOTALL)
            digest = b64encode(sha256(content.encode()).digest()).decode()
            self.assertEqual(policy[f"{element}-src"], f"'sha256-{digest}'")
        self.assertEqual(policy["connect-src"], "'self'")
        self.assertEqual(policy["frame-ancestors"], "'none'")
        self.assertEqual(self.headers["x-content-type-options"], "nosniff")

    def test_it_loads_nothing(self) -> None:
        self.assertEqual(re.findall(r"(?:src|srcset)=|url\(|@import", self.page), [])
        self.assertEqual(set(re.findall(r'href="([^"]*)"', self.page)), {"data:,", "/health", "/metrics"})

    def test_what_comes_from_outside_is_text(self) -> None:
        self.assertEqual(
            re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", self.page), []
        )

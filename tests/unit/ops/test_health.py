"""Health: one word from a few facts, and the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import evolve
from msgspec.structs import replace
from twisted.internet.defer import ensureDeferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from tests.support.fakes import MemorySpool
from tests.support.spools import make_job
from webhookd import __version__
from webhookd.bullmq.keys import QueueKeys
from webhookd.config import resolve
from webhookd.model import SpoolStats
from webhookd.ops.health import Health, Status, describe_sources, describe_spool
from webhookd.redis.watch import QueueWatch


class NoPool:
    """A pool without a connection."""

    prober = None


class HealthTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.can_queue = True
        self.can_spool: bool | None = True

    def health(self) -> Health:
        pool: Any = NoPool()
        return Health(
            clock=self.clock,
            can_queue=lambda: self.can_queue,
            can_spool=lambda: self.can_spool,
            sections={"redis": lambda: {"status": "up"}},
            queue_watch=QueueWatch(self.clock, pool, [QueueKeys("bull", "chatwoot")]),
        )

    def report(self, health: Health) -> Mapping[str, object]:
        return self.successResultOf(ensureDeferred(health.report()))

    def test_the_one_word_for_every_state(self) -> None:
        health = self.health()
        for self.can_queue, self.can_spool, status in (
            (True, True, Status.OK),
            (True, None, Status.OK),
            (True, False, Status.DEGRADED),
            (False, True, Status.DEGRADED),
            (False, None, Status.UNAVAILABLE),
            (False, False, Status.UNAVAILABLE),
        ):
            with self.subTest(f"{self.can_queue} {self.can_spool}"):
                self.assertIs(health.status, status)
                self.assertEqual(health.is_ready(), status is not Status.UNAVAILABLE)
                self.assertEqual(self.report(health)["status"], status.value)

    def test_a_daemon_that_stops_is_never_ready(self) -> None:
        health = self.health()
        health.drain()

        self.assertIs(health.status, Status.DRAINING)
        self.assertFalse(health.is_ready())

    def test_the_report(self) -> None:
        health = self.health()
        self.clock.advance(61.6)

        self.assertEqual(
            self.report(health),
            {
                "status": "ok",
                "version": __version__,
                "uptimeSeconds": 62,
                "redis": {"status": "up"},
                "queues": {"chatwoot": None},
            },
        )


class SectionTests(SynchronousTestCase):
    NOW_MS = 1_788_264_005_123

    def spool(self, spool: MemorySpool | None) -> Mapping[str, object]:
        return describe_spool(spool, lambda: self.NOW_MS)

    def test_no_spool(self) -> None:
        self.assertEqual(self.spool(None), {"status": "off"})

    def test_an_empty_spool(self) -> None:
        self.assertEqual(
            self.spool(MemorySpool()),
            {
                "status": "ok",
                "problem": None,
                "records": 0,
                "bytes": 0,
                "oldestAgeSeconds": 0,
                "deadRecords": 0,
                "corruptRecords": 0,
            },
        )

    def test_a_spool_that_holds_something_and_is_full(self) -> None:
        spool = MemorySpool(max_records=1)
        job = replace(make_job(1), timestamp_ms=self.NOW_MS - 90_500)
        self.successResultOf(spool.append(job))

        section = self.spool(spool)

        self.assertEqual(section["status"], "down")
        self.assertEqual(section["problem"], "full")
        self.assertEqual((section["records"], section["bytes"]), (1, job.size_bytes))
        self.assertEqual(section["oldestAgeSeconds"], 90)

    def test_a_record_from_the_future_has_no_age(self) -> None:
        spool = MemorySpool()
        self.successResultOf(spool.append(replace(make_job(1), timestamp_ms=self.NOW_MS + 5000)))

        self.assertEqual(self.spool(spool)["oldestAgeSeconds"], 0)

    def test_every_number_of_the_spool_has_its_place(self) -> None:
        class Full(MemorySpool):
            stats = SpoolStats(1, 2, self.NOW_MS - 3000, 4, 5, "broken")

        self.assertEqual(
            self.spool(Full()),
            {
                "status": "down",
                "problem": "broken",
                "records": 1,
                "bytes": 2,
                "oldestAgeSeconds": 3,
                "deadRecords": 4,
                "corruptRecords": 5,
            },
        )


class SourcesTests(SynchronousTestCase):
    def test_those_that_need_no_credential(self) -> None:
        any_source = resolve({}, {}).sources["chatwoot"]
        sources = {name: evolve(any_source, name=name) for name in ("signed", "open", "by_token")}
        sources["signed"] = evolve(sources["signed"], secrets=("secret",))
        sources["by_token"] = evolve(sources["by_token"], tokens=("token",))

        self.assertEqual(describe_sources(sources), {"open": ["open"]})

"""From facts to one word, and a report that comes whatever its checks do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

from attrs import evolve
from msgspec.structs import replace
from twisted.internet.defer import Deferred, ensureDeferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from tests.support.fakes import MemorySpool
from tests.support.spools import make_job
from webhookd.config import resolve
from webhookd.model import SpoolStats
from webhookd.ops.health import Check, Health, Status, describe_breaker, describe_sources, describe_spool
from webhookd.redis.breaker import BreakerPolicy, CircuitBreaker

CHECK_DEADLINE_S = 0.5


async def up() -> Mapping[str, object]:
    return {"status": "up"}


async def broken() -> Mapping[str, object]:
    raise ZeroDivisionError("at 10.0.0.7")


def broken_at_once() -> NoReturn:
    raise ZeroDivisionError("at 10.0.0.7")


async def hanging() -> Mapping[str, object]:
    never: Deferred[Mapping[str, object]] = Deferred()
    return await never


class HealthTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.can_queue = True
        self.can_spool: bool | None = True

    def health(self, **checks: Check) -> Health:
        return Health(
            clock=self.clock,
            version="1.2.3",
            started_s=self.clock.seconds(),
            can_queue=lambda: self.can_queue,
            can_spool=lambda: self.can_spool,
            checks=checks,
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

    def test_a_daemon_that_ends_is_not_ready_whatever_it_can_do(self) -> None:
        health = self.health()
        health.drain()

        self.assertIs(health.status, Status.DRAINING)
        self.assertFalse(health.is_ready())

    def test_the_report(self) -> None:
        health = self.health(redis=up, queues=up)
        self.clock.advance(61.6)

        self.assertEqual(
            self.report(health),
            {
                "status": "ok",
                "version": "1.2.3",
                "uptimeSeconds": 62,
                "redis": {"status": "up"},
                "queues": {"status": "up"},
            },
        )

    def test_a_check_that_fails_says_so_without_detail_and_the_others_are_heard(self) -> None:
        for check in (broken, broken_at_once):
            report = self.report(self.health(redis=check, queues=up))

            self.assertEqual(report["redis"], {"error": "ZeroDivisionError"})
            self.assertEqual(report["queues"], {"status": "up"})

    def test_a_check_that_hangs_is_given_up_at_its_deadline_and_the_others_are_heard(self) -> None:
        reported = ensureDeferred(self.health(redis=hanging, queues=up).report())
        self.assertNoResult(reported)

        self.clock.advance(CHECK_DEADLINE_S)

        report = self.successResultOf(reported)
        self.assertEqual(report["redis"], {"error": "TimeoutError"})
        self.assertEqual(report["queues"], {"status": "up"})
        self.assertEqual(self.clock.getDelayedCalls(), [])


class SectionTests(SynchronousTestCase):
    NOW_MS = 1_788_264_005_123

    def spool(self, spool: MemorySpool | None) -> Mapping[str, object]:
        return self.successResultOf(ensureDeferred(describe_spool(spool, lambda: self.NOW_MS)))

    def test_where_the_breaker_stands(self) -> None:
        breaker = CircuitBreaker(BreakerPolicy(slow_call_s=1), lambda: 0.0)
        self.assertEqual(self.successResultOf(ensureDeferred(describe_breaker(breaker))), {"state": "closed"})

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
    def test_those_that_anybody_may_send_for(self) -> None:
        any_source = resolve({}, {}).sources["chatwoot"]
        sources = {name: evolve(any_source, name=name) for name in ("signed", "open", "by_token")}
        sources["signed"] = evolve(sources["signed"], secrets=("secret",))
        sources["by_token"] = evolve(sources["by_token"], tokens=("token",))

        report = self.successResultOf(ensureDeferred(describe_sources(sources)))

        self.assertEqual(report, {"open": ["open"]})

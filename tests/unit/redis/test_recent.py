"""The memory of what Redis acknowledged last: how far back it goes, and how much it holds."""

from __future__ import annotations

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from tests.support.spools import job_number, make_job
from webhookd.model import Job
from webhookd.redis.recent import RecentJobs

_MIB = 1 << 20


class RecentJobsTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.recent = RecentJobs(self.clock)

    def add(self, *numbers: int) -> None:
        self.recent.add([make_job(number) for number in numbers])

    def take(self) -> list[int]:
        return [job_number(job) for job in self.recent.take()]

    def test_they_come_back_oldest_first_and_once(self) -> None:
        self.add(3, 1)
        self.add(2)
        self.assertEqual(self.take(), [3, 1, 2])
        self.assertEqual(self.take(), [])

    def test_a_job_comes_back_whole(self) -> None:
        job = Job("q", "a.1", "created", b"{}", b"{}", 17, delay_ms=5, priority=3, lifo=True)
        self.recent.add([job])
        self.assertEqual(self.recent.take(), [job])

    def test_ten_seconds_before_the_latest_acknowledgement(self) -> None:
        self.add(1)
        self.clock.advance(10)
        self.add(2)
        self.assertEqual(self.take(), [1, 2])

    def test_no_more_than_ten_seconds(self) -> None:
        self.add(1)
        self.clock.advance(1)
        self.add(2)
        self.clock.advance(9.5)
        self.add(3)
        self.assertEqual(self.take(), [2, 3])

    def test_nothing_is_forgotten_while_redis_is_away(self) -> None:
        self.add(1, 2)
        self.clock.advance(3600)
        self.assertEqual(self.take(), [1, 2])

    def test_at_most_24_mib(self) -> None:
        jobs = [make_job(number, data=b"x" * _MIB) for number in range(40)]
        for job in jobs:
            self.recent.add([job])
        kept = self.recent.take()
        self.assertEqual(kept, jobs[-23:])  # each is a little more than its data
        self.assertLessEqual(sum(job.size_bytes for job in kept), 24 * _MIB)

    def test_the_bound_holds_over_many_turns(self) -> None:
        """Jobs that were taken or forgotten no longer count."""
        for _ in range(3):
            for number in range(40):
                self.recent.add([make_job(number, data=b"x" * _MIB)])
            self.assertEqual(len(self.recent.take()), 23)
            self.add(1)
            self.clock.advance(11)

    def test_a_job_larger_than_the_bound_is_not_kept(self) -> None:
        self.add(1)
        self.recent.add([make_job(2, data=b"x" * 33 * _MIB)])
        self.assertEqual(self.take(), [])

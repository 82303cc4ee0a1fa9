"""A fake can be trusted because it keeps the contract of its interface, as the real object does."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, TypeVar

from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase

from tests.support.fakes import NOT_SENT, AcceptingSink, MemorySpool, PickySink, RefusingSink
from tests.support.spools import Replica, make_job, numbers
from webhookd.model import ISpool, Job, Outcome, QueueUnavailable, SpoolUnavailable
from webhookd.spool.database import SpoolLimits
from webhookd.spool.record import encode_record

_ANY_BYTES = 1 << 30
_T = TypeVar("_T")


class SinkTests(SynchronousTestCase):
    def test_a_job_is_added_once(self) -> None:
        sink = AcceptingSink()
        outcomes = [self.successResultOf(sink.add(make_job(number))).outcome for number in (1, 2, 1)]
        self.assertEqual(outcomes, [Outcome.QUEUED, Outcome.QUEUED, Outcome.ALREADY_QUEUED])
        self.assertEqual(sink.queue, [1, 2])

    def test_a_refusal_is_one_of_the_contract(self) -> None:
        for sink in RefusingSink(), PickySink({1: NOT_SENT}):
            self.failureResultOf(sink.add(make_job(1)), QueueUnavailable)


class MemorySpoolTests(SynchronousTestCase):
    """The contract of ISpool."""

    def setUp(self) -> None:
        self.spool = self.make_spool()

    def make_spool(self) -> ISpool:
        """Make a spool with room for three jobs."""
        return MemorySpool(max_records=3)

    def now(self, deferred: Deferred[_T]) -> _T:
        return self.successResultOf(deferred)

    def fails(self, deferred: Deferred[Any]) -> None:
        self.failureResultOf(deferred, SpoolUnavailable)

    def append(self, *job_numbers: int) -> list[Outcome]:
        return [self.now(self.spool.append(make_job(number))).outcome for number in job_numbers]

    def held(self, limit: int = 100, max_bytes: int = _ANY_BYTES) -> list[int]:
        return numbers(self.now(self.spool.first(limit, max_bytes)))

    def sequences(self) -> list[int]:
        return [record.sequence for record in self.now(self.spool.first(100, _ANY_BYTES))]

    def size_bytes(self, job: Job) -> int:
        return job.size_bytes

    def test_jobs_come_back_whole_and_in_order(self) -> None:
        self.assertEqual(self.append(3, 1, 2), [Outcome.SPOOLED] * 3)
        self.assertEqual(self.held(), [3, 1, 2])
        self.assertEqual(self.now(self.spool.first(1, _ANY_BYTES))[0].job, make_job(3))

    def test_first_is_bounded(self) -> None:
        self.append(1, 2, 3)
        self.assertEqual(self.held(limit=2), [1, 2])
        size_bytes = self.size_bytes(make_job(1))
        self.assertEqual(self.held(max_bytes=1), [1])
        self.assertEqual(self.held(max_bytes=2 * size_bytes), [1, 2])
        self.assertEqual(self.held(max_bytes=3 * size_bytes - 1), [1, 2])

    def test_a_job_is_in_it_once(self) -> None:
        self.assertEqual(self.append(1, 1), [Outcome.SPOOLED, Outcome.ALREADY_QUEUED])
        other = self.spool.append(make_job(1, queue="other"))
        self.assertEqual(self.now(other).outcome, Outcome.SPOOLED)

    def test_removing(self) -> None:
        self.append(1, 2)
        first, second = self.sequences()
        self.now(self.spool.remove([first, first, 1000]))
        self.assertEqual(self.held(), [2])
        self.now(self.spool.remove([second]))
        self.assertTrue(self.spool.is_empty)
        self.append(1)
        self.assertGreater(self.sequences()[0], second)

    def test_burying(self) -> None:
        self.append(1, 2)
        self.now(self.spool.bury(self.sequences()[0], "no"))
        self.assertEqual(self.held(), [2])
        self.assertEqual((self.spool.stats.records, self.spool.stats.dead_records), (1, 1))

    def test_stats(self) -> None:
        self.assertTrue(self.spool.is_empty)
        self.append(5, 1)
        stats = self.spool.stats
        self.assertEqual((stats.records, stats.oldest_received_at_ms), (2, make_job(5).timestamp_ms))
        self.assertFalse(self.spool.is_empty)

    def test_when_it_is_full_it_takes_no_more_and_gives_what_it_has(self) -> None:
        self.append(1, 2, 3)
        self.fails(self.spool.append(make_job(4)))
        self.assertEqual(self.spool.stats.problem, "full")
        self.assertEqual(self.append(2), [Outcome.ALREADY_QUEUED])
        self.now(self.spool.remove(self.sequences()[:1]))
        self.assertEqual(self.append(4), [Outcome.SPOOLED])
        self.assertEqual(self.held(), [2, 3, 4])


class DiskSpoolTests(MemorySpoolTests):
    """The contract of ISpool for the real spool, which works at once, in the test's thread."""

    def make_spool(self) -> ISpool:
        root = Path(mkdtemp())
        self.addCleanup(shutil.rmtree, root)
        limits = SpoolLimits(min_free_bytes=0, max_bytes=3 * self.size_bytes(make_job(1)))
        return self.now(Replica(root, limits=limits).spools.open_own())

    def size_bytes(self, job: Job) -> int:
        return len(encode_record(job))

"""The promises of the spool, on real files, and on a disk that fails on demand."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from tempfile import mkdtemp

from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import LogLevel
from twisted.trial.unittest import TestCase

from tests.support.spools import Disk, HeldBack, job_number, make_job
from tests.unit.spool.case import SpoolCase, names_in
from webhookd.model import Job, Outcome, Receipt
from webhookd.spool.database import SpoolLimits
from webhookd.spool.directory import SpoolRoot
from webhookd.spool.queue import Spools, SpoolThread
from webhookd.spool.record import encode_record
from webhookd.spool.requests import ListRecords, Purge, Requeue
from webhookd.spool.schema import Table

DEAD = ListRecords(Table.DEAD)


class QueueTests(SpoolCase):
    def test_an_appended_job_comes_back_whole(self) -> None:
        job = Job("q{a}", "id ü", "näme", b"\x00\xff" * 5000, b"{}", 17, delay_ms=5, priority=3, lifo=True)
        spool = self.open()
        self.assertEqual(self.now(spool.append(job)), Receipt(Outcome.SPOOLED, "id ü", "näme"))
        (record,) = self.now(spool.first(10, 1))
        self.assertEqual(record.job, job)

    def test_a_sequence_is_never_used_again(self) -> None:
        """A removal that comes late, after a failure, must not delete a newer record."""
        disk = Disk()
        spool = self.open(disk=disk)
        self.append(spool, 1)
        stale = self.sequences(spool)
        self.now(spool.remove(stale))
        disk.error_code = sqlite3.SQLITE_IOERR  # closes the file
        self.assert_unavailable(spool.append(make_job(2)), "broken")
        disk.error_code = None
        self.append(spool, 3)
        self.now(spool.remove(stale))
        self.assertEqual(self.held(spool), [3])

    def test_stats_follow(self) -> None:
        spool = self.open()
        size = len(encode_record(make_job(1)))
        self.append(spool, 1, 2, 3)
        first, second, _ = self.sequences(spool)
        self.now(spool.bury(second, "no"))
        self.now(spool.remove([first]))
        stats = spool.stats
        self.assertEqual((stats.records, stats.bytes, stats.dead_records), (1, size, 1))
        self.assertEqual(stats.oldest_received_at_ms, make_job(3).timestamp_ms)
        self.assertIsNone(stats.problem)
        self.now(spool.close())
        self.assertEqual(self.open().stats, stats)

    def test_totals_that_cannot_be_true_are_counted_again(self) -> None:
        spool = self.open()
        self.append(spool, 1, 2)
        stats = spool.stats
        with closing(sqlite3.connect(self.database_of(spool))) as connection:
            connection.execute("UPDATE totals SET records = 7, bytes = 7, dead = 7")
            connection.commit()
        self.assertEqual(self.open().stats, stats)


class GroupTests(SpoolCase):
    def setUp(self) -> None:
        super().setUp()
        self.run_later = HeldBack()
        self.disk = Disk()
        self.opening = self.replica(run=self.run_later, disk=self.disk).spools.open_own()
        self.run_later.go()
        self.spool = self.now(self.opening)
        self.disk.commits = 0

    def test_nothing_is_acknowledged_before_the_commit(self) -> None:
        receipt = self.spool.append(make_job(1))
        self.assertNoResult(receipt)
        self.run_later.go()
        self.assertEqual(self.now(receipt).outcome, Outcome.SPOOLED)
        self.assertEqual(self.held_after_a_crash(), [1])

    def test_all_that_waits_is_one_commit(self) -> None:
        receipts = [self.spool.append(make_job(number)) for number in range(10)]
        self.run_later.go()  # the first alone: it did not wait
        self.assertEqual(self.disk.commits, 2)
        self.assertEqual([self.now(receipt).outcome for receipt in receipts], [Outcome.SPOOLED] * 10)
        self.assertEqual(self.held_after_a_crash(), list(range(10)))

    def test_two_of_the_same_in_one_group(self) -> None:
        receipts = [self.spool.append(make_job(number)) for number in (0, 1, 1)]
        self.run_later.go()
        expected = [Outcome.SPOOLED, Outcome.SPOOLED, Outcome.ALREADY_QUEUED]
        self.assertEqual([self.now(receipt).outcome for receipt in receipts], expected)

    def test_what_waits_is_bounded(self) -> None:
        run_later = HeldBack()
        opening = self.replica(
            run=run_later, limits=SpoolLimits(min_free_bytes=0, max_waiting=2)
        ).spools.open_own()
        run_later.go()
        spool = self.now(opening)
        receipts = [spool.append(make_job(number)) for number in range(3)]
        self.assert_unavailable(spool.append(make_job(3)), "busy")
        run_later.go()
        self.assertEqual([self.now(receipt).outcome for receipt in receipts], [Outcome.SPOOLED] * 3)

    def test_a_cancelled_append_is_not_taken_back(self) -> None:
        receipt = self.spool.append(make_job(1))
        receipt.cancel()
        self.failureResultOf(receipt, CancelledError)
        self.run_later.go()
        self.assertEqual(self.held_after_a_crash(), [1])

    def test_close_finishes_what_waits(self) -> None:
        receipts = [self.spool.append(make_job(number)) for number in range(3)]
        closed = self.spool.close()
        for late in self.spool.append(make_job(3)), self.spool.check(), self.spool.close():
            self.assert_unavailable(late, "closed")
        self.run_later.go()
        self.assertEqual([self.now(receipt).outcome for receipt in receipts], [Outcome.SPOOLED] * 3)
        self.assertIsNone(self.now(closed))
        self.assertEqual(names_in(self.spool.directory.path), ["lock", "spool.sqlite"])
        self.assertEqual(self.held(self.open()), [0, 1, 2])

    def test_a_bug_in_one_group_does_not_stop_the_next(self) -> None:
        appended = [self.spool.append(make_job(number)) for number in (1, 2)]
        self.run_later.go()
        self.assertEqual([self.now(receipt).outcome for receipt in appended], [Outcome.SPOOLED] * 2)
        broken = self.spool.first(10, "no number")  # type: ignore[arg-type]
        self.run_later.go()
        self.failureResultOf(broken, TypeError)
        after = self.spool.append(make_job(3))
        self.run_later.go()
        self.assertEqual(self.now(after).outcome, Outcome.SPOOLED)

    def held_after_a_crash(self) -> list[int]:
        return self.held(self.open_after_a_crash())


class BoundTests(SpoolCase):
    SIZE = len(encode_record(make_job(1)))

    def test_full(self) -> None:
        spool = self.open(limits=SpoolLimits(max_bytes=2 * self.SIZE, min_free_bytes=0))
        self.append(spool, 1, 2)
        self.assertEqual(spool.stats.problem, "full")
        self.assert_unavailable(spool.append(make_job(3)), "full")
        self.assert_unavailable(spool.check(), "full")
        self.assertEqual(self.now(spool.append(make_job(1))).outcome, Outcome.ALREADY_QUEUED)
        self.now(spool.remove(self.sequences(spool)[:1]))
        self.assertIsNone(spool.stats.problem)
        self.append(spool, 3)
        self.assertEqual(self.held(spool), [2, 3])

    def test_it_is_full_for_what_it_has_refused_although_less_would_fit(self) -> None:
        spool = self.open(limits=SpoolLimits(max_bytes=3 * self.SIZE - 1, min_free_bytes=0))
        self.append(spool, 1, 2)
        self.assertIsNone(spool.stats.problem)
        self.assert_unavailable(spool.append(make_job(3)), "full")
        self.assertEqual(spool.stats.problem, "full")
        self.assert_unavailable(spool.check(), "full")
        self.now(spool.remove(self.sequences(spool)[:1]))
        self.assertIsNone(spool.stats.problem)

    def test_some_of_the_disk_is_left_free(self) -> None:
        disk = Disk(free_bytes=1000 + 2 * self.SIZE)
        run_later = HeldBack()
        opening = self.replica(
            disk=disk, run=run_later, limits=SpoolLimits(min_free_bytes=1000)
        ).spools.open_own()
        run_later.go()
        spool = self.now(opening)
        receipts = [spool.append(make_job(number)) for number in range(4)]
        run_later.go()  # the first alone, then the rest in one group
        self.assertEqual(self.now(receipts[1]).outcome, Outcome.SPOOLED)
        self.assertEqual(self.now(receipts[2]).outcome, Outcome.SPOOLED)
        self.assert_unavailable(receipts[3], "disk full")
        disk.free_bytes = 999
        check, duplicate = spool.check(), spool.append(make_job(1))
        run_later.go()
        self.assert_unavailable(check, "disk full")
        self.assertEqual(spool.stats.problem, "disk full")
        self.assertEqual(self.now(duplicate).outcome, Outcome.ALREADY_QUEUED)
        disk.free_bytes = 1 << 30
        check = spool.check()
        run_later.go()
        self.assertIsNone(self.now(check))
        self.assertIsNone(spool.stats.problem)


class FailureTests(SpoolCase):
    def setUp(self) -> None:
        super().setUp()
        self.disk = Disk()
        self.spool = self.open(disk=self.disk)
        self.append(self.spool, 1)

    def fail_to_append(self, number: int, error_code: int, reason: str) -> None:
        self.disk.error_code = error_code
        self.assert_unavailable(self.spool.append(make_job(number)), reason)
        self.assertTrue((self.spool.stats.problem or "").startswith(reason))
        self.assertEqual(self.spool.stats.records, 1)

    def heal(self) -> None:
        self.disk.error_code = None
        self.append(self.spool, 3)
        self.assertIsNone(self.spool.stats.problem)
        self.assertEqual(self.spool.stats.records, 2)
        self.assertEqual(self.held(self.spool), [1, 3])
        self.assertEqual(self.held(self.open_after_a_crash()), [1, 3])

    def test_a_full_disk(self) -> None:
        self.fail_to_append(2, sqlite3.SQLITE_FULL, "disk full")
        self.heal()

    def test_after_a_failed_fsync_the_file_is_opened_again(self) -> None:
        opened = self.disk.opened
        self.fail_to_append(2, sqlite3.SQLITE_IOERR_FSYNC, "broken")
        self.fail_to_append(2, sqlite3.SQLITE_IOERR_FSYNC, "broken")
        self.heal()
        self.assertEqual(self.disk.opened, opened + 2)

    def test_a_disk_that_became_read_only(self) -> None:
        self.fail_to_append(2, sqlite3.SQLITE_READONLY, "broken")
        self.heal()

    def test_a_group_that_failed_after_its_last_write_may_be_there_once(self) -> None:
        self.disk.fails_late = True
        self.fail_to_append(2, sqlite3.SQLITE_IOERR_FSYNC, "broken")
        self.disk.error_code = None
        self.assertEqual(self.now(self.spool.append(make_job(2))).outcome, Outcome.ALREADY_QUEUED)
        self.append(self.spool, 3)
        self.assertEqual(self.spool.stats.records, 3)
        self.assertEqual(self.held(self.spool), [1, 2, 3])

    def test_the_problem_is_logged_once(self) -> None:
        for _ in range(3):
            self.fail_to_append(2, sqlite3.SQLITE_FULL, "disk full")
        self.heal()
        self.assertEqual(self.logged_at(LogLevel.error), 1)

    def test_a_removal_that_failed_is_undone(self) -> None:
        sequences = self.sequences(self.spool)
        self.disk.error_code = sqlite3.SQLITE_IOERR_WRITE
        self.assert_unavailable(self.spool.remove(sequences), "broken")
        self.heal()


class DeadLetterTests(SpoolCase):
    def setUp(self) -> None:
        super().setUp()
        self.started = self.replica(limits=SpoolLimits(min_free_bytes=0, dead_max_age_ms=60_000))
        self.started.clock.advance(1000)
        self.spool = self.now(self.started.spools.open_own())
        self.append(self.spool, 1, 2, 3)

    def bury(self, count: int) -> None:
        for sequence in self.sequences(self.spool)[:count]:
            self.now(self.spool.bury(sequence, f"WRONGTYPE {sequence}"))

    def test_a_dead_letter_does_not_block_the_rest(self) -> None:
        self.bury(1)
        self.assertEqual(self.held(self.spool), [2, 3])
        (letter,) = self.now(self.spool.do(DEAD))
        self.assertEqual((letter.queue, letter.job_id), ("chatwoot", make_job(1).id))
        self.assertEqual(
            (letter.received_at_ms, letter.set_aside_at_ms), (make_job(1).timestamp_ms, 1_000_000)
        )
        self.assertEqual(letter.reason, f"WRONGTYPE {letter.sequence}")

    def test_bury_passes_over_what_it_does_not_know(self) -> None:
        self.now(self.spool.bury(1000, "no"))
        self.assertEqual((self.spool.stats.dead_records, self.spool.stats.records), (0, 3))

    def test_they_are_listed_in_pages(self) -> None:
        self.bury(3)
        first, second = self.now(self.spool.do(ListRecords(Table.DEAD, limit=2)))
        (third,) = self.now(self.spool.do(ListRecords(Table.DEAD, second.sequence, limit=2)))
        self.assertEqual(
            [letter.job_id for letter in (first, second, third)], [make_job(n).id for n in (1, 2, 3)]
        )

    def test_requeued_ones_go_to_the_end(self) -> None:
        self.bury(2)
        (first, _) = self.now(self.spool.do(DEAD))
        self.assertEqual(self.now(self.spool.do(Requeue([first.sequence, 1000]))), 1)
        self.assertEqual(self.held(self.spool), [3, 1])
        self.assertEqual((self.spool.stats.records, self.spool.stats.dead_records), (2, 1))

    def test_one_whose_job_came_again_is_dropped(self) -> None:
        self.bury(1)
        self.append(self.spool, 1)
        (letter,) = self.now(self.spool.do(DEAD))
        self.assertEqual(self.now(self.spool.do(Requeue([letter.sequence]))), 1)
        self.assertEqual(self.held(self.spool), [2, 3, 1])
        self.assertEqual((self.spool.stats.records, self.spool.stats.dead_records), (3, 0))

    def test_purge(self) -> None:
        self.bury(2)
        first, second = self.now(self.spool.do(DEAD))
        self.assertEqual(self.now(self.spool.do(Purge(Table.DEAD, [first.sequence, 1000]))), 1)
        self.assertEqual(self.now(self.spool.do(DEAD)), [second])

    def test_they_have_an_age_limit(self) -> None:
        self.bury(1)
        self.started.clock.advance(50)
        self.bury(1)
        self.now(self.spool.expire_dead())
        self.assertEqual(self.spool.stats.dead_records, 2)
        self.started.clock.advance(20)
        self.now(self.spool.expire_dead())
        self.assertEqual(self.spool.stats.dead_records, 1)
        self.assertEqual([letter.job_id for letter in self.now(self.spool.do(DEAD))], [make_job(2).id])


class PrivacyTests(SpoolCase):
    def test_modes_do_not_depend_on_the_umask(self) -> None:
        for umask in (0, 0o777):
            before = os.umask(umask)
            try:
                spool = self.open()
                self.append(spool, 1)
            finally:
                os.umask(before)
            self.assertEqual(self.modes(self.root), {0o700})
            self.assertEqual(self.modes(spool.directory.path), {0o700})
            files = set(spool.directory.path.iterdir())
            self.assertEqual({path.name for path in files}, {"lock", "spool.sqlite", "spool.sqlite-wal"})
            self.assertEqual(self.modes(*files), {0o600})
            self.now(spool.remove(self.sequences(spool)))
            self.now(spool.close())
            self.root.rmdir()

    def test_what_was_removed_is_not_on_disk_any_more(self) -> None:
        spool = self.open()
        self.now(spool.append(make_job(1, data=b"canary" * 2000)))
        self.assertTrue(self.is_on_disk(b"canary"))
        self.now(spool.remove(self.sequences(spool)))
        self.assertFalse(self.is_on_disk(b"canary"))

    def test_an_empty_spool_gives_its_room_back(self) -> None:
        spool = self.open()
        for number in range(20):
            self.now(spool.append(make_job(number, data=b"x" * 100_000)))
        self.now(spool.remove(self.sequences(spool)))
        self.assertLess(sum(path.stat().st_size for path in spool.directory.path.iterdir()), 100_000)

    def modes(self, *paths: Path) -> set[int]:
        return {stat.S_IMODE(path.stat().st_mode) for path in paths}

    def is_on_disk(self, content: bytes) -> bool:
        return any(content in path.read_bytes() for path in self.root.rglob("*") if path.is_file())


class ThreadTests(TestCase):
    def setUp(self) -> None:
        self.root = Path(mkdtemp())
        self.addCleanup(shutil.rmtree, self.root)

    async def test_all_of_it_in_a_real_thread(self) -> None:
        from twisted.internet import reactor

        thread = SpoolThread(reactor)  # type: ignore[arg-type]
        thread.start()
        self.addCleanup(thread.stop)
        spools = Spools(SpoolRoot(self.root, "ours"), thread, lambda: 0, SpoolLimits())
        spool = await spools.open_own()
        appended: Sequence[Deferred[Receipt]] = [spool.append(make_job(number)) for number in range(100)]
        for receipt in appended:
            self.assertEqual((await receipt).outcome, Outcome.SPOOLED)
        records = await spool.first(1000, 1 << 20)
        self.assertEqual([job_number(record.job) for record in records], list(range(100)))
        await spool.remove([record.sequence for record in records])
        await spool.close()
        self.assertEqual(names_in(self.root), [])

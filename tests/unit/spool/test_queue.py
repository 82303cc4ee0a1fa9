"""The spool, one promise at a time: in one thread, on real files, with a disk that fails when told to."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import sqlite3
import stat
import struct
import sys
import threading
import zlib
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, TypeVar, cast

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import ILogObserver, LogEvent, LogLevel, globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase, TestCase

from tests.support.spools import Disk, HeldBack, Replica, as_after_a_crash, job_number, make_job, numbers
from webhookd.model import ConfigError, Job, Outcome, Receipt, SpoolUnavailable
from webhookd.spool.database import CorruptRecord, SpoolLimits, decode_record, encode_record
from webhookd.spool.directory import SpoolDirectory, SpoolRoot, file_system_type, hold
from webhookd.spool.queue import Spool, Spools, SpoolThread
from webhookd.spool.requests import ListRows, Purge, Requeue, Table

_T = TypeVar("_T")

DEAD = ListRows(Table.DEAD)

jobs = st.builds(
    Job,
    queue=st.text(),
    id=st.text(),
    name=st.text(),
    data=st.binary(),
    options=st.binary(),
    timestamp_ms=st.integers(0, 2**53),
    delay_ms=st.integers(0, 2**53),
    priority=st.integers(0, 2**21),
    lifo=st.booleans(),
)


def names_in(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


class RecordTests(SynchronousTestCase):
    @given(jobs)
    def test_a_record_keeps_all_of_a_job(self, job: Job) -> None:
        self.assertEqual(decode_record(encode_record(job)), job)

    def test_each_flipped_bit_is_found(self) -> None:
        record = encode_record(make_job(1))
        for position in range(8 * len(record)):
            flipped = bytearray(record)
            flipped[position // 8] ^= 1 << position % 8
            self.assertRaises(CorruptRecord, decode_record, bytes(flipped))

    def test_each_torn_end_is_found(self) -> None:
        record = encode_record(make_job(1))
        for length in range(len(record)):
            self.assertRaises(CorruptRecord, decode_record, record[:length])

    def test_another_version_is_not_guessed_at(self) -> None:
        rest = struct.pack(">B", 2) + encode_record(make_job(1))[5:]
        self.assertRaises(CorruptRecord, decode_record, struct.pack(">I", zlib.crc32(rest)) + rest)


class SpoolCase(SynchronousTestCase):
    """A spool root, and whoever starts on it."""

    def setUp(self) -> None:
        self.root = Path(mkdtemp()) / "spool"
        self.addCleanup(shutil.rmtree, self.root.parent)
        self.logged: list[LogEvent] = []
        observer = cast(ILogObserver, self.logged.append)
        globalLogPublisher.addObserver(observer)
        self.addCleanup(globalLogPublisher.removeObserver, observer)

    def now(self, deferred: Deferred[_T]) -> _T:
        return self.successResultOf(deferred)

    def replica(self, **settings: Any) -> Replica:
        return Replica(self.root, **settings)

    def open(self, **settings: Any) -> Spool:
        return self.now(self.replica(**settings).spools.open_own())

    def open_after_a_crash(self, **settings: Any) -> Spool:
        """The spool of a replica that is started when all others were killed at this moment."""
        copy = as_after_a_crash(self.root, self.root.parent / "after the crash")
        return self.now(Replica(copy, **settings).spools.open_own())

    def append(self, spool: Spool, *job_numbers: int) -> None:
        for number in job_numbers:
            self.assertEqual(self.now(spool.append(make_job(number))).outcome, Outcome.SPOOLED)

    def held(self, spool: Spool) -> list[int]:
        return numbers(self.now(spool.first(1000, 1 << 30)))

    def sequences(self, spool: Spool) -> list[int]:
        return [record.sequence for record in self.now(spool.first(1000, 1 << 30))]

    def assert_unavailable(self, deferred: Deferred[Any], *reasons: str) -> None:
        message = str(self.failureResultOf(deferred, SpoolUnavailable).value)
        self.assertTrue(message.startswith(reasons), message)

    def database_of(self, spool: Spool) -> Path:
        """The file of a spool that is closed first."""
        self.now(spool.close())
        return spool.directory.database

    def logged_at(self, level: LogLevel) -> int:
        return sum(event["log_level"] == level for event in self.logged)


class QueueTests(SpoolCase):
    def test_an_appended_job_comes_back_whole(self) -> None:
        job = Job("q{a}", "id ü", "näme", b"\x00\xff" * 5000, b"{}", 17, delay_ms=5, priority=3, lifo=True)
        spool = self.open()
        self.assertEqual(self.now(spool.append(job)), Receipt(Outcome.SPOOLED, "id ü", "näme"))
        (record,) = self.now(spool.first(10, 1))
        self.assertEqual(record.job, job)

    def test_a_job_id_is_in_it_once(self) -> None:
        spool = self.open()
        self.append(spool, 1)
        self.assertEqual(self.now(spool.append(make_job(1))).outcome, Outcome.ALREADY_QUEUED)
        self.assertEqual(self.now(spool.append(make_job(1, queue="other"))).outcome, Outcome.SPOOLED)
        self.assertEqual(self.held(spool), [1, 1])
        self.now(spool.remove(self.sequences(spool)))
        self.append(spool, 1)

    def test_records_leave_in_the_order_in_which_they_came(self) -> None:
        spool = self.open()
        self.append(spool, 5, 3, 9)
        self.assertEqual(self.held(spool), [5, 3, 9])
        self.assertEqual(numbers(self.now(spool.first(2, 1 << 20))), [5, 3])

    def test_first_is_bounded_in_bytes_but_for_one(self) -> None:
        spool = self.open()
        self.append(spool, 1, 2, 3)
        size = len(encode_record(make_job(1)))
        self.assertEqual(numbers(self.now(spool.first(10, 1))), [1])
        self.assertEqual(numbers(self.now(spool.first(10, 2 * size))), [1, 2])
        self.assertEqual(numbers(self.now(spool.first(10, 3 * size - 1))), [1, 2])

    def test_remove_passes_over_what_it_does_not_know(self) -> None:
        spool = self.open()
        self.append(spool, 1, 2)
        first, second = self.sequences(spool)
        self.now(spool.remove([first, first, 1000]))
        self.assertEqual(self.sequences(spool), [second])

    def test_a_sequence_is_never_used_again(self) -> None:
        """A removal that comes late, after a failure, must not hit a newer record."""
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

    def test_totals_that_cannot_be_true_are_made_anew(self) -> None:
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
        closed = [self.spool.close(), self.spool.close()]
        self.assert_unavailable(self.spool.append(make_job(3)), "closed")
        self.run_later.go()
        self.assertEqual([self.now(receipt).outcome for receipt in receipts], [Outcome.SPOOLED] * 3)
        self.assertEqual([self.now(deferred) for deferred in closed], [None, None])
        self.assertEqual(names_in(self.spool.directory.path), ["lock", "spool.sqlite"])
        self.now(self.spool.close())
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


class DamageTests(SpoolCase):
    """Records are big enough that only a few are in one page of the file."""

    DATA = b"x" * 1500

    def fill(self, count: int) -> Path:
        """The closed file of a spool with so many records."""
        spool = self.open()
        for number in range(count):
            self.now(spool.append(make_job(number, data=self.DATA)))
        return self.database_of(spool)

    def flip(self, database: Path, offset: int, length: int = 1) -> None:
        with database.open("r+b") as file:
            file.seek(offset)
            content = file.read(length)
            file.seek(offset)
            file.write(bytes(byte ^ 0xFF for byte in content))

    def evidence(self, database: Path) -> list[str]:
        return sorted(path.name for path in database.parent.glob("*.corrupt-*[0-9]"))

    def test_a_corrupt_record_is_set_aside_and_the_rest_drains(self) -> None:
        database = self.fill(30)
        content = database.read_bytes()
        self.flip(database, content.index(make_job(17).id.encode() + b'"'))
        spool = self.open()
        self.assertEqual(self.held(spool), [number for number in range(30) if number != 17])
        self.assertEqual((spool.stats.records, spool.stats.corrupt_records), (29, 1))
        self.assertEqual(self.evidence(database), [])
        self.now(spool.close())
        self.assertEqual(self.open().stats, spool.stats)

    def test_corrupt_records_expire_like_dead_letters(self) -> None:
        database = self.fill(1)
        self.flip(database, database.read_bytes().index(self.DATA))
        replica = self.replica(limits=SpoolLimits(min_free_bytes=0, dead_max_age_ms=1000))
        spool = self.now(replica.spools.open_own())
        self.assertEqual(self.held(spool), [])
        replica.clock.advance(1.5)
        self.assertEqual(self.now(spool.expire_dead()), 1)
        self.assertEqual(spool.stats.corrupt_records, 0)

    def test_a_page_that_is_broken_costs_its_records_alone(self) -> None:
        database = self.fill(200)
        page = database.read_bytes().index(make_job(100).id.encode() + b'"') // 4096 * 4096
        self.flip(database, page, 16)
        spool = self.open()
        held = self.held(spool)  # finds the damage, and reads again
        lost = set(range(200)) - set(held)
        self.assertEqual(held, sorted(held))
        self.assertIn(100, lost)
        self.assertLessEqual(len(lost), 2)
        self.assertEqual(spool.stats.records, len(held))
        self.assertEqual(self.evidence(database), ["spool.sqlite.corrupt-1"])
        self.assertEqual([name for name in names_in(database.parent) if ".old" in name], [])
        self.append(spool, 1000)
        self.assertGreater(self.logged_at(LogLevel.critical), 0)

    def test_a_broken_first_or_last_page_too(self) -> None:
        for number, lost_at_most in ((0, 2), (199, 2)):
            database = self.fill(200)
            page = database.read_bytes().index(make_job(number).id.encode() + b'"') // 4096 * 4096
            self.flip(database, page, 16)
            spool = self.open()
            self.assertGreaterEqual(len(self.held(spool)), 200 - lost_at_most)
            self.now(spool.close())
            shutil.rmtree(self.root)

    def test_a_file_that_is_not_a_database_begins_anew(self) -> None:
        for garbage in (b"", b"no database, but some text that is long enough" * 100):
            database = self.fill(3)
            database.write_bytes(garbage)
            spool = self.open()
            self.assertEqual(self.held(spool), [])
            self.append(spool, 1)
            self.assertEqual(self.evidence(database), ["spool.sqlite.corrupt-1"])
            self.assertEqual((database.parent / "spool.sqlite.corrupt-1").read_bytes(), garbage)
            self.now(spool.close())
            shutil.rmtree(self.root)

    def test_evidence_is_not_overwritten_and_keeps_the_directory(self) -> None:
        database = self.fill(1)
        for _ in range(2):
            database.write_bytes(b"")
            self.now(self.open().close())
        self.assertEqual(self.evidence(database), ["spool.sqlite.corrupt-1", "spool.sqlite.corrupt-2"])

    def test_a_crash_in_each_step_of_a_new_beginning(self) -> None:
        beginnings = {
            "the WAL is not renamed yet": {"spool.sqlite": ".old", "spool.sqlite-wal": "-wal"},
            "all is renamed": {"spool.sqlite": ".old", "spool.sqlite-wal": ".old-wal"},
        }
        for name, renamed in beginnings.items():
            spool = self.open()
            self.append(spool, 1, 2, 3)
            copy = as_after_a_crash(self.root, self.root.parent / name)
            directory = copy / spool.directory.path.name
            for old, suffix in renamed.items():
                (directory / old).rename(directory / f"spool.sqlite{suffix}")
            (directory / "spool.sqlite.new").write_bytes(b"half of it")
            after = self.now(Replica(copy).spools.open_own())
            self.assertEqual(after.directory.path, directory, name)
            self.assertEqual(self.held(after), [1, 2, 3], name)
            self.assertEqual(self.evidence(after.directory.database)[:1], ["spool.sqlite.corrupt-1"], name)
            self.now(spool.remove(self.sequences(spool)))
            self.now(spool.close())

    def test_a_crash_before_the_evidence_has_its_name(self) -> None:
        database = self.fill(3)
        (database.parent / "spool.sqlite.old").write_bytes(b"the damaged one")
        spool = self.open()
        self.assertEqual(self.held(spool), [0, 1, 2])
        self.assertEqual(self.evidence(database), ["spool.sqlite.corrupt-1"])
        self.assertEqual((database.parent / "spool.sqlite.corrupt-1").read_bytes(), b"the damaged one")

    def test_dead_letters_are_carried_over(self) -> None:
        spool = self.open()
        self.append(spool, *range(100))
        self.now(spool.bury(self.sequences(spool)[0], "no"))
        database = self.database_of(spool)
        self.flip(database, database.read_bytes().index(make_job(50).id.encode() + b'"') // 4096 * 4096, 16)
        spool = self.open()
        self.held(spool)
        self.assertEqual([letter.reason for letter in self.now(spool.do(DEAD))], ["no"])
        self.assertEqual(spool.stats.dead_records, 1)


class WalTests(SpoolCase):
    """A replica died, and a bit of its WAL was flipped afterwards."""

    COUNT = 8
    FRAMES_OF_A_COMMIT = 3
    FRAME_BYTES = 24 + 4096

    def setUp(self) -> None:
        super().setUp()
        spool = self.open()
        for number in range(self.COUNT):
            self.append(spool, number)  # a commit of its own
        self.database = spool.directory.database
        self.wal = self.database.with_name("spool.sqlite-wal").read_bytes()
        self.last_commit_at = len(self.wal) - self.FRAMES_OF_A_COMMIT * self.FRAME_BYTES

    def restart_on(self, wal: bytes) -> tuple[Spool, int]:
        """The spool that the next replica opens, and how many critical lines it logs."""
        self.database.with_name("spool.sqlite-wal").write_bytes(wal)
        copy = Path(mkdtemp(dir=self.root.parent)) / "spool"
        before = self.logged_at(LogLevel.critical)
        spool = self.now(Replica(as_after_a_crash(self.root, copy)).spools.open_own())
        return spool, self.logged_at(LogLevel.critical) - before

    def flipped(self, offset: int) -> bytes:
        return self.wal[:offset] + bytes([self.wal[offset] ^ 0x10]) + self.wal[offset + 1 :]

    def test_a_flipped_bit_cuts_nothing_off(self) -> None:
        in_heads = [32 + frame * self.FRAME_BYTES + byte for frame in (0, 4, 11) for byte in range(0, 24, 3)]
        for offset in (26, *in_heads, *range(60, self.last_commit_at, 1999)):
            spool, told = self.restart_on(self.flipped(offset))
            self.assertEqual(self.held(spool), list(range(self.COUNT)), offset)
            self.assertEqual(self.now(spool.append(make_job(3))).outcome, Outcome.ALREADY_QUEUED)
            self.append(spool, 1000)
            self.assertGreater(told, 0, offset)
            kept = spool.directory.path / "spool.sqlite.corrupt-1-wal"
            self.assertEqual(kept.read_bytes(), self.flipped(offset))

    def test_a_damaged_record_in_it_is_one_that_is_set_aside(self) -> None:
        name = make_job(3).id.encode() + b'", "name"'
        wal = self.wal.replace(name, name.swapcase())  # in each copy of its page
        spool, told = self.restart_on(wal)
        self.assertEqual(self.held(spool), [0, 1, 2, 4, 5, 6, 7])
        self.assertEqual((spool.stats.corrupt_records, told), (1, 1))

    def test_what_a_crash_tore_is_no_damage(self) -> None:
        for cut in range(self.last_commit_at, len(self.wal) - 512, 499):
            for torn in (self.wal[:cut], self.wal[:cut] + b"garbage." * 64 + self.wal[cut + 512 :]):
                spool, told = self.restart_on(torn)
                self.assertEqual((self.held(spool), told), (list(range(self.COUNT - 1)), 0), cut)


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
        first, second = self.now(self.spool.do(ListRows(Table.DEAD, limit=2)))
        (third,) = self.now(self.spool.do(ListRows(Table.DEAD, second.sequence, limit=2)))
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
        self.assertEqual(self.now(self.spool.expire_dead()), 0)
        self.started.clock.advance(20)
        self.assertEqual(self.now(self.spool.expire_dead()), 1)
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


class DirectoryTests(SpoolCase):
    def test_each_replica_has_a_directory_of_its_own(self) -> None:
        one, other = self.open(), self.open()
        self.assertNotEqual(one.directory.path, other.directory.path)
        self.append(one, 1)
        self.append(other, 1)

    def test_a_replica_goes_on_with_what_it_finds(self) -> None:
        spool = self.open()
        self.append(spool, 1, 2)
        self.now(spool.close())
        again = self.open()
        self.assertEqual(again.directory.path, spool.directory.path)
        self.assertEqual(self.held(again), [1, 2])

    def test_an_empty_directory_is_removed(self) -> None:
        spool = self.open()
        self.append(spool, 1)
        self.now(spool.remove(self.sequences(spool)))
        self.now(spool.close())
        self.assertEqual(names_in(self.root), [])

    def test_a_socket_in_it_is_no_content(self) -> None:
        dead, replica = self.open(), self.replica()
        self.now(replica.spools.open_own())
        self.append(dead, 1)
        self.now(dead.close())
        (dead.directory.path / "control").touch()
        orphan = self.now(replica.spools.claim_orphan())
        assert orphan is not None
        self.now(orphan.remove(self.sequences(orphan)))
        self.now(orphan.close())
        self.assertFalse(dead.directory.path.exists())
        dead.directory.path.mkdir()
        (dead.directory.path / "control").touch()
        self.assertIsNone(self.now(replica.spools.claim_orphan()))
        self.assertFalse(dead.directory.path.exists())

    def test_whoever_looks_holds_it_and_changes_nothing(self) -> None:
        own = self.open(fingerprint="another Redis")
        path = own.directory.path
        self.assertIsNone(hold(path))
        self.append(own, 1)
        self.now(own.close())
        held = hold(path)
        assert held is not None
        self.assertIsNone(hold(path))
        self.assertIsNone(self.now(self.replica(fingerprint="another Redis").spools.claim_orphan()))
        held.release()
        self.assertEqual(names_in(path), ["lock", "spool.sqlite"])
        self.assertRaises(FileNotFoundError, hold, self.root / "replica-0")

    def test_an_orphan_is_claimed_by_one_and_removed_when_it_is_drained(self) -> None:
        one, other, dead = self.replica(), self.replica(), self.open()
        self.append(dead, 1)
        owns = [self.now(replica.spools.open_own()) for replica in (one, other)]
        self.assertIsNone(self.now(one.spools.claim_orphan()))
        self.now(dead.close())
        orphan = self.now(one.spools.claim_orphan())
        assert orphan is not None
        self.assertIsNone(self.now(other.spools.claim_orphan()))
        self.assertEqual(self.held(orphan), [1])
        self.now(orphan.remove(self.sequences(orphan)))
        self.now(orphan.close())
        self.assertIsNone(self.now(other.spools.claim_orphan()))
        self.assertEqual(set(self.root.iterdir()), {own.directory.path for own in owns})

    def test_an_orphan_that_is_not_drained_stays(self) -> None:
        replica, dead = self.replica(), self.open()
        self.now(replica.spools.open_own())
        self.append(dead, 1)
        self.now(dead.close())
        for _ in range(2):
            orphan = self.now(replica.spools.claim_orphan())
            assert orphan is not None
            self.assertEqual(self.held(orphan), [1])
            self.now(orphan.close())

    def test_dead_letters_alone_are_no_reason_to_claim(self) -> None:
        replica, dead = self.replica(limits=SpoolLimits(min_free_bytes=0, dead_max_age_ms=1000)), self.open()
        self.now(replica.spools.open_own())
        self.append(dead, 1)
        self.now(dead.bury(self.sequences(dead)[0], "no"))
        self.now(dead.close())
        self.assertIsNone(self.now(replica.spools.claim_orphan()))
        self.assertTrue(dead.directory.path.exists())
        replica.clock.advance(2)
        self.assertIsNone(self.now(replica.spools.claim_orphan()))
        self.assertFalse(dead.directory.path.exists())

    def test_another_ones_directory_is_left_alone_with_one_warning(self) -> None:
        other = self.open(fingerprint="another Redis")
        self.append(other, 1)
        self.now(other.close())
        content = other.directory.database.read_bytes()
        replica = self.replica()
        own = self.now(replica.spools.open_own())
        self.assertNotEqual(own.directory.path, other.directory.path)
        for _ in range(3):
            self.assertIsNone(self.now(replica.spools.claim_orphan()))
        self.assertEqual(self.logged_at(LogLevel.warn), 1)
        self.assertEqual(other.directory.database.read_bytes(), content)
        again = self.open(fingerprint="another Redis")
        self.assertEqual(self.held(again), [1])

    def test_a_directory_that_was_being_made_is_used_or_removed(self) -> None:
        for label in (None, b"", b'{"schema": 1, "finge'):
            for starts in (True, False):
                replica = self.replica()
                own = None if starts else self.now(replica.spools.open_own())
                path = self.root / "replica-0123456789abcdef"
                path.mkdir(parents=True)
                if label is not None:
                    (path / "lock").write_bytes(label)
                if own is None:
                    own = self.now(replica.spools.open_own())
                    self.assertEqual(own.directory.path, path)
                else:
                    self.assertIsNone(self.now(replica.spools.claim_orphan()))
                    self.assertFalse(path.exists())
                self.now(own.close())

    def test_other_things_below_the_root_are_not_touched(self) -> None:
        (self.root / "lost+found").mkdir(parents=True)
        (self.root / "replica-notes.txt").write_text("not a directory")
        self.append(self.open(), 1)
        self.assertEqual(names_in(self.root / "lost+found"), [])
        self.assertEqual((self.root / "replica-notes.txt").read_text(), "not a directory")

    def test_where_no_directory_can_be_made(self) -> None:
        self.root.write_text("in the way")
        self.assert_unavailable(self.replica().spools.open_own(), "broken")

    def test_no_two_ever_hold_one_directory(self) -> None:
        """A lock that is given out is the only one, however fast its directory comes and goes.

        All want the same one. Each that gets it makes sure that it is alone, and removes it.
        """
        errors: list[str] = []
        wanted = self.root / "replica-0123456789abcdef"

        def come_and_go(root: SpoolRoot) -> None:
            with contextlib.suppress(FileExistsError):
                wanted.mkdir()
            for directory in root.orphans():
                mine = directory.path / "mine"
                mine.touch(exist_ok=False)
                mine.unlink()
                directory.remove()

        def work() -> None:
            root = SpoolRoot(self.root, "ours", "")
            for _ in range(100):
                try:
                    come_and_go(root)
                except OSError as error:
                    errors.append(str(error))

        SpoolRoot(self.root, "ours", "").prepare()
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(errors, [])

    def test_a_lock_counts_for_nothing_once_its_file_is_removed(self) -> None:
        """While one replica is between opening the file and locking it, its holder goes, a third comes."""
        root = SpoolRoot(self.root, "ours", "")
        root.prepare()
        for a_third_comes in (False, True):
            first = root.take()
            others: list[SpoolDirectory] = []

            def before_flock(frame: object, event: str, called: object) -> None:
                if event == "c_call" and called is fcntl.flock:
                    sys.setprofile(None)
                    first.remove()  # noqa: B023 - it is called in this turn of the loop
                    if a_third_comes:  # noqa: B023
                        first.path.mkdir()  # noqa: B023
                        others.extend(SpoolRoot(self.root, "ours", "").orphans())  # noqa: B023

            sys.setprofile(before_flock)
            self.assertEqual(list(root.orphans()), [])
            self.assertEqual([other.path for other in others], [first.path] * a_third_comes)
            for other in others:
                other.remove()
            self.assertEqual(names_in(self.root), [])

    def test_a_new_directory_may_be_taken_before_its_maker_has_it(self) -> None:
        taken: list[SpoolDirectory] = []
        stop = threading.Event()

        def take_and_remove() -> None:
            root = SpoolRoot(self.root, "ours", "")
            while not stop.is_set():
                for directory in root.orphans():
                    directory.remove()

        root = SpoolRoot(self.root, "ours", "")
        root.prepare()
        thread = threading.Thread(target=take_and_remove)
        thread.start()
        try:
            taken.extend(root.take() for _ in range(100))
        finally:
            stop.set()
            thread.join()
        self.assertEqual(len({directory.path for directory in taken if directory.is_vacant}), 100)


class FileSystemTests(SpoolCase):
    MOUNTINFO = (
        "22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n"
        "30 22 0:25 / /srv rw - nfs4 server:/srv rw\n"
        "31 30 0:26 / /srv/local\\040disk rw - xfs /dev/vdb rw\n"
        "32 22 0:27 / /mnt rw - ext4 /dev/vdc rw\n"
        "33 22 0:28 / /mnt rw master:2 - fuse.sshfs host: rw\n"
    )

    def test_the_innermost_and_last_mount_counts(self) -> None:
        for path, expected in {
            "/var/spool": "ext4",
            "/srv": "nfs4",
            "/srv/a/b": "nfs4",
            "/srvx": "ext4",
            "/srv/local disk/a": "xfs",
            "/mnt/a": "fuse.sshfs",
        }.items():
            self.assertEqual(file_system_type(Path(path), self.MOUNTINFO), expected, path)

    def test_a_network_file_system_is_refused(self) -> None:
        mountinfo = (
            f"22 1 0:25 / / rw - ext4 /dev/vda rw\n30 22 0:25 / {self.root.resolve()} rw - cifs //a/b rw\n"
        )
        failure = self.failureResultOf(self.replica(mountinfo=mountinfo).spools.open_own(), ConfigError)
        self.assertNotIn("\n", str(failure.value))
        self.assertIn("cifs", str(failure.value))
        self.append(self.open(mountinfo=mountinfo.replace("cifs", "xfs")), 1)


class ThreadTests(TestCase):
    def setUp(self) -> None:
        self.root = Path(mkdtemp())
        self.addCleanup(shutil.rmtree, self.root)

    async def test_the_whole_in_a_thread_of_its_own(self) -> None:
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

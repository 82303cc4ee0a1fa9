"""A model of the spool against the real one: what was acknowledged and not removed is there once, in order.

The machine appends, drains, buries and requeues in groups, fills the disk, fails commits, restarts, and lets
another replica adopt a spool. It crashes between two commits, and in the middle of one: then each block of
the WAL that the commit wrote is on disk, or is not, or is garbage.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Sequence
from itertools import count, cycle
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, TypeVar, cast

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase

from tests.support.spools import Disk, HeldBack, Replica, as_after_a_crash, make_job, numbers
from webhookd.model import Outcome, Receipt, SpoolUnavailable
from webhookd.spool.database import SpoolLimits
from webhookd.spool.queue import Spool
from webhookd.spool.record import encode_record
from webhookd.spool.requests import ListRecords, Requeue
from webhookd.spool.schema import Table

_T = TypeVar("_T")

BLOCK_BYTES = 512
# Room for some twenty records.
LIMITS = SpoolLimits(max_bytes=20 * len(encode_record(make_job(1))), min_free_bytes=0)
ERROR_CODES = (
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR_WRITE,
    sqlite3.SQLITE_IOERR_FSYNC,
    sqlite3.SQLITE_READONLY,
)

groups = st.lists(st.integers(0, 30), min_size=1, max_size=6)


class SpoolMachine(RuleBasedStateMachine):
    """The spool, and the numbers of the jobs that must be in it.

    Jobs that a failed operation should have added or removed are in doubt until the next check.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: list[int] = []
        self.dead: list[int] = []
        self.maybe_added: set[int] = set()
        self.maybe_removed: set[int] = set()
        self.top = Path(mkdtemp())
        self.roots = (self.top / str(number) for number in count())
        self.root = next(self.roots)

    @initialize()
    def start(self) -> None:
        self.disk = Disk()
        self.run_later = HeldBack()
        self.spool = self.open_own()

    def teardown(self) -> None:
        self.result(self.spool.close())
        shutil.rmtree(self.top)

    def open_own(self) -> Spool:
        return self.result(self.make_replica().spools.open_own())

    def make_replica(self) -> Replica:
        return Replica(self.root, limits=LIMITS, run=self.run_later, disk=self.disk)

    def results(self, deferreds: Sequence[Deferred[Any]]) -> list[Any]:
        """Return the results of operations, all of which must end."""
        found: list[Any] = []
        self.run_later.go()
        for deferred in deferreds:
            deferred.addCallbacks(found.append, lambda failure: found.append(failure.value))
        assert len(found) == len(deferreds)
        return found

    def result(self, deferred: Deferred[_T]) -> _T:
        (result,) = self.results([deferred])
        assert not isinstance(result, Exception), result
        return cast(_T, result)

    def append_all(self, group: Sequence[int]) -> list[Deferred[Receipt]]:
        return [self.spool.append(make_job(number)) for number in group]

    def note(self, group: Sequence[int], receipts: Sequence[Receipt | SpoolUnavailable]) -> list[int]:
        """Update the model after appends, and return the numbers that they added."""
        added: list[int] = []
        for number, receipt in zip(group, receipts, strict=True):
            if isinstance(receipt, SpoolUnavailable):
                assert str(receipt) in {"full", "disk full"}
                assert number not in self.live + added
            elif receipt.outcome is Outcome.SPOOLED:
                assert number not in self.live + added
                added.append(number)
            else:
                assert receipt.outcome is Outcome.ALREADY_QUEUED
                assert number in self.live + added
        self.live += added
        return added

    # What users of a spool do

    @rule(group=groups)
    def append(self, group: list[int]) -> None:
        self.note(group, self.results(self.append_all(group)))

    @rule(limit=st.integers(1, 8))
    def drain(self, limit: int) -> None:
        records = self.result(self.spool.first(limit, 1 << 20))
        assert numbers(records) == self.live[:limit]
        self.result(self.spool.remove([record.sequence for record in records]))
        del self.live[:limit]

    @precondition(lambda self: self.live)
    @rule()
    def bury(self) -> None:
        (record,) = self.result(self.spool.first(1, 1))
        self.result(self.spool.bury(record.sequence, "refused"))
        self.dead.append(self.live.pop(0))

    @precondition(lambda self: self.dead)
    @rule()
    def requeue(self) -> None:
        letter = self.result(self.spool.do(ListRecords(Table.DEAD, limit=1)))[0]
        assert letter.job_id == make_job(self.dead[0]).id
        assert self.result(self.spool.do(Requeue([letter.sequence]))) == 1
        number = self.dead.pop(0)
        if number not in self.live:
            self.live.append(number)

    @rule()
    def restart(self) -> None:
        self.result(self.spool.close())
        self.spool = self.open_own()

    @precondition(lambda self: self.live)
    @rule()
    def be_adopted(self) -> None:
        """Another replica, which has its own directory, takes over this one's."""
        other = self.make_replica()
        own = self.result(other.spools.open_own())
        assert self.result(other.spools.claim_orphan()) is None
        self.result(self.spool.close())
        orphan = self.result(other.spools.claim_orphan())
        assert orphan is not None
        self.spool = orphan
        self.result(own.close())

    # What goes wrong

    @rule(free_bytes=st.sampled_from([0, 1000, 1 << 30]))
    def others_fill_the_disk(self, free_bytes: int) -> None:
        self.disk.free_bytes = free_bytes

    @rule(group=groups, limit=st.integers(0, 3), code=st.sampled_from(ERROR_CODES), late=st.booleans())
    def fail(self, group: list[int], limit: int, code: int, late: bool) -> None:
        """A commit fails; if it fails late, its operations are in doubt.

        (A full disk never fails it late: by then, SQLite has its space.)
        """
        late = late and code != sqlite3.SQLITE_FULL
        records = self.result(self.spool.first(limit, 1 << 20))
        self.disk.error_code, self.disk.fails_late = code, late
        removal = self.spool.remove([record.sequence for record in records])
        results = self.results([*self.append_all(group), removal])
        assert all(isinstance(result, SpoolUnavailable) for result in results)
        self.disk.error_code = None
        if late:
            self.maybe_removed = set(numbers(records))
            self.maybe_added = set(group) - (set(self.live) - self.maybe_removed)

    @rule()
    def crash(self) -> None:
        """All replicas are killed between two commits."""
        self.start_on(as_after_a_crash(self.root, next(self.roots)))

    @rule(group=groups, fates=st.lists(st.sampled_from(["new", "old", "garbage"]), min_size=1, max_size=40))
    def crash_in_commit(self, group: list[int], fates: list[str]) -> None:
        """All replicas are killed while a group is written: some of its blocks are on disk, in any order."""
        first = self.spool.check()
        appended = self.append_all(group)  # they wait for the first, and are then one group
        self.run_later.step()
        first.addErrback(lambda failure: failure.trap(SpoolUnavailable))
        before = as_after_a_crash(self.root, next(self.roots))
        acknowledged = list(self.live)
        added = self.note(group, self.results(appended))
        after = as_after_a_crash(self.root, next(self.roots))
        if self.database_in(before).read_bytes() == self.database_in(after).read_bytes():
            tear(self.wal_in(before), self.wal_in(after), fates)
            self.live = acknowledged
        self.start_on(after)
        found = numbers(self.result(self.spool.first(1000, 1 << 20)))
        assert found in (acknowledged, acknowledged + added)
        self.live = found

    def start_on(self, root: Path) -> None:
        """Start on a copy that was made before, and let the old replicas end."""
        self.result(self.spool.close())
        self.root = root
        self.spool = self.open_own()

    def database_in(self, root: Path) -> Path:
        return root / self.spool.directory.path.name / self.spool.directory.database.name

    def wal_in(self, root: Path) -> Path:
        return self.database_in(root).with_name(self.spool.directory.database.name + "-wal")

    # What must hold

    @invariant()
    def what_was_acknowledged_is_there_once_and_in_order(self) -> None:
        found = numbers(self.result(self.spool.first(1000, 1 << 20)))
        assert len(set(found)) == len(found)
        assert set(found) <= set(self.live) | self.maybe_added
        certain = set(self.live) - self.maybe_removed
        assert [number for number in found if number in certain] == [n for n in self.live if n in certain]
        self.live = found
        self.maybe_added.clear()
        self.maybe_removed.clear()

    @invariant()
    def stats_are_true(self) -> None:
        stats = self.spool.stats
        assert (stats.records, stats.dead_records, stats.corrupt_records) == (
            len(self.live),
            len(self.dead),
            0,
        )
        assert stats.bytes == sum(len(encode_record(make_job(number))) for number in self.live)
        first = make_job(self.live[0]).timestamp_ms if self.live else None
        assert stats.oldest_received_at_ms == first


def tear(before: Path, after: Path, fates: Sequence[str]) -> None:
    """Make a file whose writing was interrupted: in each block, the changed bytes are new, old or garbage.

    (The other bytes stay, as SQLite assumes of disks: https://sqlite.org/psow.html.)
    """
    new = after.read_bytes()
    old = before.read_bytes().ljust(len(new), b"\0")
    torn = bytearray(new)
    for at, fate in zip(range(0, len(new), BLOCK_BYTES), cycle(fates), strict=False):
        for position in range(at, min(at + BLOCK_BYTES, len(new))):
            if old[position] != new[position] and fate != "new":
                torn[position] = old[position] if fate == "old" else new[position] ^ 0x5A
    after.write_bytes(torn)


class SpoolModelTests(SynchronousTestCase):
    def test_it_holds_what_the_model_holds(self) -> None:
        run_state_machine_as_test(
            SpoolMachine,
            settings=settings(max_examples=60, stateful_step_count=30, database=None),
        )

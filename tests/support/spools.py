"""Spools for tests: they work at once, or when the test says so, on disks that fail on demand."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from attrs import Factory, define
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from webhookd.model import Job, SpoolRecord
from webhookd.spool.database import SpoolDatabase, SpoolLimits
from webhookd.spool.directory import SpoolRoot
from webhookd.spool.queue import DeferToThread, Spools

_T = TypeVar("_T")


def make_job(number: int, *, queue: str = "chatwoot", data: bytes = b'{"event":"message_created"}') -> Job:
    """Make a job whose id and receipt time contain a number."""
    return Job(
        queue=queue,
        id=f"chatwoot.message_created.7.{number}",
        name="message_created",
        data=data,
        options=b'{"attempts":3}',
        timestamp_ms=1_700_000_000_000 + number,
    )


def job_number(job: Job) -> int:
    """Return the number of a job of `make_job`."""
    return int(job.id.rpartition(".")[2])


def inline(work: Callable[[], _T], /) -> Deferred[_T]:
    """Do the spool's work at once, in the calling thread."""
    return maybeDeferred(work)


def now(deferred: Deferred[_T]) -> _T:
    """Return the result of an operation of a spool that works `inline`, or raise its error."""
    results: list[Any] = []
    deferred.addBoth(results.append)
    (result,) = results
    if isinstance(result, Failure):
        result.raiseException()
    return result  # type: ignore[no-any-return]


@define
class HeldBack:
    """Does the spool's work when the test says so."""

    _held: list[tuple[Callable[[], Any], Deferred[Any]]] = Factory(list)

    def __call__(self, work: Callable[[], _T], /) -> Deferred[_T]:
        done: Deferred[_T] = Deferred()
        self._held.append((work, done))
        return done

    def step(self) -> None:
        """Do the oldest piece of work."""
        work, done = self._held.pop(0)
        maybeDeferred(work).chainDeferred(done)

    def go(self) -> None:
        """Do all work, including what it leads to."""
        while self._held:
            self.step()


@define
class Disk:
    """A disk with a given free space, on which commits fail while ``error_code`` is set.

    With ``fails_late``, the commit is on disk before it fails: SQLite does not always know.
    """

    free_bytes: int = 1 << 40
    error_code: int | None = None
    fails_late: bool = False
    commits: int = 0
    opened: int = 0

    def connect(self, path: Path) -> sqlite3.Connection:
        """Open a database on this disk."""
        disk = self

        class Connection(sqlite3.Connection):
            def execute(self, statement: str, values: Sequence[Any] = (), /) -> sqlite3.Cursor:  # type: ignore[override]
                if statement != "COMMIT" or disk.error_code is None:
                    disk.commits += statement == "COMMIT"
                    return super().execute(statement, values)
                if disk.fails_late:
                    super().execute(statement)
                error = sqlite3.OperationalError("the test's own error")
                error.sqlite_errorcode = disk.error_code
                raise error

        self.opened += 1
        return sqlite3.connect(path, factory=Connection, isolation_level=None, check_same_thread=False)

    def make_database(self, path: Path, limits: SpoolLimits) -> SpoolDatabase:
        """Make a spool's database on this disk."""
        return SpoolDatabase(path, limits, lambda _: self.free_bytes, self.connect)


class Replica:
    """One replica below a spool root; any number can be in one process, because flock allows that."""

    def __init__(
        self,
        root: Path,
        *,
        fingerprint: str = "redis://here/0 bull chatwoot",
        limits: SpoolLimits = SpoolLimits(min_free_bytes=0),  # noqa: B008 - it is frozen
        run: DeferToThread = inline,
        disk: Disk | None = None,
        mountinfo: str = "",
    ) -> None:
        self.disk = disk or Disk()
        self.clock = Clock()
        spool_root = SpoolRoot(root, fingerprint, mountinfo)
        self.spools = Spools(spool_root, run, self._now_ms, limits, self.disk.make_database)

    def _now_ms(self) -> int:
        return int(self.clock.seconds() * 1000)


def numbers(records: Sequence[SpoolRecord]) -> list[int]:
    """Return the numbers of the jobs in records."""
    return [job_number(record.job) for record in records]


def as_after_a_crash(root: Path, copy: Path) -> Path:
    """Copy a spool root as it is on disk now: this is what the replicas leave if they are killed.

    (In one process, SQLite would not open a file twice, and closing the file would clean up.)
    """
    shutil.copytree(root, copy)
    return copy

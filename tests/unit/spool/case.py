"""The base class of the spool's tests."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, TypeVar

from twisted.internet.defer import Deferred
from twisted.logger import LogLevel
from twisted.trial.unittest import SynchronousTestCase

from tests.support.fakes import Log
from tests.support.spools import Replica, as_after_a_crash, make_job, numbers
from webhookd.model import ISpool, Outcome, SpoolUnavailable
from webhookd.spool.queue import Spool

_T = TypeVar("_T")


def names_in(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


class SpoolCase(SynchronousTestCase):
    """A spool root in a temporary directory, and the replicas that start on it."""

    def setUp(self) -> None:
        self.root = Path(mkdtemp()) / "spool"
        self.addCleanup(shutil.rmtree, self.root.parent)
        self.log = Log.of(self)

    def now(self, deferred: Deferred[_T]) -> _T:
        return self.successResultOf(deferred)

    def replica(self, **settings: Any) -> Replica:
        return Replica(self.root, **settings)

    def open(self, **settings: Any) -> Spool:
        return self.now(self.replica(**settings).spools.open_own())

    def open_after_a_crash(self, **settings: Any) -> Spool:
        """Start a replica after all others were killed just now, and return its spool."""
        copy = as_after_a_crash(self.root, self.root.parent / "after the crash")
        return self.now(Replica(copy, **settings).spools.open_own())

    def append(self, spool: ISpool, *job_numbers: int) -> None:
        for number in job_numbers:
            self.assertEqual(self.now(spool.append(make_job(number))).outcome, Outcome.SPOOLED)

    def held(self, spool: ISpool) -> list[int]:
        return numbers(self.now(spool.first(1000, 1 << 30)))

    def sequences(self, spool: ISpool) -> list[int]:
        return [record.sequence for record in self.now(spool.first(1000, 1 << 30))]

    def assert_unavailable(self, deferred: Deferred[Any], *reasons: str) -> None:
        message = str(self.failureResultOf(deferred, SpoolUnavailable).value)
        self.assertTrue(message.startswith(reasons), message)

    def database_of(self, spool: Spool) -> Path:
        """Close a spool, and return the path of its file."""
        self.now(spool.close())
        return spool.directory.database

    def logged_at(self, level: LogLevel) -> int:
        return len(self.log.at(level))

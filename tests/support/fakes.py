"""Fakes with one behaviour each; tests/unit/project/test_fakes.py checks them against the interfaces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from typing import cast

from attrs import Factory, define, field
from twisted.internet.defer import Deferred, fail, succeed
from twisted.logger import ILogObserver, LogEvent, LogLevel, formatEvent, globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer

from tests.support.spools import job_number, make_job
from webhookd.model import (
    IJobSink,
    ISpool,
    Job,
    Outcome,
    QueueUnavailable,
    Receipt,
    RedisErrorKind,
    SpoolRecord,
    SpoolStats,
    SpoolUnavailable,
)

NOT_SENT = QueueUnavailable(RedisErrorKind.DISCONNECTED, "not connected")
UNKNOWN = QueueUnavailable(RedisErrorKind.TIMEOUT, "no answer", unknown=True)


@implementer(IJobSink)
@define(eq=False)
class AcceptingSink:
    """Accepts each job once; ``queue`` holds the numbers of the jobs in order."""

    queue: list[int] = Factory(list)

    def add(self, job: Job) -> Deferred[Receipt]:
        number = job_number(job)
        if number in self.queue:
            return succeed(Receipt(Outcome.ALREADY_QUEUED, job.id, job.name))
        self.queue.append(number)
        return succeed(Receipt(Outcome.QUEUED, job.id, job.name))


@implementer(IJobSink)
@define(eq=False)
class RefusingSink:
    """Refuses every job; ``asked`` holds their numbers."""

    error: Exception = NOT_SENT
    asked: list[int] = Factory(list)

    def add(self, job: Job) -> Deferred[Receipt]:
        self.asked.append(job_number(job))
        return fail(self.error)


@implementer(IJobSink)
@define(eq=False)
class PickySink:
    """Refuses the jobs in ``errors``, each with its error, and accepts the others."""

    errors: Mapping[int, Exception]
    accepting: AcceptingSink = Factory(AcceptingSink)

    def add(self, job: Job) -> Deferred[Receipt]:
        error = self.errors.get(job_number(job))
        return self.accepting.add(job) if error is None else fail(error)


@implementer(IJobSink)
@define(eq=False)
class SilentSink:
    """Answers only when the test says so; accepts one call for a job at a time."""

    waiting: dict[int, Deferred[Receipt]] = Factory(dict)

    def add(self, job: Job) -> Deferred[Receipt]:
        number = job_number(job)
        assert number not in self.waiting, f"asked for job {number} again"
        self.waiting[number] = Deferred()
        return self.waiting[number]

    def accept(self) -> list[int]:
        """Accept all waiting jobs, and return their numbers."""
        waiting, self.waiting = self.waiting, {}
        for number, receipt in waiting.items():
            job = make_job(number)
            receipt.callback(Receipt(Outcome.QUEUED, job.id, job.name))
        return list(waiting)

    def refuse(self, error: Exception) -> list[int]:
        """Refuse all waiting jobs, and return their numbers."""
        waiting, self.waiting = self.waiting, {}
        for receipt in waiting.values():
            receipt.errback(error)
        return list(waiting)


@implementer(ISpool)
@define(eq=False)
class MemorySpool:
    """A spool without a disk; if ``problem`` is set, nothing works; if ``busy``, an append is in progress."""

    max_records: int = 1_000_000
    problem: str | None = None
    busy: bool = False
    records: list[SpoolRecord] = Factory(list)
    dead: list[tuple[int, str]] = Factory(list)
    _sequences: count[int] = field(factory=lambda: count(1))

    @property
    def stats(self) -> SpoolStats:
        return SpoolStats(
            records=len(self.records),
            bytes=sum(record.job.size_bytes for record in self.records),
            oldest_received_at_ms=self.records[0].job.timestamp_ms if self.records else None,
            dead_records=len(self.dead),
            corrupt_records=0,
            problem=self._why_no_append(),
        )

    @property
    def is_empty(self) -> bool:
        return not self.records and not self.busy

    def until_open(self) -> None:
        pass

    @property
    def numbers(self) -> list[int]:
        """Return the numbers of the jobs in it."""
        return [job_number(record.job) for record in self.records]

    def append(self, job: Job) -> Deferred[Receipt]:
        if self.problem is None and any(
            (record.job.queue, record.job.id) == (job.queue, job.id) for record in self.records
        ):
            return succeed(Receipt(Outcome.ALREADY_QUEUED, job.id, job.name))
        problem = self._why_no_append()
        if problem is not None:
            return fail(SpoolUnavailable(problem))
        self.records.append(SpoolRecord(next(self._sequences), job))
        return succeed(Receipt(Outcome.SPOOLED, job.id, job.name))

    def first(self, limit: int, max_bytes: int) -> Deferred[Sequence[SpoolRecord]]:
        if self.problem is not None:
            return fail(SpoolUnavailable(self.problem))
        found: list[SpoolRecord] = []
        for record in self.records[:limit]:
            if found and sum(each.job.size_bytes for each in [*found, record]) > max_bytes:
                break
            found.append(record)
        return succeed(found)

    def remove(self, sequences: Sequence[int]) -> Deferred[None]:
        if self.problem is not None:
            return fail(SpoolUnavailable(self.problem))
        self.records = [record for record in self.records if record.sequence not in sequences]
        return succeed(None)

    def bury(self, sequence: int, reason: str) -> Deferred[None]:
        if self.problem is not None:
            return fail(SpoolUnavailable(self.problem))
        for record in self.records:
            if record.sequence == sequence:
                self.dead.append((job_number(record.job), reason))
        return self.remove([sequence])

    def _why_no_append(self) -> str | None:
        if self.problem is None and len(self.records) >= self.max_records:
            return "full"
        return self.problem


@define
class Log:
    """The log of a test."""

    events: list[LogEvent] = Factory(list)

    @classmethod
    def of(cls, test: SynchronousTestCase) -> Log:
        """Listen until the test ends."""
        log = cls()
        observer = cast(ILogObserver, log.events.append)
        globalLogPublisher.addObserver(observer)
        test.addCleanup(globalLogPublisher.removeObserver, observer)
        return log

    def at(self, level: LogLevel) -> list[str]:
        """Return the lines of one level."""
        return [formatEvent(event) for event in self.events if event["log_level"] is level]

    def everything(self) -> str:
        """Return everything that was logged, as text, with all values of the events."""
        return "\n".join(f"{formatEvent(event)} {event!r}" for event in self.events)

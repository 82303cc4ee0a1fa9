"""Jobs into Redis: one script call for all jobs that wait, with a deadline.

Jobs that arrive together travel together: what waits while a call is in flight goes out in the next one.
So a busy daemon makes few, large calls, and an idle one answers at once; no timer adds latency. One call is
in flight at a time, through one connection, so the jobs of a queue are added in the order of their arrival.

A job waits at most twice the deadline: for the end of the call before its own, and for its own. A call that
ends without an answer may have been carried out, so its jobs fail as *unknown*. When a call fails, all jobs
that wait fail with it, in order and as not sent, so that none overtakes another on its way to the spool.
To repeat any of them is harmless, because the script adds a job id once.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from itertools import chain

import txredisapi
from msgspec import Struct
from twisted.internet.defer import Deferred, ensureDeferred, fail
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from webhookd.bullmq.keys import QueueKeys
from webhookd.bullmq.script import ADD_JOBS, AddError, AddResult, add_jobs_arguments, read_reply
from webhookd.histogram import BATCH_SIZES, DURATIONS_S, Histogram
from webhookd.model import IJobSink, Job, JobRefused, Outcome, QueueUnavailable, Receipt, RedisErrorKind
from webhookd.redis.breaker import CircuitBreaker
from webhookd.redis.connection import RedisConnection, error_kind
from webhookd.redis.pool import RedisPool
from webhookd.redis.settings import QueueSettings

_MAX_BATCH = 128
_MAX_BATCH_BYTES = 1_048_576


class _Waiting(Struct, eq=False):
    job: Job
    receipt: Deferred[Receipt]
    since_s: float


@implementer(IJobSink)
class RedisQueue:
    """The sink of all queues of one Redis.

    After each call, ``acknowledged`` gets the jobs that Redis now has. ``durations_s``, ``batch_sizes`` and
    ``results`` count the calls, their jobs, and what the script did with each.
    """

    def __init__(
        self,
        clock: IReactorTime,
        pool: RedisPool,
        breaker: CircuitBreaker,
        settings: QueueSettings,
        *,
        deadline_s: float,
        acknowledged: Callable[[Sequence[Job]], None],
    ) -> None:
        self._clock = clock
        self._pool = pool
        self._breaker = breaker
        self._settings = settings
        self._deadline_s = deadline_s
        self._acknowledged = acknowledged
        self.durations_s = Histogram(DURATIONS_S)
        self.batch_sizes = Histogram(BATCH_SIZES)
        self.results: Counter[AddResult] = Counter()
        self._keys_of = cache(partial(QueueKeys, settings.prefix))
        self._waiting: dict[str, deque[_Waiting]] = {}
        self._busy = False
        self._log = Logger()

    def add(self, job: Job) -> Deferred[Receipt]:
        """Add a job as `IJobSink` says; without a connection it fails at once."""
        if self._pool.writer is None:
            return fail(self._not_connected())
        receipt: Deferred[Receipt] = Deferred()
        waiting = _Waiting(job, receipt, self._clock.seconds())
        self._waiting.setdefault(job.queue, deque()).append(waiting)
        if not self._busy:
            # The jobs of all requests that are read in this turn of the reactor go out together.
            self._busy = True
            self._clock.callLater(0, self._send_next)
        return receipt

    def _send_next(self) -> None:
        batch = self._next_batch()
        self._busy = bool(batch)
        if batch:
            sent = ensureDeferred(self._send(batch)).addErrback(self._failed, batch)
            sent.addBoth(lambda _: self._send_next())

    def _failed(self, failure: Failure, batch: list[_Waiting]) -> None:
        """Log a defect of ours, and let no request hang because of it."""
        self._log.failure("cannot add jobs", failure)
        for waiting in batch:
            if not waiting.receipt.called:
                unknown = QueueUnavailable(RedisErrorKind.OTHER, "internal error", unknown=True)
                waiting.receipt.errback(unknown)

    def _next_batch(self) -> list[_Waiting]:
        """Return the oldest jobs, at most 128 or 1 MiB, of the next queue that has some in time."""
        while self._waiting:
            queue, waiting = next(iter(self._waiting.items()))
            batch = self._take(waiting)
            del self._waiting[queue]
            if waiting:
                self._waiting[queue] = waiting  # after the other queues
            if batch:
                return batch
        return []

    def _take(self, waiting: deque[_Waiting]) -> list[_Waiting]:
        too_late_s = self._clock.seconds() - self._deadline_s
        batch: list[_Waiting] = []
        size_bytes = 0
        while waiting and len(batch) < _MAX_BATCH:
            size_bytes += waiting[0].job.size_bytes
            if batch and size_bytes > _MAX_BATCH_BYTES:
                break
            first = waiting.popleft()
            if first.since_s < too_late_s:
                first.receipt.errback(QueueUnavailable(RedisErrorKind.TIMEOUT, "Redis is too slow"))
            else:
                batch.append(first)
        return batch

    async def _send(self, batch: list[_Waiting]) -> None:
        jobs = [waiting.job for waiting in batch]
        try:
            results = await self._call(jobs)
        except QueueUnavailable as error:
            self._fail(batch, error)
            return
        self._acknowledged(
            [job for job, result in zip(jobs, results, strict=True) if not isinstance(result, AddError)]
        )
        for waiting, result in zip(batch, results, strict=True):
            _settle(waiting, result)

    def _fail(self, batch: Iterable[_Waiting], error: QueueUnavailable) -> None:
        """Fail the jobs of a call as the call failed, then all that wait, as not sent."""
        for waiting in batch:
            waiting.receipt.errback(error)
        not_sent = QueueUnavailable(error.kind, str(error))
        queues, self._waiting = self._waiting, {}
        for waiting in chain.from_iterable(queues.values()):
            waiting.receipt.errback(not_sent)

    async def _call(self, jobs: list[Job]) -> list[AddResult | AddError]:
        """Make one call, and report to the breaker how it ended."""
        connection = self._pool.writer
        if connection is None:
            raise self._not_connected()
        began_s = self._clock.seconds()
        permit = self._breaker.permit(began_s)
        try:
            results = await self._add(connection, jobs)
        except Exception as error:
            if isinstance(error, QueueUnavailable):
                self._pool.failed(error)
            if permit is not None:
                permit.failed(self._clock.seconds())
            raise
        self._pool.worked()
        ended_s = self._clock.seconds()
        if permit is not None:
            permit.succeeded(ended_s)
        self.durations_s.observe(ended_s - began_s)
        self.batch_sizes.observe(len(jobs))
        self.results.update(result for result in results if isinstance(result, AddResult))
        return results

    async def _add(self, connection: RedisConnection, jobs: list[Job]) -> list[AddResult | AddError]:
        settings = self._settings
        keys, arguments = add_jobs_arguments(
            self._keys_of(jobs[0].queue),
            jobs,
            lock_ttl_ms=settings.lock_ttl_ms,
            wire=settings.wire,
            set_by=settings.set_by(),
        )
        results = read_reply(await self._run_script(connection, keys, arguments), len(jobs))
        if settings.replicas:
            await self._wait_for_replicas(connection)
        return results

    async def _wait_for_replicas(self, connection: RedisConnection) -> None:
        """Wait for the replicas: WAIT covers all that this connection has written, earlier calls too."""
        half_ms = int(self._deadline_s * 500)
        waited = connection.execute_command("WAIT", self._settings.replicas, half_ms)
        # From here on the jobs are added, even if this fails. A repetition of them waits here again.
        try:
            replicas = await connection.within(self._deadline_s, waited)
        except QueueUnavailable as error:
            raise QueueUnavailable(error.kind, str(error), unknown=True) from error
        if replicas < self._settings.replicas:
            raise QueueUnavailable(
                RedisErrorKind.NOREPLICAS, f"only {replicas} replicas have the jobs", unknown=True
            )

    async def _run_script(
        self, connection: RedisConnection, keys: list[str | bytes], arguments: list[str | bytes]
    ) -> object:
        try:
            known = connection.evalsha(ADD_JOBS.sha1, keys, arguments)
            return await connection.within(self._deadline_s, known)
        except txredisapi.ScriptDoesNotExist:
            # Redis was restarted, or its scripts were flushed. Nothing was done, so nothing is repeated.
            unknown = connection.eval(ADD_JOBS.text, keys, arguments)
            return await connection.within(self._deadline_s, unknown)

    def _not_connected(self) -> QueueUnavailable:
        reason = self._pool.last_error
        if reason is not None:
            return QueueUnavailable(reason.kind, str(reason))
        return QueueUnavailable(RedisErrorKind.DISCONNECTED, "not connected to Redis")


def _settle(waiting: _Waiting, result: AddResult | AddError) -> None:
    if isinstance(result, AddError):
        kind = error_kind(result.reason)
        waiting.receipt.errback(
            JobRefused(result.reason)
            if kind is RedisErrorKind.WRONGTYPE
            else QueueUnavailable(kind, result.reason)
        )
        return
    outcome = Outcome.QUEUED if result is AddResult.ADDED else Outcome.ALREADY_QUEUED
    waiting.receipt.callback(Receipt(outcome, waiting.job.id, waiting.job.name))

"""Redis now, else the spool: the policy for each job, and the drain from the spool to Redis.

The order of arrival is kept: while the spool holds jobs, new jobs go into the spool, too. A job that Redis
did not take, or may not have taken (the outcome is unknown), goes to the spool and is sent again from there.
That is harmless within the dedup window, because the script adds a job id once.

Under load, the spool would never be empty again that way: while its last jobs move, the next ones arrive. So
when few are left, new jobs wait for a moment, unacknowledged, and then follow them to Redis: the handover.

What is acknowledged is safe in one of two places. Redis may still lose what it acknowledged (a second of its
AOF, or what a promoted replica had not received yet). So the jobs of the last seconds are remembered, and
sent again when another server, or another run of the server, answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from twisted.internet.defer import CancelledError, Deferred, gatherResults
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from webhookd.model import IJobSink, ISpool, Job, JobRefused, Receipt, SpoolUnavailable

_BATCH = 128
_BATCH_BYTES = 1_048_576
_MIN_PAUSE_S = 0.1
_MAX_PAUSE_S = 5.0
_HANDOVER_RECORDS = 512
_HANDOVER_S = 0.25
_HANDOVER_INTERVAL_S = 10.0  # if each handover fails, one of forty jobs waits: p95 does not suffer

_log = Logger()


class JobDelivery:
    """The policy for one job: Redis, unless the job would overtake others, or wait for a Redis in trouble."""

    def __init__(
        self,
        sink: IJobSink,
        spool: ISpool,
        *,
        may_call: Callable[[], bool],
        spooled: Callable[[], None],
        handover: Callable[[], Deferred[None] | None],
    ) -> None:
        """``may_call`` returns whether Redis may be called now; ``spooled`` is called after each append.

        ``handover`` is `Handover.wait` of the spool's drain.
        """
        self._sink = sink
        self._spool = spool
        self._may_call = may_call
        self._spooled = spooled
        self._handover = handover

    def deliver(self, job: Job) -> Deferred[Receipt]:
        """Take a job for good: in Redis or in the spool, as the receipt says.

        Fails with `SpoolUnavailable`, or as the sink does, if neither can take it.
        """
        if self._spool.is_empty and self._may_call():
            return self._sink.add(job).addErrback(self._not_queued, job)
        # While the spool opens, or is about to be empty, this job need not go to disk.
        soon = self._spool.until_open() or self._handover()
        if soon is None:
            return self.deliver_through_spool(job)
        return soon.addCallback(lambda _: self.deliver(job))

    def deliver_through_spool(self, job: Job) -> Deferred[Receipt]:
        """Take a job for good, by way of the disk.

        If the spool cannot take it, Redis gets it: out of order is better than lost.
        """
        return self._append(job).addErrback(self._not_spooled, job)

    def _append(self, job: Job) -> Deferred[Receipt]:
        return self._spool.append(job).addCallback(self._note_spooled)

    def _note_spooled(self, receipt: Receipt) -> Receipt:
        self._spooled()
        return receipt

    def _not_queued(self, failure: Failure, job: Job) -> Deferred[Receipt]:
        # Crash window: the job may be in Redis, and is not in the spool yet. It was not acknowledged, so
        # its sender, or nginx, may send it again: that is the same job id.
        return self._append(job)

    def _not_spooled(self, failure: Failure, job: Job) -> Deferred[Receipt]:
        failure.trap(SpoolUnavailable)
        return self._sink.add(job)


def _error_of(receipt: Deferred[Receipt]) -> Deferred[BaseException | None]:
    """Turn a failure into a result; None stands for success."""
    return receipt.addCallbacks(lambda _: None, lambda failure: failure.value)


def resend(jobs: Sequence[Job], deliver: Callable[[Job], Deferred[Receipt]]) -> None:
    """Send jobs again that Redis had acknowledged and may have lost.

    They go in batches: thousands would be one long commit on disk, and live events would wait for it.
    """
    Deferred.fromCoroutine(_resend(jobs, deliver))


async def _resend(jobs: Sequence[Job], deliver: Callable[[Job], Deferred[Receipt]]) -> None:
    for start in range(0, len(jobs), _BATCH):
        batch = jobs[start : start + _BATCH]
        await gatherResults([deliver(job).addErrback(_log_lost) for job in batch])


def _log_lost(failure: Failure) -> None:
    _log.error("a job that Redis may have lost could not be sent again: {reason}", reason=failure.value)


class Handover:
    """The moment in which a busy spool becomes empty: new jobs wait, unacknowledged, for its last ones.

    The wait is short, and waits are far apart, in case the disk or Redis is too slow to empty the spool.
    """

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._waiters: list[Deferred[None]] | None = None  # None outside a handover
        self._timer: IDelayedCall | None = None
        self._next_s = 0.0

    def wait(self) -> Deferred[None] | None:
        """Return what fires when the handover ends; None if there is none."""
        if self._waiters is None:
            return None
        waiter: Deferred[None] = Deferred()
        self._waiters.append(waiter)
        return waiter

    def begin(self) -> None:
        """Let new jobs wait from now on, unless the last handover was just now."""
        now_s = self._clock.seconds()
        if self._waiters is None and now_s >= self._next_s:
            self._next_s = now_s + _HANDOVER_INTERVAL_S
            self._waiters = []
            self._timer = self._clock.callLater(_HANDOVER_S, self.end)

    def end(self) -> None:
        """End the handover: the jobs that wait continue."""
        waiters, self._waiters = self._waiters or [], None
        if self._timer is not None and self._timer.active():
            self._timer.cancel()
        for waiter in waiters:
            waiter.callback(None)


class Drain:
    """Moves a spool's records to Redis, in order, batch by batch, until the spool is empty.

    One batch is under way at a time. Live events do not wait for it: they go to disk, or travel in separate
    calls.
    """

    def __init__(
        self,
        clock: IReactorTime,
        spool: ISpool,
        sink: IJobSink,
        pause_s: Callable[[], float],
        replayed: Counter[str] | None = None,
    ) -> None:
        """``pause_s`` returns the seconds until Redis may be called; 0 is now.

        ``replayed`` counts the records that left the spool, as ``queued`` or ``dead``.
        """
        self.replayed: Counter[str] = Counter() if replayed is None else replayed
        self.handover = Handover(clock)
        self._clock = clock
        self._spool = spool
        self._sink = sink
        self._pause_s = pause_s
        self._running: Deferred[None] | None = None
        self._pausing: Deferred[None] | None = None
        self._waiters: list[Deferred[None]] = []
        self._stopped = False

    def wake(self) -> None:
        """Look into the spool now: there may be records, or Redis may be back."""
        if self._pausing is not None:
            pausing, self._pausing = self._pausing, None
            pausing.callback(None)
        elif self._running is None and not self._stopped and not self._spool.is_empty:
            self._running = Deferred.fromCoroutine(self._run())
            self._running.addErrback(self._failed).addBoth(self._ended)

    def until_empty(self) -> Deferred[None]:
        """Begin, and fire when the spool is empty or the drain is stopped."""
        self.wake()
        waiter: Deferred[None] = Deferred()
        if self._running is None:
            waiter.callback(None)
        else:
            self._waiters.append(waiter)
        return waiter

    def stop(self) -> None:
        """Stop now: what was not removed stays in the spool, and is sent again under the same job id."""
        self._stopped = True
        if self._running is not None:
            self._running.cancel()

    async def _run(self) -> None:
        while not self._spool.is_empty and not self._stopped:
            if self._spool.stats.records <= _HANDOVER_RECORDS and self._pause_s() == 0.0:
                self.handover.begin()
            if not await self._move_batch() and not self._stopped:
                self.handover.end()
                await self._pause()

    async def _move_batch(self) -> bool:
        """Move the oldest records; return False if Redis or the disk did not take all of them."""
        try:
            records = await self._spool.first(_BATCH, _BATCH_BYTES)
            errors = await gatherResults([_error_of(self._sink.add(record.job)) for record in records])
            outcomes = list(zip(records, errors, strict=True))
            # Crash window: in Redis and still in the spool. Each is sent again, and the script drops it.
            done = [record.sequence for record, error in outcomes if error is None]
            if done:
                await self._spool.remove(done)
                self.replayed["queued"] += len(done)
            for record, error in outcomes:
                if isinstance(error, JobRefused):
                    await self._spool.bury(record.sequence, str(error))
                    self.replayed["dead"] += 1
        except SpoolUnavailable:
            return False
        return bool(records) and all(error is None or isinstance(error, JobRefused) for error in errors)

    async def _pause(self) -> None:
        self._pausing = Deferred()
        call = self._clock.callLater(min(max(self._pause_s(), _MIN_PAUSE_S), _MAX_PAUSE_S), self.wake)
        try:
            await self._pausing
        finally:
            self._pausing = None
            if call.active():
                call.cancel()

    def _failed(self, failure: Failure) -> None:
        if not failure.check(CancelledError):
            _log.failure("the drain failed", failure)

    def _ended(self, _result: object) -> None:
        self._running = None
        self.handover.end()
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            waiter.callback(None)

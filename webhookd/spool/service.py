"""A service that opens, repairs, drains and closes a replica's own spool, and drains orphans."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol, TypeAlias, TypeVar

from attrs import evolve
from twisted.application.service import Service
from twisted.internet.defer import Deferred, ensureDeferred, fail
from twisted.internet.defer import TimeoutError as DeadlinePassed
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from webhookd.delivery import Drain
from webhookd.model import ConfigError, ISpool, Job, Receipt, SpoolRecord, SpoolStats, SpoolUnavailable
from webhookd.spool.database import EMPTY
from webhookd.spool.queue import Spool, Spools, SpoolThread

_HEAL_INTERVAL_S = 2.0
_ORPHANS_INTERVAL_S = 30.0
_EXPIRE_INTERVAL_S = 3600.0
_CLOSE_DEADLINE_S = 5.0

_T = TypeVar("_T")


class Closable(Protocol):
    """An object that takes a while to close."""

    async def close(self) -> None: ...


#: Opens the socket on which operators can query a spool and its drain; None if that failed.
OpenControl: TypeAlias = Callable[[Spool, Drain], Coroutine[Any, Any, Closable | None]]


@implementer(ISpool)
class SpoolService(Service):
    """The replica's own spool, from start to stop.

    Its thread opens it, and operations wait until then. If that fails, the service logs the reason, and tries
    again.
    """

    def __init__(
        self,
        clock: IReactorTime,
        thread: SpoolThread,
        spools: Spools,
        make_drain: Callable[[ISpool], Drain],
        drain_deadline_s: float,
        open_control: OpenControl,
    ) -> None:
        """``drain_deadline_s`` limits the time to drain the spool on shutdown."""
        self.drain = make_drain(self)
        self._clock = clock
        self._thread = thread
        self._spools = spools
        self._make_drain = make_drain
        self._drain_deadline_s = drain_deadline_s
        self._open_control = open_control
        self._control: Closable | None = None
        self._spool: Spool | None = None
        self._problem: str | None = None
        self._until_open: list[Deferred[None]] = []
        self._orphan_drain: Drain | None = None
        self._loops: list[LoopingCall] = []
        self._log = Logger()

    # -- ISpool

    @property
    def stats(self) -> SpoolStats:
        """While the spool is being opened, its contents are unknown, and it has no problem."""
        return self._spool.stats if self._spool is not None else evolve(EMPTY, problem=self._problem)

    @property
    def is_empty(self) -> bool:
        """While the spool is being opened, it may hold something."""
        return self._spool.is_empty if self._spool is not None else self._problem is not None

    @property
    def is_up(self) -> bool:
        """True if the spool is open and has no problem, so it accepts events."""
        return self._spool is not None and self._spool.stats.problem is None

    def until_open(self) -> Deferred[None] | None:
        if self._spool is not None or self._problem is not None:
            return None
        opened: Deferred[None] = Deferred()
        self._until_open.append(opened)
        return opened

    def append(self, job: Job) -> Deferred[Receipt]:
        return self._once_open(lambda spool: spool.append(job))

    def first(self, limit: int, max_bytes: int) -> Deferred[Sequence[SpoolRecord]]:
        return self._once_open(lambda spool: spool.first(limit, max_bytes))

    def remove(self, sequences: Sequence[int]) -> Deferred[None]:
        return self._once_open(lambda spool: spool.remove(sequences))

    def bury(self, sequence: int, reason: str) -> Deferred[None]:
        return self._once_open(lambda spool: spool.bury(sequence, reason))

    def _once_open(self, operate: Callable[[Spool], Deferred[_T]]) -> Deferred[_T]:
        if self._spool is not None:
            return operate(self._spool)
        opened = self.until_open()
        if opened is None:
            return fail(SpoolUnavailable(self._problem))
        return opened.addCallback(lambda _: self._once_open(operate))

    # -- Service

    def startService(self) -> None:
        """Open the spool, and start its upkeep."""
        super().startService()
        self._thread.start()
        for interval_s, work in (
            (_HEAL_INTERVAL_S, self._heal),
            (_ORPHANS_INTERVAL_S, self._adopt),
            (_EXPIRE_INTERVAL_S, self._expire),
        ):
            loop = LoopingCall(self._carefully, work)
            loop.clock = self._clock
            loop.start(interval_s, now=work == self._heal)
            self._loops.append(loop)

    def stopService(self) -> Deferred[None]:
        """Drain the spool, for a limited time, and close it; fires when its thread has ended."""
        super().stopService()
        for loop in self._loops:
            loop.stop()
        return ensureDeferred(self._stop())

    async def _stop(self) -> None:
        if self._orphan_drain is not None:
            self._orphan_drain.stop()
        try:
            await self.drain.until_empty().addTimeout(self._drain_deadline_s, self._clock)
        except DeadlinePassed:
            self._log.info("{records} events stay in the spool", records=self.stats.records)
        self.drain.stop()
        if self._control is not None:
            await self._control.close()
        try:
            await self._once_open(Spool.close).addTimeout(_CLOSE_DEADLINE_S, self._clock)
        except DeadlinePassed:
            # To wait for a thread whose disk hangs would block the reactor, too.
            self._log.error("the spool did not close in time")
            return
        except SpoolUnavailable as error:
            self._log.error("the spool did not close: {error}", error=error)
        self._thread.stop()

    def _carefully(self, work: Callable[[], Coroutine[Deferred[object], object, None]]) -> Deferred[None]:
        """Do the work of a loop; log a failure, so that it does not end the loop."""
        return Deferred.fromCoroutine(work()).addErrback(self._work_failed)

    def _work_failed(self, failure: Failure) -> None:
        if not failure.check(SpoolUnavailable):
            self._log.failure("the spool's upkeep failed", failure)

    async def _heal(self) -> None:
        """Open the spool if it is not open, and test whether a broken disk accepts writes again."""
        try:
            if self._spool is None:
                await self._open()
            elif self._spool.stats.problem is not None:
                await self._spool.check()
        finally:
            self.drain.wake()  # if the spool is full, too: draining makes room

    async def _open(self) -> None:
        try:
            self._spool = await self._spools.open_own()
        except (SpoolUnavailable, ConfigError) as error:
            if self._problem is None:
                self._log.error("there is no spool: {error}", error=error)
            self._problem = str(error)
        waiting, self._until_open = self._until_open, []
        for opened in waiting:
            opened.callback(None)
        if self._spool is not None:
            self._control = await self._open_control(self._spool, self.drain)

    async def _adopt(self) -> None:
        """Drain a spool that another replica left, while this one accepts events."""
        orphan = await self._spools.claim_orphan()
        if orphan is None:
            return
        self._log.info(
            "adopted the spool {path} with {records} events",
            path=str(orphan.directory.path),
            records=orphan.stats.records,
        )
        drain = self._orphan_drain = self._make_drain(orphan)
        control = await self._open_control(orphan, drain)
        try:
            await drain.until_empty()
        finally:
            self._orphan_drain = None
            if control is not None:
                await control.close()
            await orphan.close()

    async def _expire(self) -> None:
        if self._spool is not None:
            await self._spool.expire_dead()

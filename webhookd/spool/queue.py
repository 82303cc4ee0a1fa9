"""The spool as other modules use it: operations wait for the thread, and are committed in groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from attrs import define, evolve, field
from twisted.internet.defer import Deferred, DeferredLock, fail
from twisted.internet.interfaces import IReactorFromThreads
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger
from twisted.python.threadpool import ThreadPool
from zope.interface import implementer

from webhookd.model import ISpool, Job, Receipt, SpoolRecord, SpoolStats, SpoolUnavailable
from webhookd.spool.database import EMPTY, Operation, SpoolDatabase, SpoolLimits
from webhookd.spool.directory import SpoolDirectory, SpoolRoot
from webhookd.spool.record import encode_record
from webhookd.spool.schema import Table

_T = TypeVar("_T")
_log = Logger()


class DeferToThread(Protocol):
    """Runs blocking work, one piece after another; the Deferred fires with the result."""

    def __call__(self, work: Callable[[], _T], /) -> Deferred[_T]: ...


class SpoolThread:
    """The one thread in which all spools work; a `DeferToThread`."""

    def __init__(self, reactor: IReactorFromThreads) -> None:
        self._reactor = reactor
        self._pool = ThreadPool(minthreads=1, maxthreads=1, name="spool")

    def start(self) -> None:
        """Start the thread."""
        self._pool.start()

    def stop(self) -> None:
        """Wait until the thread ends, which is at once if the spools are closed."""
        self._pool.stop()

    def __call__(self, work: Callable[[], _T], /) -> Deferred[_T]:
        return deferToThreadPool(self._reactor, self._pool, work)


@implementer(ISpool)
@define(eq=False)
class Spool:
    """A spool in a directory that this process holds; see `Spools`.

    Cancelling one of its Deferreds does not withdraw the operation.
    """

    directory: SpoolDirectory
    _database: SpoolDatabase
    _defer_to_thread: DeferToThread
    _now_ms: Callable[[], int]
    _limits: SpoolLimits
    stats: SpoolStats = field(default=EMPTY, init=False)
    _waiting: list[tuple[Operation, Deferred[Any]]] = field(factory=list, init=False)
    _appends: int = field(default=0, init=False)
    _writing: DeferredLock = field(factory=DeferredLock, init=False)
    _is_closed: bool = field(default=False, init=False)

    @property
    def is_empty(self) -> bool:
        return self.stats.records == 0 and self._appends == 0

    def until_open(self) -> None:
        """Return None: it is open."""

    def append(self, job: Job) -> Deferred[Receipt]:
        if len(self._waiting) >= self._limits.max_waiting:
            return fail(SpoolUnavailable("busy"))
        record = encode_record(job)
        self._appends += 1
        return self.do(lambda database: database.append(job, record)).addBoth(self._append_ended)

    def first(self, limit: int, max_bytes: int) -> Deferred[Sequence[SpoolRecord]]:
        return self.do(lambda database: database.first(limit, max_bytes, self._now_ms()))

    def remove(self, sequences: Sequence[int]) -> Deferred[None]:
        return self.do(lambda database: database.delete(Table.LIVE, sequences))

    def bury(self, sequence: int, reason: str) -> Deferred[None]:
        return self.do(lambda database: database.set_aside(Table.DEAD, sequence, reason, self._now_ms()))

    def check(self) -> Deferred[None]:
        """Write something and fsync it; fails with `SpoolUnavailable` if an append would fail."""
        return self.do(lambda database: database.check(self._now_ms()))

    def expire_dead(self) -> Deferred[None]:
        """Delete dead letters and corrupt records that are older than the limit."""
        return self.do(lambda database: database.expire_dead(self._now_ms()))

    def do(self, operation: Operation) -> Deferred[Any]:
        """Run an operation on the database, with the next group; fires with its result."""
        if self._is_closed:
            return fail(SpoolUnavailable("closed"))
        result: Deferred[Any] = Deferred()
        self._waiting.append((operation, result))
        if len(self._waiting) == 1:  # later operations join its group, until the thread is free
            Deferred.fromCoroutine(self._write())
        return result

    def close(self) -> Deferred[None]:
        """Finish what waits, write the WAL back, close the file, and release the directory.

        A directory that holds nothing is removed. All later operations fail with `SpoolUnavailable`.
        """
        if self._is_closed:
            return fail(SpoolUnavailable("closed"))
        self._is_closed = True
        closed: Deferred[None] = Deferred()
        Deferred.fromCoroutine(self._close()).chainDeferred(closed)
        return closed

    async def _close(self) -> None:
        async with self._writing:
            await self._defer_to_thread(partial(_close_files, self.directory, self._database))

    def _append_ended(self, result: _T) -> _T:
        self._appends -= 1
        return result

    async def _write(self) -> None:
        """Commit what waits, as one group."""
        async with self._writing:
            group, self._waiting = self._waiting, []
            try:
                results = await self._commit([operation for operation, _ in group])
            except Exception as error:  # noqa: BLE001 - a defect, too: no caller may wait forever
                results = [error] * len(group)
            for (_, waiter), result in zip(group, results, strict=True):
                if isinstance(result, Exception):
                    waiter.errback(result)
                else:
                    waiter.callback(result)

    async def _commit(self, operations: Sequence[Operation]) -> Sequence[Any]:
        problem = self.stats.problem
        try:
            results, self.stats = await self._defer_to_thread(partial(self._database.commit, operations))
        except SpoolUnavailable as error:
            self.stats = evolve(self.stats, problem=str(error))
            raise
        finally:
            if self.stats.problem != problem:
                self._log_problem()
        return results

    def _log_problem(self) -> None:
        path, problem = str(self.directory.path), self.stats.problem
        if problem is None:
            _log.info("spool {path} takes events", path=path)
        else:
            _log.error("spool {path} takes no events: {problem}", path=path, problem=problem)


@define(eq=False)
class Spools:
    """The spools below one root: this replica's own, and those that other replicas left."""

    _root: SpoolRoot
    _defer_to_thread: DeferToThread
    _now_ms: Callable[[], int]
    _limits: SpoolLimits
    _make_database: Callable[[Path, SpoolLimits], SpoolDatabase] = SpoolDatabase

    def open_own(self) -> Deferred[Spool]:
        """Take a directory, an orphan if there is one, and open its spool.

        Fires with a spool that may have a problem (see its ``stats``), and that recovers when the disk does.
        Fails with `ConfigError` if no spool can ever be below the root, and with `SpoolUnavailable` if no
        directory is available now.
        """
        return Deferred.fromCoroutine(self._open_own())

    def claim_orphan(self) -> Deferred[Spool | None]:
        """Take the next directory that has our label, a free lock, and records to drain.

        Fires with its opened spool, or with None. Fails with `SpoolUnavailable` if the disk fails. The caller
        drains the spool and closes it, which removes the directory if it is empty. A directory that holds
        only dead letters stays; those that are older than the limit are deleted.
        """
        return Deferred.fromCoroutine(self._claim_orphan())

    async def _open_own(self) -> Spool:
        spool = self._spool(await self._defer_to_thread(self._take))
        with suppress(SpoolUnavailable):
            await spool.check()
        return spool

    async def _claim_orphan(self) -> Spool | None:
        orphans = self._root.orphans()
        while (directory := await self._defer_to_thread(partial(_next_with_content, orphans))) is not None:
            spool = self._spool(directory)
            with suppress(SpoolUnavailable):
                await spool.expire_dead()
            if spool.stats.records:
                return spool
            await spool.close()
        return None

    def _take(self) -> SpoolDirectory:
        try:
            self._root.prepare()
            return self._root.take()
        except OSError as error:
            raise SpoolUnavailable(f"broken: {error}") from error

    def _spool(self, directory: SpoolDirectory) -> Spool:
        database = self._make_database(directory.database, self._limits)
        return Spool(directory, database, self._defer_to_thread, self._now_ms, self._limits)


def _next_with_content(orphans: Iterator[SpoolDirectory]) -> SpoolDirectory | None:
    try:
        for directory in orphans:
            if not directory.is_vacant:
                return directory
            directory.remove()
    except OSError as error:
        raise SpoolUnavailable(f"broken: {error}") from error
    return None


def _close_files(directory: SpoolDirectory, database: SpoolDatabase) -> None:
    if database.close():
        directory.remove()
    else:
        directory.release()

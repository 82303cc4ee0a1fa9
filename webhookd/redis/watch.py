"""Facts about Redis and its queues: for metrics and health, and to warn of settings that lose jobs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from attrs import evolve, frozen
from twisted.internet.defer import Deferred, ensureDeferred
from twisted.internet.defer import TimeoutError as DeadlinePassed
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from webhookd.bullmq.keys import QueueKeys
from webhookd.model import QueueUnavailable, RedisErrorKind
from webhookd.redis.connection import RedisConnection
from webhookd.redis.pool import RedisPool

_DEADLINE_S = 4.0  # that of the drain: a shorter one would close connections while a slow drain is working
_LOOK_AGE_S = 2.0
_SHOWN_AGE_S = 5.0
_LOOK_DEADLINE_S = 1.0  # a scrape or health request has its own deadline, and wants more than the queues

_log = Logger()


@frozen
class ServerFacts:
    """Facts from INFO and CONFIG; None if the server does not report one, or does not let this user ask."""

    version: str | None = None
    run_id: str | None = None
    is_cluster: bool | None = None
    maxmemory_policy: str | None = None
    has_aof: bool | None = None
    appendfsync: str | None = None

    @classmethod
    def from_info(cls, info: bytes) -> ServerFacts:
        """Return the facts of an INFO reply."""
        values = read_info(info)
        return cls(
            version=values.get("valkey_version") or values.get("redis_version"),
            run_id=values.get("run_id"),
            is_cluster=_flag(values, "cluster_enabled"),
            maxmemory_policy=values.get("maxmemory_policy"),
            has_aof=_flag(values, "aof_enabled"),
        )

    @property
    def dangers(self) -> Sequence[str]:
        """The reasons why this server may lose acknowledged jobs, each with its remedy."""
        return [danger for danger in (self.eviction_danger, self.persistence_danger) if danger]

    @property
    def eviction_danger(self) -> str | None:
        """The danger from too little memory, if there is one."""
        if self.maxmemory_policy in (None, "noeviction"):
            return None
        return f"maxmemory-policy {self.maxmemory_policy} evicts jobs and locks; set noeviction"

    @property
    def persistence_danger(self) -> str | None:
        """The danger from a crash or a restart, if there is one."""
        if self.has_aof is False:
            return "appendonly is off: a restart loses jobs; set appendonly yes"
        if self.appendfsync == "no":
            return "appendfsync no: a crash loses jobs; set always or everysec"
        return None

    @property
    def safety(self) -> str:
        """``safe``, ``unsafe``, or ``unknown`` if the server does not report enough."""
        if self.dangers:
            return "unsafe"
        known = None not in (self.maxmemory_policy, self.has_aof, self.appendfsync)
        return "safe" if known else "unknown"


def read_info(info: bytes) -> Mapping[str, str]:
    """Return the lines ``name:value`` of an INFO reply."""
    lines = (line.partition(":") for line in info.decode("utf-8", "replace").splitlines())
    return {name: value for name, colon, value in lines if colon}


def _flag(values: Mapping[str, str], name: str) -> bool | None:
    return values[name] == "1" if name in values else None


class RedisWatch:
    """Asks each server that the pool connects to for its facts.

    It calls ``restarted`` when a connection leads to another server, or another run of it, than the last
    connection did. It also does so if the server does not report its run.
    """

    def __init__(self, pool: RedisPool, queues: Sequence[QueueKeys], restarted: Callable[[], None]) -> None:
        self.facts = ServerFacts()
        self._pool = pool
        self._queues = queues
        self._restarted = restarted
        self._was_seen = False

    def connected(self, connection: RedisConnection) -> None:
        """Ask the server of a new connection."""
        ensureDeferred(self._look(connection)).addErrback(
            lambda failure: _log.failure("cannot read the facts about Redis", failure)
        )

    async def _look(self, connection: RedisConnection) -> None:
        facts = await self._ask(connection)
        if facts is None:
            return
        before, self.facts = self.facts, facts
        was_seen, self._was_seen = self._was_seen, True
        if was_seen and (facts.run_id is None or facts.run_id != before.run_id):
            self._restarted()
        if not was_seen or facts != before:
            self._warn()

    async def _ask(self, connection: RedisConnection) -> ServerFacts | None:
        """Return the facts; None if the connection is gone: the next one will ask."""
        try:
            facts = ServerFacts.from_info(await connection.within(_DEADLINE_S, connection.info()))
        except QueueUnavailable as error:
            return ServerFacts() if error.kind is RedisErrorKind.NOPERM else None
        try:
            fsync = await connection.within(
                _DEADLINE_S, connection.execute_command("CONFIG", "GET", "appendfsync")
            )
        except QueueUnavailable as error:
            return None if error.unknown else facts
        return evolve(facts, appendfsync=fsync[1].decode() if len(fsync) == 2 else None)

    def _warn(self) -> None:
        for danger in self.facts.dangers:
            _log.warn("Redis may lose jobs that it has acknowledged: {danger}", danger=danger)
        if self.facts.safety == "unknown":
            _log.warn(
                "cannot check whether Redis keeps what it acknowledges: it does not let us read its settings"
            )
        untagged = [keys.queue for keys in self._queues if not keys.is_hash_tagged]
        if self.facts.is_cluster and untagged:
            _log.error(
                "this Redis is a cluster, in which the keys of a queue must share a slot: "
                "set --prefix '{{bull}}' here and in the workers (queues without a hash tag: {queues})",
                queues=", ".join(untagged),
            )

    def describe(self) -> Mapping[str, object]:
        """Return whether Redis is connected, its version and safety, or else the kind of the last error."""
        if self._pool.writer is None:
            error = self._pool.last_error
            return {"status": "down", "error": error.kind.value if error else None}
        return {
            "status": "up",
            "version": self.facts.version,
            "safety": self.facts.safety,
            "dangers": self.facts.dangers,
        }


@frozen
class QueueLook:
    """The result of one look, by queue.

    ``jobs`` counts the unfinished jobs by BullMQ's names for their states; None means unknown.
    ``next_since_ms`` is when the next job was received, in ms since 1970, or None if no job waits; if it is
    unknown, the queue is left out.
    """

    jobs: Mapping[str, Mapping[str, int] | None]
    next_since_ms: Mapping[str, int | None]


class QueueWatch:
    """Looks at the queues on demand, at a cost that does not grow with the number of jobs."""

    def __init__(self, clock: IReactorTime, pool: RedisPool, queues: Sequence[QueueKeys]) -> None:
        self._clock = clock
        self._pool = pool
        self._queues = queues
        self._nothing = QueueLook({keys.queue: None for keys in queues}, {})
        self._last = self._nothing
        self._looked_at_s = -math.inf
        self._looking: Deferred[None] | None = None  # fires at the end of the look that is under way

    @property
    def last(self) -> QueueLook:
        """The last look; all is unknown if it is too old."""
        return self._last if self._clock.seconds() - self._looked_at_s <= _SHOWN_AGE_S else self._nothing

    async def refresh(self) -> None:
        """Look again, unless the last look is recent. All callers at one time share one look.

        A caller waits only for a short time, because Redis may not answer: then the last look is dropped.
        """
        if self._looking is None and self._clock.seconds() - self._looked_at_s >= _LOOK_AGE_S:
            self._looking = Deferred()
            ensureDeferred(self._look(self._looking))
        if self._looking is None:
            return
        waiter: Deferred[None] = Deferred()
        self._looking.chainDeferred(waiter)
        try:
            await waiter.addTimeout(_LOOK_DEADLINE_S, self._clock)
        except DeadlinePassed:
            self._last = self._nothing

    async def _look(self, done: Deferred[None]) -> None:
        try:
            self._last = await self._ask()
        except Exception:  # noqa: BLE001  # a defect of ours; the other metrics must not suffer
            self._last = self._nothing
            _log.failure("cannot look at the queues")
        self._looked_at_s, self._looking = self._clock.seconds(), None
        done.callback(None)

    async def _ask(self) -> QueueLook:
        jobs = dict(self._nothing.jobs)
        next_since_ms: dict[str, int | None] = {}
        for keys in self._queues:
            connection = self._pool.prober
            if connection is not None:
                with suppress(QueueUnavailable):
                    jobs[keys.queue] = await self._count(connection, keys)
                    next_since_ms[keys.queue] = await self._next_since_ms(connection, keys)
        return QueueLook(jobs, next_since_ms)

    async def _count(self, connection: RedisConnection, keys: QueueKeys) -> Mapping[str, int]:
        # One after another: when one fails, no other is pending whose failure would go unhandled.
        commands = {
            "waiting": (connection.llen, keys.wait),
            "paused": (connection.llen, keys.paused),
            "delayed": (connection.zcard, keys.delayed),
            "prioritized": (connection.zcard, keys.prioritized),
            "active": (connection.llen, keys.active),
            "failed": (connection.zcard, keys.failed),
        }
        return {
            state: await connection.within(_DEADLINE_S, count(key))
            for state, (count, key) in commands.items()
        }

    async def _next_since_ms(self, connection: RedisConnection, keys: QueueKeys) -> int | None:
        # BullMQ adds at the head of the list, and takes from its end.
        job_id = await connection.within(_DEADLINE_S, connection.lindex(keys.wait, -1))
        if job_id is None:
            return None
        # Its worker may have finished and removed it since: then there is no timestamp.
        name = keys.job(job_id.decode("utf-8", "replace"))
        [since_ms] = await connection.within(_DEADLINE_S, connection.hmget(name, ["timestamp"]))
        return int(since_ms) if since_ms is not None and since_ms.isdigit() else None

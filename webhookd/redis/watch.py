"""What Redis says of itself and of the queues: for health, and to warn of what loses or cannot work."""

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
from webhookd.redis.pool import RedisConnection, RedisPool

# As patient as the drain: with less, a connection would be given up that a slow drain works on.
_DEADLINE_S = 4.0
_LOOK_AGE_S = 2.0
_SHOWN_AGE_S = 5.0
_LOOK_DEADLINE_S = 0.5  # those who ask for metrics or health want more than this, and have deadlines

_log = Logger()


@frozen
class ServerFacts:
    """From INFO and CONFIG; None where the server does not say, or does not let this user ask."""

    version: str | None = None
    run_id: str | None = None
    is_cluster: bool | None = None
    maxmemory_policy: str | None = None
    has_aof: bool | None = None
    appendfsync: str | None = None

    @classmethod
    def from_info(cls, info: bytes) -> ServerFacts:
        """Read an INFO reply."""
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
        """Why this server may lose what it acknowledged, and what to do about it."""
        return [danger for danger in (self.eviction_danger, self.persistence_danger) if danger]

    @property
    def eviction_danger(self) -> str | None:
        """The one from too little memory."""
        if self.maxmemory_policy in (None, "noeviction"):
            return None
        return f"maxmemory-policy {self.maxmemory_policy} evicts jobs and locks; set noeviction"

    @property
    def persistence_danger(self) -> str | None:
        """The one from a crash, or a restart."""
        if self.has_aof is False:
            return "appendonly is off: a restart loses jobs; set appendonly yes"
        if self.appendfsync == "no":
            return "appendfsync no: a crash loses jobs; set always or everysec"
        return None

    @property
    def safety(self) -> str:
        """``safe``, ``unsafe``, or ``unknown`` where the server does not tell."""
        if self.dangers:
            return "unsafe"
        known = None not in (self.maxmemory_policy, self.has_aof, self.appendfsync)
        return "safe" if known else "unknown"


def read_info(info: bytes) -> Mapping[str, str]:
    """The lines ``name:value`` of an INFO reply."""
    lines = (line.partition(":") for line in info.decode("utf-8", "replace").splitlines())
    return {name: value for name, colon, value in lines if colon}


def _flag(values: Mapping[str, str], name: str) -> bool | None:
    return values[name] == "1" if name in values else None


class RedisWatch:
    """Looks at each server that the pool connects to.

    ``restarted`` is called when a connection leads to another server, or another run of it, than the last
    one, or may do so, because the server does not tell.
    """

    def __init__(self, pool: RedisPool, queues: Sequence[QueueKeys], restarted: Callable[[], None]) -> None:
        self.facts = ServerFacts()
        self._pool = pool
        self._queues = queues
        self._restarted = restarted
        self._was_seen = False

    def connected(self, connection: RedisConnection) -> None:
        """A new connection is ready."""
        ensureDeferred(self._look(connection)).addErrback(
            lambda failure: _log.failure("cannot look at Redis", failure)
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
        """What the server tells; None where the connection is gone, and another one will ask."""
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
            _log.warn("Redis is not safe to acknowledge from: {danger}", danger=danger)
        if self.facts.safety == "unknown":
            _log.warn("whether Redis is safe to acknowledge from is unknown: it does not let us ask")
        untagged = [keys.queue for keys in self._queues if not keys.is_hash_tagged]
        if self.facts.is_cluster and untagged:
            _log.error(
                "this Redis is a cluster, where the keys of a queue must share a slot: "
                "set --prefix '{{bull}}' here and in the workers (now without a hash tag: {queues})",
                queues=", ".join(untagged),
            )

    def describe(self) -> Mapping[str, object]:
        """Whether Redis can be reached, and if not, the class of the error; and whether it is safe."""
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
    """What one look at the queues found, by queue.

    ``jobs`` are those that are not done, by BullMQ's names for their states; None for a queue that could not
    be asked. ``next_since_ms`` is when the next job was received, in ms since 1970, and None if no job waits;
    a queue for which this is unknown is left out.
    """

    jobs: Mapping[str, Mapping[str, int] | None]
    next_since_ms: Mapping[str, int | None]


class QueueWatch:
    """Looks at the queues when asked to, at a cost that does not grow with the number of jobs."""

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
        """The last look; if that was so long ago that it may be wrong, one that found nothing."""
        return self._last if self._clock.seconds() - self._looked_at_s <= _SHOWN_AGE_S else self._nothing

    async def refresh(self) -> None:
        """Look again unless the last look is recent. One look serves all who ask at once.

        None waits for it long, because Redis may be what is wrong: the last look is forgotten then.
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
        except Exception:  # noqa: BLE001  # a defect of ours, of which the other metrics must not suffer
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
        # One after the other: where one fails, none is under way whose failure nobody would look at.
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
        # Its worker may be done with it by now, and have removed it: then there is no timestamp.
        name = keys.job(job_id.decode("utf-8", "replace"))
        [since_ms] = await connection.within(_DEADLINE_S, connection.hmget(name, ["timestamp"]))
        return int(since_ms) if since_ms is not None and since_ms.isdigit() else None

"""What Redis says of itself and of the queues: for health, and to warn of what loses or cannot work."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TypeAlias

from attrs import evolve, frozen
from twisted.internet.defer import ensureDeferred
from twisted.logger import Logger

from webhookd.bullmq.keys import QueueKeys
from webhookd.model import QueueUnavailable, RedisErrorKind
from webhookd.redis.connection import RedisConnection
from webhookd.redis.pool import RedisPool


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


#: Jobs by queue and state; None for a queue that could not be asked.
JobCounts: TypeAlias = Mapping[str, Mapping[str, int] | None]


#: By queue, when its next job was received, in ms since 1970; None where no job waits. Queues that could not
#: be asked are left out.
WaitingSince: TypeAlias = Mapping[str, int | None]


class RedisWatch:
    """Looks at each server that the pool connects to, and at the queues when somebody asks.

    ``restarted`` is called when a connection leads to another server, or another run of it, than the last
    one, or may do so, because the server does not tell.
    """

    def __init__(self, queues: Sequence[QueueKeys], deadline_s: float, restarted: Callable[[], None]) -> None:
        self.facts = ServerFacts()
        self._queues = queues
        self._deadline_s = deadline_s
        self._restarted = restarted
        self._was_seen = False
        self._log = Logger()

    def connected(self, connection: RedisConnection) -> None:
        """A new connection is ready."""
        ensureDeferred(self._look(connection)).addErrback(
            lambda failure: self._log.failure("cannot look at Redis", failure)
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
            facts = ServerFacts.from_info(await connection.within(self._deadline_s, connection.info()))
        except QueueUnavailable as error:
            return ServerFacts() if error.kind is RedisErrorKind.NOPERM else None
        try:
            fsync = await connection.within(
                self._deadline_s, connection.execute_command("CONFIG", "GET", "appendfsync")
            )
        except QueueUnavailable as error:
            return None if error.unknown else facts
        return evolve(facts, appendfsync=fsync[1].decode() if len(fsync) == 2 else None)

    def _warn(self) -> None:
        for danger in self.facts.dangers:
            self._log.warn("Redis is not safe to acknowledge from: {danger}", danger=danger)
        if self.facts.safety == "unknown":
            self._log.warn("whether Redis is safe to acknowledge from is unknown: it does not let us ask")
        untagged = [keys.queue for keys in self._queues if not keys.is_hash_tagged]
        if self.facts.is_cluster and untagged:
            self._log.error(
                "this Redis is a cluster, where the keys of a queue must share a slot: "
                "set --prefix '{{bull}}' here and in the workers (now without a hash tag: {queues})",
                queues=", ".join(untagged),
            )

    async def describe(self, pool: RedisPool) -> Mapping[str, object]:
        """Whether Redis can be reached, and if not, the class of the error; and whether it is safe."""
        if pool.writer is None:
            return {"status": "down", "error": pool.last_error.kind.value if pool.last_error else None}
        return {
            "status": "up",
            "version": self.facts.version,
            "safety": self.facts.safety,
            "dangers": self.facts.dangers,
        }

    async def count_jobs(self, pool: RedisPool) -> JobCounts:
        """The jobs of each queue that are not done, by BullMQ's names for their states."""
        return {keys.queue: await self._count(pool.prober, keys) for keys in self._queues}

    async def _count(self, connection: RedisConnection | None, keys: QueueKeys) -> Mapping[str, int] | None:
        if connection is None:
            return None
        try:
            return await self._ask_counts(connection, keys)
        except QueueUnavailable:
            return None

    async def _ask_counts(self, connection: RedisConnection, keys: QueueKeys) -> Mapping[str, int]:
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
            state: await connection.within(self._deadline_s, count(key))
            for state, (count, key) in commands.items()
        }

    async def waiting_since(self, pool: RedisPool) -> WaitingSince:
        """How old the jobs are whose turn is next, at a cost that does not grow with their number."""
        found: dict[str, int | None] = {}
        for keys in self._queues:
            connection = pool.prober
            if connection is not None:
                with suppress(QueueUnavailable):
                    found[keys.queue] = await self._next_since(connection, keys)
        return found

    async def _next_since(self, connection: RedisConnection, keys: QueueKeys) -> int | None:
        # BullMQ adds at the head of the list, and takes from its end.
        job_id = await connection.within(self._deadline_s, connection.lindex(keys.wait, -1))
        if job_id is None:
            return None
        # Its worker may be done with it by now, and have removed it: then there is no timestamp.
        name = keys.job(job_id.decode("utf-8", "replace"))
        [since_ms] = await connection.within(self._deadline_s, connection.hmget(name, ["timestamp"]))
        return int(since_ms) if since_ms is not None and since_ms.isdigit() else None

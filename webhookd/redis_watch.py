"""What Redis says of itself and of the queues: for health, and to warn of what cannot work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from attrs import frozen
from twisted.internet.defer import ensureDeferred
from twisted.logger import Logger

from webhookd.bullmq import QueueKeys
from webhookd.model import QueueUnavailable
from webhookd.redis_pool import RedisConnection, RedisPool


@frozen
class ServerFacts:
    """From INFO; None where the server does not say, or does not let this user ask."""

    version: str | None = None
    run_id: str | None = None
    is_cluster: bool | None = None

    @classmethod
    def from_info(cls, info: bytes) -> ServerFacts:
        """Read the lines ``name:value`` of an INFO reply."""
        lines = (line.partition(":") for line in info.decode("utf-8", "replace").splitlines())
        values = {name: value for name, colon, value in lines if colon}
        return cls(
            version=values.get("valkey_version") or values.get("redis_version"),
            run_id=values.get("run_id"),
            is_cluster=values["cluster_enabled"] == "1" if "cluster_enabled" in values else None,
        )


class RedisWatch:
    """Looks at each server that the pool connects to, and at the queues when somebody asks."""

    def __init__(self, queues: Sequence[QueueKeys], deadline_s: float) -> None:
        self.facts = ServerFacts()
        self._queues = queues
        self._deadline_s = deadline_s
        self._log = Logger()

    def connected(self, connection: RedisConnection) -> None:
        """A new connection is ready."""
        ensureDeferred(self._look(connection)).addErrback(
            lambda failure: self._log.failure("cannot look at Redis", failure)
        )

    async def _look(self, connection: RedisConnection) -> None:
        try:
            self.facts = ServerFacts.from_info(await connection.within(self._deadline_s, connection.info()))
        except QueueUnavailable:
            self.facts = ServerFacts()
        untagged = [keys.queue for keys in self._queues if not keys.is_hash_tagged]
        if self.facts.is_cluster and untagged:
            self._log.error(
                "this Redis is a cluster, where the keys of a queue must share a slot: set --prefix '{{bull}}' "
                "here and in the workers (now without a hash tag: {queues})",
                queues=", ".join(untagged),
            )

    async def describe(self, pool: RedisPool) -> Mapping[str, object]:
        """Whether Redis can be reached, and if not, the class of the error."""
        if pool.writer is None:
            return {"status": "down", "error": pool.last_error.kind.value if pool.last_error else None}
        return {"status": "up", "version": self.facts.version}

    async def count_jobs(self, pool: RedisPool) -> Mapping[str, object]:
        """The jobs of each queue that no worker has taken yet, by BullMQ's names for their states."""
        return {keys.queue: await self._count(pool.prober, keys) for keys in self._queues}

    async def _count(self, connection: RedisConnection | None, keys: QueueKeys) -> Mapping[str, int] | None:
        if connection is None:
            return None
        commands = {
            "waiting": connection.llen(keys.wait),
            "paused": connection.llen(keys.paused),
            "delayed": connection.zcard(keys.delayed),
            "prioritized": connection.zcard(keys.prioritized),
        }
        return {state: await connection.within(self._deadline_s, count) for state, count in commands.items()}

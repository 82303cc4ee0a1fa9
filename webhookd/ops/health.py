"""How the daemon is: from a few facts to one word, and a report that says why."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from enum import Enum
from typing import Any

from attrs import define
from twisted.internet.defer import ensureDeferred
from twisted.internet.interfaces import IReactorTime

from webhookd.config import Source
from webhookd.model import ISpool
from webhookd.redis.breaker import CircuitBreaker

_CHECK_DEADLINE_S = 0.5

#: Says one section of the report: a name for each fact.
Check = Callable[[], Coroutine[Any, Any, Mapping[str, object]]]


class Status(Enum):
    """The one word. All but ``UNAVAILABLE`` and ``DRAINING`` are ready for events."""

    OK = "ok"
    DEGRADED = "degraded"
    DRAINING = "draining"
    UNAVAILABLE = "unavailable"


@define(eq=False)
class Health:
    """What is known of the daemon's state.

    ``can_queue`` says whether Redis takes jobs now, ``can_spool`` whether the spool does, None where there is
    none; ``started_s`` and the clock give the uptime.
    """

    clock: IReactorTime
    version: str
    started_s: float
    can_queue: Callable[[], bool]
    can_spool: Callable[[], bool | None]
    checks: Mapping[str, Check]
    draining: bool = False

    @property
    def status(self) -> Status:
        """The one word for the state of now."""
        if self.draining:
            return Status.DRAINING
        can_queue, can_spool = self.can_queue(), self.can_spool()
        if can_queue and can_spool is not False:
            return Status.OK
        return Status.DEGRADED if can_queue or can_spool else Status.UNAVAILABLE

    def is_ready(self) -> bool:
        """Whether an event could be accepted now."""
        return self.status in (Status.OK, Status.DEGRADED)

    def drain(self) -> None:
        """From now on the daemon ends."""
        self.draining = True

    async def report(self) -> Mapping[str, object]:
        """Everything, for people and machines; a check that does not answer in time says so."""
        report: dict[str, object] = {
            "status": self.status.value,
            "version": self.version,
            "uptimeSeconds": round(self.clock.seconds() - self.started_s),
        }
        for name, check in self.checks.items():
            report[name] = await self._within_deadline(check)
        return report

    async def _within_deadline(self, check: Check) -> Mapping[str, object]:
        try:
            return await ensureDeferred(check()).addTimeout(_CHECK_DEADLINE_S, self.clock)
        except Exception as error:  # noqa: BLE001  # the report goes on, and says which check failed
            return {"error": type(error).__name__}


async def describe_breaker(breaker: CircuitBreaker) -> Mapping[str, object]:
    """Where the breaker stands."""
    return {"state": breaker.state.value}


async def describe_sources(sources: Mapping[str, Source]) -> Mapping[str, object]:
    """Which sources anybody may send for."""
    return {"open": [source.name for source in sources.values() if source.is_open]}


async def describe_spool(spool: ISpool | None, now_ms: Callable[[], int]) -> Mapping[str, object]:
    """What the spool holds, and what is wrong with it."""
    if spool is None:
        return {"status": "off"}
    stats = spool.stats
    oldest_at_ms = stats.oldest_received_at_ms
    return {
        "status": "ok" if stats.problem is None else "down",
        "problem": stats.problem,
        "records": stats.records,
        "bytes": stats.bytes,
        "oldestAgeSeconds": 0 if oldest_at_ms is None else max(0, now_ms() - oldest_at_ms) // 1000,
        "deadRecords": stats.dead_records,
        "corruptRecords": stats.corrupt_records,
    }

"""The daemon's health: one word from a few facts, and a report with all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum

from attrs import Factory, define, field
from twisted.internet.interfaces import IReactorTime

from webhookd import __version__
from webhookd.config import Source
from webhookd.model import ISpool
from webhookd.redis.watch import QueueWatch

#: Returns one section of the report: its facts by name.
Section = Callable[[], Mapping[str, object]]


class Status(Enum):
    """The one word. ``OK`` and ``DEGRADED`` mean ready for events."""

    OK = "ok"
    DEGRADED = "degraded"
    DRAINING = "draining"
    UNAVAILABLE = "unavailable"


@define(eq=False)
class Health:
    """The daemon's state.

    ``can_queue`` returns whether Redis accepts jobs now, ``can_spool`` whether the spool does; None means
    that there is no spool. ``clock`` is for the uptime.
    """

    clock: IReactorTime
    can_queue: Callable[[], bool]
    can_spool: Callable[[], bool | None]
    sections: Mapping[str, Section]
    queue_watch: QueueWatch
    draining: bool = False
    _started_s: float = field(init=False, default=Factory(lambda self: self.clock.seconds(), takes_self=True))

    @property
    def status(self) -> Status:
        """The state now, in one word."""
        if self.draining:
            return Status.DRAINING
        can_queue, can_spool = self.can_queue(), self.can_spool()
        if can_queue and can_spool is not False:
            return Status.OK
        return Status.DEGRADED if can_queue or can_spool else Status.UNAVAILABLE

    def is_ready(self) -> bool:
        """Return whether an event could be accepted now."""
        return self.status in (Status.OK, Status.DEGRADED)

    def drain(self) -> None:
        """Report ``DRAINING`` from now on: the daemon stops."""
        self.draining = True

    def facts(self) -> Mapping[str, object]:
        """Return all that is known without asking Redis."""
        return {
            "status": self.status.value,
            "version": __version__,
            "uptimeSeconds": round(self.clock.seconds() - self._started_s),
            **{name: describe() for name, describe in self.sections.items()},
        }

    async def report(self) -> Mapping[str, object]:
        """Return everything, for people and machines."""
        await self.queue_watch.refresh()
        return {**self.facts(), "queues": self.queue_watch.last.jobs}


def describe_sources(sources: Mapping[str, Source]) -> Mapping[str, object]:
    """Return which sources accept requests without a credential."""
    return {"open": [source.name for source in sources.values() if source.is_open]}


def describe_spool(spool: ISpool | None, now_ms: Callable[[], int]) -> Mapping[str, object]:
    """Return what the spool holds, and its problem if it has one."""
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

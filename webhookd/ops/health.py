"""How the daemon is: from a few facts to one word, and a report that says why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum

from attrs import Factory, define, field
from twisted.internet.interfaces import IReactorTime

from webhookd import __version__
from webhookd.config import Source
from webhookd.model import ISpool
from webhookd.redis.watch import QueueWatch

#: Gives one section of the report: a name for each fact.
Section = Callable[[], Mapping[str, object]]


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
    none; ``clock`` gives the uptime.
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

    def facts(self) -> Mapping[str, object]:
        """What is known without a question to anyone."""
        return {
            "status": self.status.value,
            "version": __version__,
            "uptimeSeconds": round(self.clock.seconds() - self._started_s),
            **{name: describe() for name, describe in self.sections.items()},
        }

    async def report(self) -> Mapping[str, object]:
        """Everything, for people and machines."""
        await self.queue_watch.refresh()
        return {**self.facts(), "queues": self.queue_watch.last.jobs}


def describe_sources(sources: Mapping[str, Source]) -> Mapping[str, object]:
    """Which sources anybody may send for."""
    return {"open": [source.name for source in sources.values() if source.is_open]}


def describe_spool(spool: ISpool | None, now_ms: Callable[[], int]) -> Mapping[str, object]:
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

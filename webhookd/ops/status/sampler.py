"""From the parts' counters to what the page shows: the state of now, and the history of the last minutes."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from twisted.internet.interfaces import IReactorTime

from webhookd.histogram import DURATIONS_S
from webhookd.model import Outcome
from webhookd.ops.health import Health
from webhookd.ops.metrics import Exposition, Parts, count_locks
from webhookd.ops.status.rates import Rates, Reading, quantile, rates_between
from webhookd.redis.watch import JobCounts

#: Rates and percentiles are those of so many seconds: long enough to be calm, short enough to be of now.
WINDOW_S = 10
HISTORY_POINTS = 300

_WEBHOOK_ROUTES = "/webhook/"
_CHECKS = ("redis", "breaker", "spool")  # those of health that ask nobody

#: ms since 1970; events per second; p95 in ms; waiting jobs; records on disk. None where it is not known.
Point: TypeAlias = tuple[int, float, float | None, int | None, int | None]


class Sampler:
    """Reads the counters when it is told to, once a second.

    ``state`` is what the last reading showed, in the words of the health report, and ``points`` the history,
    oldest first. ``replica`` is this daemon's name.
    """

    def __init__(
        self, clock: IReactorTime, parts: Parts, health: Health, exposition: Exposition, replica: str
    ) -> None:
        self.state: Mapping[str, object] = {}
        self._clock = clock
        self._parts = parts
        self._health = health
        self._exposition = exposition
        self._replica = replica
        self._readings: deque[Reading] = deque(maxlen=WINDOW_S + 1)
        self._points: deque[Point] = deque(maxlen=HISTORY_POINTS)
        self._status = ""
        self._status_since_ms = 0

    @property
    def points(self) -> Sequence[Point]:
        """One a second, of the last minutes."""
        return tuple(self._points)

    async def sample(self) -> None:
        """Take a reading."""
        parts, health, now_ms = self._parts, self._health, self._parts.now_ms()
        self._readings.append(self._read())
        rates = rates_between(self._readings[0], self._readings[-1])
        p50_ms, p95_ms, p99_ms = (_quantile_ms(rates.durations, share) for share in (0.5, 0.95, 0.99))
        job_counts, waiting_since = self._exposition.recent_look()
        self._note_status(health.status.value, now_ms)
        self.state = {
            "at": now_ms,
            "status": self._status,
            "statusSince": self._status_since_ms,
            "replica": self._replica,
            "version": health.version,
            "uptimeSeconds": round(self._clock.seconds() - health.started_s),
            "eventsPerSecond": round(rates.events, 2),
            "refusedPerSecond": round(rates.refused, 2),
            "durationsMs": {"p50": p50_ms, "p95": p95_ms, "p99": p99_ms},
            "outcomes": self._describe_outcomes(rates),
            "locks": count_locks(parts.queues),
            **{name: await health.checks[name]() for name in _CHECKS},
            "spoolCapacityBytes": parts.spool_capacity_bytes,
            "queues": {
                name: {"jobs": counts, "waitingSince": waiting_since.get(name)}
                for name, counts in job_counts.items()
            },
            "refusals": self._describe_refusals(),
        }
        on_disk = None if parts.spool is None else parts.spool.stats.records
        self._points.append((now_ms, round(rates.events, 2), p95_ms, _waiting(job_counts), on_disk))

    def _read(self) -> Reading:
        outcomes: Counter[str] = Counter({outcome.value: 0 for outcome in Outcome} | {"failed": 0})
        for (_source, _event, outcome), count in self._parts.app.events.items():
            outcomes[outcome] += count
        site = self._parts.site.state
        durations = [
            histogram.buckets
            for route, histogram in site.durations_s.items()
            if route.startswith(_WEBHOOK_ROUTES)
        ]
        none = [0] * (len(DURATIONS_S) + 1)
        return Reading(
            self._clock.seconds(),
            outcomes,
            sum(count for (_route, _method, status), count in site.requests.items() if status >= 400),
            [sum(column) for column in zip(none, *durations, strict=True)],
        )

    def _note_status(self, status: str, now_ms: int) -> None:
        if status != self._status:
            self._status, self._status_since_ms = status, now_ms

    def _describe_outcomes(self, rates: Rates) -> Mapping[str, object]:
        counts = self._readings[-1].outcomes
        return {
            outcome: {"total": count, "perSecond": round(rates.outcomes[outcome], 2)}
            for outcome, count in counts.items()
        }

    def _describe_refusals(self) -> Sequence[Mapping[str, object]]:
        """Of the sources only those that there are: a path can hold anything."""
        sources = self._parts.intake.sources
        return [
            {
                "at": at_ms,
                "source": refused.source if refused.source in sources else None,
                "status": refused.status,
                "code": refused.code,
                "requestId": refused.request_id.decode(),
            }
            for at_ms, refused in self._parts.site.state.recent_refusals
        ]


def _quantile_ms(durations: Sequence[int], share: float) -> float | None:
    value_s = quantile(DURATIONS_S, durations, share)
    return None if value_s is None else round(1000 * value_s, 1)


def _waiting(job_counts: JobCounts) -> int | None:
    """How many jobs wait in all queues; None while one of them is not known."""
    known = [counts for counts in job_counts.values() if counts is not None]
    if not known or len(known) < len(job_counts):
        return None
    return sum(counts[state] for counts in known for state in ("waiting", "prioritized", "paused"))

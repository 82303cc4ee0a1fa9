"""The content of the page, from the parts' counters: the state now, and the history of the last minutes."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from twisted.internet.interfaces import IReactorTime

from webhookd.histogram import DURATIONS_S
from webhookd.model import Outcome
from webhookd.ops.health import Health
from webhookd.ops.metrics import Components
from webhookd.ops.status.rates import Rates, Reading, quantile, rates_between
from webhookd.redis.watch import QueueLook

#: Rates and percentiles cover this many seconds: long enough to be steady, short enough to be current.
WINDOW_S = 10
HISTORY_POINTS = 300

_WEBHOOK_ROUTES = "/webhook/"

#: ms since 1970; events per second; p95 in ms; waiting jobs; records on disk. None means unknown.
Point: TypeAlias = tuple[int, float, float | None, int | None, int | None]


class Sampler:
    """Reads the counters once a second, when `sample` is called.

    ``state`` is the result of the last reading, in the words of the health report, and ``points`` is the
    history, oldest first. ``replica`` is this daemon's name.
    """

    def __init__(self, clock: IReactorTime, components: Components, health: Health, replica: str) -> None:
        self.state: Mapping[str, object] = {}
        self._clock = clock
        self._components = components
        self._health = health
        self._replica = replica
        self._readings: deque[Reading] = deque(maxlen=WINDOW_S + 1)
        self._points: deque[Point] = deque(maxlen=HISTORY_POINTS)
        self._status: object = None
        self._status_since_ms = 0

    @property
    def points(self) -> Sequence[Point]:
        """The points of the last minutes, one a second."""
        return tuple(self._points)

    def sample(self) -> None:
        """Take a reading."""
        components, now_ms = self._components, self._components.now_ms()
        self._readings.append(self._read())
        rates = rates_between(self._readings[0], self._readings[-1])
        p50_ms, p95_ms, p99_ms = (_quantile_ms(rates.durations, share) for share in (0.5, 0.95, 0.99))
        look = components.queue_watch.last
        facts = self._health.facts()
        if facts["status"] != self._status:
            self._status, self._status_since_ms = facts["status"], now_ms
        self.state = {
            **facts,
            "at": now_ms,
            "statusSince": self._status_since_ms,
            "replica": self._replica,
            "eventsPerSecond": round(rates.events, 2),
            "refusedPerSecond": round(rates.refused, 2),
            "durationsMs": {"p50": p50_ms, "p95": p95_ms, "p99": p99_ms},
            "outcomes": self._describe_outcomes(rates),
            "locks": components.count_locks(),
            "spoolCapacityBytes": components.spool_capacity_bytes,
            "queues": {
                name: {"jobs": counts, "waitingSince": look.next_since_ms.get(name)}
                for name, counts in look.jobs.items()
            },
            "refusals": self._describe_refusals(),
        }
        on_disk = None if components.spool is None else components.spool.stats.records
        self._points.append((now_ms, round(rates.events, 2), p95_ms, _waiting(look), on_disk))

    def _read(self) -> Reading:
        outcomes: Counter[str] = Counter({outcome.value: 0 for outcome in Outcome} | {"failed": 0})
        for (_source, _event, outcome), count in self._components.app.events.items():
            outcomes[outcome] += count
        site = self._components.site.state
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

    def _describe_outcomes(self, rates: Rates) -> Mapping[str, object]:
        counts = self._readings[-1].outcomes
        return {
            outcome: {"total": count, "perSecond": round(rates.outcomes[outcome], 2)}
            for outcome, count in counts.items()
        }

    def _describe_refusals(self) -> Sequence[Mapping[str, object]]:
        """Return the last refusals, without unknown sources: a path can hold anything."""
        sources = self._components.intake.sources
        return [
            {
                "at": at_ms,
                "source": refused.source if refused.source in sources else None,
                "status": refused.status,
                "code": refused.code,
                "requestId": refused.request_id.decode(),
            }
            for at_ms, refused in self._components.site.state.recent_refusals
        ]


def _quantile_ms(durations: Sequence[int], share: float) -> float | None:
    value_s = quantile(DURATIONS_S, durations, share)
    return None if value_s is None else round(1000 * value_s, 1)


def _waiting(look: QueueLook) -> int | None:
    """Return how many jobs wait in all queues; None if one of them is unknown."""
    known = [counts for counts in look.jobs.values() if counts is not None]
    if len(known) < len(look.jobs):
        return None
    return sum(counts[state] for counts in known for state in ("waiting", "prioritized", "paused"))

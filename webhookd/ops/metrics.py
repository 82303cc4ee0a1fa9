"""Every metric of the daemon, read from the parts' own numbers when Prometheus asks.

Base units; labels from closed sets. If a label's values are known, they are zero from the start.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from functools import partial
from itertools import accumulate, product
from typing import Any, TypeVar

from attrs import frozen
from prometheus_client import CollectorRegistry, Metric, ProcessCollector, openmetrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString
from twisted.application.internet import TimerService
from twisted.internet.interfaces import IReactorTime

from webhookd import __version__
from webhookd.bullmq.script import AddResult
from webhookd.histogram import DURATIONS_S, Histogram
from webhookd.http import WebhookSite
from webhookd.intake import Intake
from webhookd.intake.auth import REASONS
from webhookd.model import Outcome, RedisErrorKind
from webhookd.redis.breaker import CallOutcome, CircuitBreaker, State
from webhookd.redis.pool import RedisPool
from webhookd.redis.queue import RedisQueue
from webhookd.redis.watch import QueueWatch, RedisWatch
from webhookd.spool.service import SpoolService
from webhookd.web import STATUS_OF_ERROR, STATUS_OF_OUTCOME, WebhookApp

_LAG_INTERVAL_S = 0.5
_LAG_SAMPLES = 30

_OPENMETRICS = "application/openmetrics-text"
_OPENMETRICS_TYPE = f"{_OPENMETRICS}; version=1.0.0; charset=utf-8"
_TEXT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SAFETY_STATES = ("safe", "unsafe", "unknown")

# Labels that are zero from the start. If a counter appears with its first increment, rate() and increase() do
# not see that increment, and neither do the alerts.
_STATUSES = sorted({*STATUS_OF_OUTCOME.values(), *STATUS_OF_ERROR.values()})
_ROUTES = [rule.rule for rule in WebhookApp.app.url_map.iter_rules() if "POST" in (rule.methods or ())]
_REQUESTS = [
    *((route, "POST", status) for route in _ROUTES for status in _STATUSES),
    *(("none", "none", status) for status in (400, 408, 413, 429, 431)),
]
_REFUSALS = (
    *REASONS,
    "not_utf8",
    "not_json",
    "not_an_object",
    "no_event",
    "unknown_source",
    "unsupported_media_type",
    "unsupported_encoding",
    "too_many",
)
_TRANSITIONS = [
    (State.CLOSED, State.OPEN),
    (State.OPEN, State.HALF_OPEN),
    (State.HALF_OPEN, State.OPEN),
    (State.HALF_OPEN, State.CLOSED),
]

_Labels = TypeVar("_Labels")
_Family = TypeVar("_Family", CounterMetricFamily, GaugeMetricFamily)


class ReactorLag(TimerService):
    """The delay of the reactor's timers: the worst of the last 15 s. A blocked reactor answers no request."""

    def __init__(self, clock: IReactorTime) -> None:
        super().__init__(_LAG_INTERVAL_S, self._sample)
        self.clock: IReactorTime = clock
        self._samples_s: deque[float] = deque(maxlen=_LAG_SAMPLES)

    @property
    def worst_s(self) -> float:
        """The worst delay, in seconds."""
        return max(self._samples_s, default=0.0)

    def startService(self) -> None:
        """Start to measure."""
        self._due_s = self.clock.seconds()
        super().startService()

    def _sample(self) -> None:
        now_s = self.clock.seconds()
        self._samples_s.append(max(0.0, now_s - self._due_s))
        self._due_s = now_s + _LAG_INTERVAL_S


@frozen
class Components:
    """The parts of the daemon that metrics and status page read; ``spool`` is None if it is off.

    ``redis_queues`` add jobs to Redis; ``queue_watch`` looks at the queues in Redis.
    """

    site: WebhookSite
    app: WebhookApp
    intake: Intake
    redis_queues: Sequence[RedisQueue]
    pool: RedisPool
    breaker: CircuitBreaker
    redis_watch: RedisWatch
    queue_watch: QueueWatch
    spool: SpoolService | None
    spool_capacity_bytes: int
    lag: ReactorLag
    now_ms: Callable[[], int]

    def count_locks(self) -> Mapping[str, int]:
        """Count the creation locks: ``acquired`` with a new job, or ``held`` by an earlier one."""
        locks = {"acquired": 0, "held": 0}
        for queue in self.redis_queues:
            for answer, count in queue.results.items():
                locks["acquired" if answer is AddResult.ADDED else "held"] += count
        return locks


class DaemonCollector(Collector):
    """Makes the metrics from the components."""

    def __init__(self, components: Components) -> None:
        self._components = components

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics."""
        yield _gauges("webhookd_build_info", "The running version.", ["version"], {__version__: 1})
        yield from self._http()
        yield from self._events()
        yield from self._redis()
        yield from self._queues()
        yield from self._breaker()
        yield from self._spool()
        worst_s = self._components.lag.worst_s
        yield _gauge("webhookd_reactor_lag_seconds", "Worst delay of a timer in 15 s.", worst_s)

    def _http(self) -> Iterator[Metric]:
        site = self._components.site.state
        yield _counters(
            "webhookd_http_requests",
            "Answered requests; invalid HTTP has neither route nor method.",
            ["route", "method", "code"],
            _with_zeros(_REQUESTS, site.requests),
        )
        yield _histograms(
            "webhookd_http_request_duration_seconds",
            "Time from the last byte of a request to its answer.",
            ["route"],
            {route: [Histogram(DURATIONS_S)] for route in _ROUTES}
            | {route: [durations_s] for route, durations_s in site.durations_s.items()},
        )
        in_flight = self._components.app.in_flight.requests
        yield _gauge("webhookd_http_requests_in_flight", "Deliveries without an answer yet.", in_flight)
        yield _gauge("webhookd_http_connections", "Open connections of senders.", len(site.channels))

    def _events(self) -> Iterator[Metric]:
        app, intake = self._components.app, self._components.intake
        yield _counters(
            "webhookd_events",
            "Events by outcome.",
            ["source", "event", "outcome"],
            _with_zeros(_first_events(intake.sources), app.events),
        )
        refusals = _with_zeros(_REFUSALS, app.refusals)
        yield _counters("webhookd_refusals", "Refused requests.", ["reason"], refusals)
        yield _counters(
            "webhookd_signature_failures",
            "Requests without a valid credential.",
            ["source", "reason"],
            _with_zeros(product(intake.sources, REASONS), intake.signature_failures),
        )
        secrets = [
            (name, position)
            for name, source in intake.sources.items()
            for position in range(len(source.authenticator.secrets))
        ]
        yield _counters(
            "webhookd_signature_secret_used",
            "Valid signatures by the position of the secret; end a rotation when the old one is unused.",
            ["source", "secret"],
            _with_zeros(secrets, intake.secrets_used),
        )

    def _redis(self) -> Iterator[Metric]:
        components = self._components
        locks = components.count_locks()
        yield _counters(
            "webhookd_lock", "Creation locks: acquired with a new job, or held.", ["outcome"], locks
        )
        yield _histograms(
            "webhookd_enqueue_duration_seconds",
            "Duration of successful calls that add jobs to Redis.",
            [],
            {(): [queue.durations_s for queue in components.redis_queues]},
        )
        batch_sizes = [queue.batch_sizes for queue in components.redis_queues]
        yield _histograms("webhookd_enqueue_batch_size", "Jobs in one call.", [], {(): batch_sizes})
        errors = _with_zeros(RedisErrorKind, components.pool.errors)
        yield _counters("webhookd_redis_errors", "Failed calls and connections.", ["kind"], errors)
        is_up = components.pool.writer is not None
        yield _gauge("webhookd_redis_up", "Whether a connection to Redis is ready.", is_up)
        yield _gauges(
            "webhookd_redis_safety",
            "Whether Redis keeps what it acknowledges, as far as known.",
            ["state"],
            {state: state == components.redis_watch.facts.safety for state in _SAFETY_STATES},
        )

    def _queues(self) -> Iterator[Metric]:
        look = self._components.queue_watch.last
        jobs = {
            (queue, state): count
            for queue, counts in look.jobs.items()
            for state, count in (counts or {}).items()
        }
        yield _gauges("bullmq_job_count", "Number of jobs in the queue by state.", ["queue", "state"], jobs)
        yield _gauges(
            "webhookd_queue_oldest_wait_age_seconds",
            "Time since the event of the next job was received; 0 if no job waits.",
            ["queue"],
            {queue: self._age_s(since_ms) for queue, since_ms in look.next_since_ms.items()},
        )

    def _age_s(self, since_ms: int | None) -> float:
        return 0.0 if since_ms is None else max(0, self._components.now_ms() - since_ms) / 1000

    def _breaker(self) -> Iterator[Metric]:
        breaker = self._components.breaker
        yield _gauges(
            "webhookd_circuit_breaker_state",
            "State of the circuit breaker for Redis.",
            ["state"],
            {state: state is breaker.state for state in State},
        )
        yield _counters(
            "webhookd_circuit_breaker_calls",
            "Calls of Redis by the breaker's judgement.",
            ["outcome"],
            _with_zeros(CallOutcome, breaker.calls),
        )
        yield _counters(
            "webhookd_circuit_breaker_transitions",
            "Changes of state.",
            ["from", "to"],
            _with_zeros(_TRANSITIONS, breaker.transitions),
        )

    def _spool(self) -> Iterator[Metric]:
        spool = self._components.spool
        if spool is None:
            return
        stats, capacity_bytes = spool.stats, self._components.spool_capacity_bytes
        age_s = self._age_s(stats.oldest_received_at_ms)
        yield _gauge("webhookd_spool_up", "Whether the spool accepts events.", spool.is_up)
        yield _gauge("webhookd_spool_records", "Events on disk.", stats.records)
        yield _gauge("webhookd_spool_bytes", "Size of the events on disk.", stats.bytes)
        yield _gauge("webhookd_spool_capacity_bytes", "Maximum size of the spool.", capacity_bytes)
        yield _gauge("webhookd_spool_oldest_age_seconds", "Age of the oldest event on disk.", age_s)
        yield _gauge(
            "webhookd_spool_dead_records", "Events that Redis refused permanently.", stats.dead_records
        )
        yield _gauge(
            "webhookd_spool_corrupt_records", "Records that are damaged on disk.", stats.corrupt_records
        )
        replayed = _with_zeros(("queued", "dead"), spool.drain.replayed)
        yield _counters("webhookd_spool_replayed", "Events that left the spool.", ["outcome"], replayed)


class Exposition:
    """The text of all metrics, including those of the process."""

    def __init__(self, components: Components) -> None:
        self._queue_watch = components.queue_watch
        self._registry = CollectorRegistry()
        self._registry.register(DaemonCollector(components))
        ProcessCollector(registry=self._registry)

    async def expose(self, accept: str) -> tuple[str, bytes]:
        """Return media type and text in the format that ``accept`` asks for. It never fails."""
        await self._queue_watch.refresh()
        media_types = {part.partition(";")[0].strip().lower() for part in accept.split(",")}
        if _OPENMETRICS in media_types:
            return _OPENMETRICS_TYPE, openmetrics.exposition.generate_latest(self._registry)
        return _TEXT_TYPE, generate_latest(self._registry)


def _with_zeros(known: Iterable[_Labels], counts: Mapping[_Labels, int]) -> Mapping[_Labels, int]:
    """Zero for known labels not yet seen."""
    return {**dict.fromkeys(known, 0), **counts}


def _first_events(sources: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """Yield the labels of each source with every outcome once, by an event that each installation sends.

    All events with all outcomes would be a hundred series per source, most of them zero forever. No alert
    looks at a single event, so it is enough that the sum over events exists from the start.
    """
    for source in sources:
        yield from ((source, "message_created", outcome.value) for outcome in Outcome)
        yield source, "unknown", "failed"


def _family(
    kind: type[_Family], name: str, help_text: str, labels: Sequence[str], values: Mapping[Any, float]
) -> _Family:
    family = kind(name, help_text, labels=labels)
    for label_values, value in values.items():
        family.add_metric(_texts(label_values), value)
    return family


_gauge = GaugeMetricFamily
_gauges = partial(_family, GaugeMetricFamily)
_counters = partial(_family, CounterMetricFamily)


def _histograms(
    name: str, help_text: str, labels: list[str], values: Mapping[Any, Sequence[Histogram]]
) -> HistogramMetricFamily:
    """Return a family in which each value is the sum of several histograms with the same bounds."""
    family = HistogramMetricFamily(name, help_text, labels=labels)
    for label_values, histograms in values.items():
        sums = [sum(column) for column in zip(*(one.buckets for one in histograms), strict=True)]
        bounds = [floatToGoString(bound) for bound in (*histograms[0].bounds, math.inf)]
        buckets = list(zip(bounds, accumulate(sums), strict=True))
        family.add_metric(_texts(label_values), buckets, math.fsum(one.sum for one in histograms))
    return family


def _texts(label_values: object) -> list[str]:
    """Return the values of a metric's labels, a tuple or a single one, as texts."""
    values = label_values if isinstance(label_values, tuple) else (label_values,)
    return [str(value.value if isinstance(value, Enum) else value) for value in values]

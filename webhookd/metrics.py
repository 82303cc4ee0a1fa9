"""What Prometheus sees: every metric of the daemon, read from the parts' own numbers when it asks.

Base units, labels from closed sets. Zero is visible from the start wherever a label's values are known.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from itertools import accumulate
from typing import Any

from attrs import frozen
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from twisted.application.service import Service
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall

from webhookd.breaker import CallOutcome, CircuitBreaker, State
from webhookd.bullmq import Answer
from webhookd.counts import Histogram
from webhookd.http import WebhookSite
from webhookd.intake import Intake
from webhookd.model import RedisErrorKind
from webhookd.redis_pool import RedisPool
from webhookd.redis_queue import RedisQueue
from webhookd.redis_watch import JobCounts, RedisWatch
from webhookd.spool_service import SpoolService
from webhookd.web import WebhookApp

_LAG_INTERVAL_S = 0.5
_LAG_SAMPLES = 30
_JOB_COUNTS_AGE_S = 2.0

_LOCK_OUTCOMES = {Answer.ADDED: "acquired", Answer.LOCK_HELD: "held", Answer.JOB_EXISTS: "held"}
_SAFETY_STATES = ("safe", "unsafe", "unknown")


class ReactorLag(Service):
    """How late the reactor runs its timers: the worst of the last 15 s. A blocked reactor answers nobody."""

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._samples_s: deque[float] = deque(maxlen=_LAG_SAMPLES)
        self._loop = LoopingCall(self._sample)
        self._loop.clock = clock

    @property
    def worst_s(self) -> float:
        """Seconds."""
        return max(self._samples_s, default=0.0)

    def startService(self) -> None:
        """Begin to measure."""
        super().startService()
        self._due_s = self._clock.seconds()
        self._loop.start(_LAG_INTERVAL_S)

    def stopService(self) -> None:
        """Stop measuring."""
        super().stopService()
        self._loop.stop()

    def _sample(self) -> None:
        now_s = self._clock.seconds()
        self._samples_s.append(max(0.0, now_s - self._due_s))
        self._due_s = now_s + _LAG_INTERVAL_S


@frozen
class Parts:
    """The parts of the daemon whose numbers are shown; ``spool`` is None where there is none."""

    version: str
    site: WebhookSite
    app: WebhookApp
    intake: Intake
    queues: Iterable[RedisQueue]
    pool: RedisPool
    watch: RedisWatch
    breaker: CircuitBreaker
    spool: SpoolService | None
    spool_capacity_bytes: int
    lag: ReactorLag
    now_ms: Callable[[], int]


class DaemonCollector(Collector):
    """Makes the metrics from the parts; ``job_counts`` are those of the last look at the queues."""

    def __init__(self, parts: Parts) -> None:
        self.job_counts: JobCounts = {}
        self._parts = parts

    def collect(self) -> Iterator[Metric]:
        """One metric after the other."""
        yield _gauge("webhookd_build_info", "What runs here.", ["version"], {(self._parts.version,): 1})
        yield from self._http()
        yield from self._events()
        yield from self._redis()
        yield from self._breaker()
        yield from self._spool()
        yield _gauge(
            "webhookd_reactor_lag_seconds",
            "How late timers ran at worst in 15 s.",
            [],
            {(): self._parts.lag.worst_s},
        )

    def _http(self) -> Iterator[Metric]:
        site = self._parts.site
        yield _counter(
            "webhookd_http_requests",
            "Answered requests; those that were no HTTP request have neither route nor method.",
            ["route", "method", "code"],
            {(route, method, str(code)): count for (route, method, code), count in site.requests.items()},
        )
        yield _histogram(
            "webhookd_http_request_duration_seconds",
            "From the last byte of a request to its answer.",
            [site.durations_s],
        )
        yield _gauge(
            "webhookd_http_requests_in_flight",
            "Deliveries that are being taken.",
            [],
            {(): self._parts.app.in_flight.requests},
        )
        yield _gauge(
            "webhookd_http_connections", "Open connections of senders.", [], {(): len(site.channels)}
        )

    def _events(self) -> Iterator[Metric]:
        app, intake = self._parts.app, self._parts.intake
        yield _counter(
            "webhookd_events", "What became of the events.", ["source", "event", "outcome"], app.events
        )
        yield _counter("webhookd_refusals", "Refused requests.", ["reason"], _single(app.refusals))
        yield _counter(
            "webhookd_signature_failures",
            "Requests without a valid credential.",
            ["source", "reason"],
            intake.signature_failures,
        )
        used = {
            (name, str(position)): intake.secrets_used[name, position]
            for name, source in intake.sources.items()
            for position in range(len(source.authenticator.secrets))
        }
        yield _counter(
            "webhookd_signature_secret_used",
            "Signatures by the position of the secret that matched; a rotation ends when the old one rests.",
            ["source", "secret"],
            used,
        )

    def _redis(self) -> Iterator[Metric]:
        parts = self._parts
        locks = dict.fromkeys(((outcome,) for outcome in _LOCK_OUTCOMES.values()), 0)
        for queue in parts.queues:
            for answer, count in queue.answers.items():
                locks[_LOCK_OUTCOMES[answer],] += count
        yield _counter(
            "webhookd_lock", "Creation locks: acquired with a new job, or held.", ["outcome"], locks
        )
        yield _histogram(
            "webhookd_enqueue_duration_seconds",
            "Calls of Redis that add jobs, those that succeeded.",
            [queue.durations_s for queue in parts.queues],
        )
        yield _histogram(
            "webhookd_enqueue_batch_size", "Jobs in one call.", [queue.batch_sizes for queue in parts.queues]
        )
        errors = {(kind.value,): parts.pool.errors[kind] for kind in RedisErrorKind}
        yield _counter("webhookd_redis_errors", "Failed calls and connections.", ["kind"], errors)
        up = int(parts.pool.writer is not None)
        yield _gauge("webhookd_redis_up", "Whether a connection to Redis is ready.", [], {(): up})
        yield _gauge(
            "webhookd_redis_safety",
            "Whether Redis keeps what it acknowledges, as far as it tells.",
            ["state"],
            {(state,): int(state == parts.watch.facts.safety) for state in _SAFETY_STATES},
        )
        jobs = {
            (queue, state): count
            for queue, counts in self.job_counts.items()
            for state, count in (counts or {}).items()
        }
        yield _gauge("bullmq_job_count", "Number of jobs in the queue by state.", ["queue", "state"], jobs)

    def _breaker(self) -> Iterator[Metric]:
        breaker = self._parts.breaker
        yield _gauge(
            "webhookd_circuit_breaker_state",
            "Where the breaker before Redis stands.",
            ["state"],
            {(state.value,): int(state is breaker.state) for state in State},
        )
        yield _counter(
            "webhookd_circuit_breaker_calls",
            "Calls of Redis as the breaker saw them.",
            ["outcome"],
            {(outcome.value,): breaker.calls[outcome] for outcome in CallOutcome},
        )
        transitions = {(old.value, new.value): count for (old, new), count in breaker.transitions.items()}
        yield _counter(
            "webhookd_circuit_breaker_transitions", "Changes of state.", ["from", "to"], transitions
        )

    def _spool(self) -> Iterator[Metric]:
        parts = self._parts
        if parts.spool is None:
            return
        stats = parts.spool.stats
        oldest_at_ms = stats.oldest_received_at_ms
        age_s = 0.0 if oldest_at_ms is None else max(0, parts.now_ms() - oldest_at_ms) / 1000
        for name, help_text, value in (
            ("webhookd_spool_up", "Whether the spool takes events.", int(stats.problem is None)),
            ("webhookd_spool_records", "Events on disk.", stats.records),
            ("webhookd_spool_bytes", "Their size.", stats.bytes),
            ("webhookd_spool_capacity_bytes", "How much the spool may hold.", parts.spool_capacity_bytes),
            ("webhookd_spool_oldest_age_seconds", "Age of the first event on disk.", age_s),
            ("webhookd_spool_dead_records", "Events that Redis refused for good.", stats.dead_records),
            ("webhookd_spool_corrupt_records", "Records that the disk damaged.", stats.corrupt_records),
        ):
            yield _gauge(name, help_text, [], {(): value})
        replayed = {(outcome,): parts.spool.drain.replayed[outcome] for outcome in ("queued", "dead")}
        yield _counter("webhookd_spool_replayed", "Events that left the spool.", ["outcome"], replayed)


class Exposition:
    """The registry's text, with a look at the queues that is at most some seconds old."""

    def __init__(
        self,
        clock: IReactorTime,
        registry: CollectorRegistry,
        collector: DaemonCollector,
        count_jobs: Callable[[], Awaitable[JobCounts]],
    ) -> None:
        self._clock = clock
        self._registry = registry
        self._collector = collector
        self._count_jobs = count_jobs
        self._counted_at_s = -math.inf

    async def expose(self, accept: str) -> tuple[str, bytes]:
        """Media type and text, in the format that ``accept`` asks for."""
        now_s = self._clock.seconds()
        if now_s - self._counted_at_s >= _JOB_COUNTS_AGE_S:
            self._counted_at_s = now_s
            self._collector.job_counts = await self._count_jobs()
        encode, media_type = choose_encoder(accept)
        return media_type, encode(self._registry)


def _single(counts: Mapping[str, int]) -> Mapping[tuple[str, ...], int]:
    return {(label,): count for label, count in counts.items()}


def _counter(
    name: str, help_text: str, labels: list[str], values: Mapping[Any, float]
) -> CounterMetricFamily:
    family = CounterMetricFamily(name, help_text, labels=labels)
    for label_values, value in values.items():
        family.add_metric(label_values, value)
    return family


def _gauge(name: str, help_text: str, labels: list[str], values: Mapping[Any, float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, help_text, labels=labels)
    for label_values, value in values.items():
        family.add_metric(label_values, value)
    return family


def _histogram(name: str, help_text: str, histograms: Iterable[Histogram]) -> HistogramMetricFamily:
    """One metric from the sum of several histograms with the same bounds."""
    counted = list(histograms)
    sums = [sum(column) for column in zip(*(one.buckets for one in counted), strict=True)]
    bounds = [*(f"{bound:g}" for bound in counted[0].bounds), "+Inf"]
    family = HistogramMetricFamily(name, help_text)
    buckets = list(zip(bounds, accumulate(sums), strict=True))
    family.add_metric([], buckets, math.fsum(one.sum for one in counted))
    return family

"""What Prometheus sees: every metric of the daemon, read from the parts' own numbers when it asks.

Base units, labels from closed sets. Zero is visible from the start wherever a label's values are known.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, TypeVar

from attrs import frozen
from prometheus_client import CollectorRegistry, Metric, openmetrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString
from twisted.application.service import Service
from twisted.internet.defer import Deferred, ensureDeferred
from twisted.internet.defer import TimeoutError as DeadlinePassed
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.python.failure import Failure

from webhookd.bullmq.script import Answer
from webhookd.histogram import DURATIONS_S, Histogram
from webhookd.http import WebhookSite
from webhookd.intake import Intake
from webhookd.intake.auth import REASONS
from webhookd.model import Outcome, RedisErrorKind
from webhookd.redis.breaker import CallOutcome, CircuitBreaker, State
from webhookd.redis.pool import RedisPool
from webhookd.redis.queue import RedisQueue
from webhookd.redis.watch import JobCounts, RedisWatch, WaitingSince
from webhookd.spool.service import SpoolService
from webhookd.web import STATUS_OF_ERROR, STATUS_OF_OUTCOME, WebhookApp

_LAG_INTERVAL_S = 0.5
_LAG_SAMPLES = 30
_LOOK_AGE_S = 2.0
_SHOWN_AGE_S = 5.0
_LOOK_DEADLINE_S = 1.0  # Prometheus waits for 10 s, and most of what it wants to know is here

_OPENMETRICS = "application/openmetrics-text"
_OPENMETRICS_TYPE = f"{_OPENMETRICS}; version=1.0.0; charset=utf-8"
_TEXT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_LOCK_OUTCOMES = {Answer.ADDED: "acquired", Answer.LOCK_HELD: "held", Answer.JOB_EXISTS: "held"}
_SAFETY_STATES = ("safe", "unsafe", "unknown")

# What is zero from the start. A counter that appears with its first increment hides that one from rate() and
# increase(), and so from the alerts.
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

_Label = TypeVar("_Label")

_log = Logger()


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


def count_locks(queues: Iterable[RedisQueue]) -> Mapping[str, int]:
    """Creation locks: ``acquired`` with a new job, or ``held`` by an earlier one."""
    locks = dict.fromkeys(_LOCK_OUTCOMES.values(), 0)
    for queue in queues:
        for answer, count in queue.answers.items():
            locks[_LOCK_OUTCOMES[answer]] += count
    return locks


class DaemonCollector(Collector):
    """Makes the metrics from the parts.

    ``job_counts`` and ``waiting_since`` are what the last look at the queues has found.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.forget_queues()

    def forget_queues(self) -> None:
        """Show nothing of the queues rather than what may have changed since."""
        self.job_counts: JobCounts = {}
        self.waiting_since: WaitingSince = {}

    def collect(self) -> Iterator[Metric]:
        """One metric after the other."""
        yield _gauge("webhookd_build_info", "What runs here.", ["version"], {(self.parts.version,): 1})
        yield from self._http()
        yield from self._events()
        yield from self._redis()
        yield from self._breaker()
        yield from self._spool()
        yield _gauge(
            "webhookd_reactor_lag_seconds",
            "How late timers ran at worst in 15 s.",
            [],
            {(): self.parts.lag.worst_s},
        )

    def _http(self) -> Iterator[Metric]:
        site = self.parts.site.state
        durations_by_route = {route: Histogram(DURATIONS_S) for route in _ROUTES} | site.durations_s
        yield _counter(
            "webhookd_http_requests",
            "Answered requests; those that were no HTTP request have neither route nor method.",
            ["route", "method", "code"],
            {(*route, str(code)): count for (*route, code), count in _with_zeros(_REQUESTS, site.requests)},
        )
        yield _histogram(
            "webhookd_http_request_duration_seconds",
            "From the last byte of a request to its answer.",
            ["route"],
            {(route,): [durations_s] for route, durations_s in durations_by_route.items()},
        )
        yield _gauge(
            "webhookd_http_requests_in_flight",
            "Deliveries that are being taken.",
            [],
            {(): self.parts.app.in_flight.requests},
        )
        yield _gauge(
            "webhookd_http_connections", "Open connections of senders.", [], {(): len(site.channels)}
        )

    def _events(self) -> Iterator[Metric]:
        app, intake = self.parts.app, self.parts.intake
        yield _counter(
            "webhookd_events",
            "What became of the events.",
            ["source", "event", "outcome"],
            dict(_with_zeros(_first_events(intake.sources), app.events)),
        )
        refusals = {(reason,): count for reason, count in _with_zeros(_REFUSALS, app.refusals)}
        yield _counter("webhookd_refusals", "Refused requests.", ["reason"], refusals)
        reasons = [(name, reason) for name in intake.sources for reason in REASONS]
        yield _counter(
            "webhookd_signature_failures",
            "Requests without a valid credential.",
            ["source", "reason"],
            dict(_with_zeros(reasons, intake.signature_failures)),
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
        parts = self.parts
        locks = {(outcome,): count for outcome, count in count_locks(parts.queues).items()}
        yield _counter(
            "webhookd_lock", "Creation locks: acquired with a new job, or held.", ["outcome"], locks
        )
        yield _histogram(
            "webhookd_enqueue_duration_seconds",
            "Calls of Redis that add jobs, those that succeeded.",
            [],
            {(): [queue.durations_s for queue in parts.queues]},
        )
        yield _histogram(
            "webhookd_enqueue_batch_size",
            "Jobs in one call.",
            [],
            {(): [queue.batch_sizes for queue in parts.queues]},
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
        yield _gauge(
            "webhookd_queue_oldest_wait_age_seconds",
            "How long ago the event was received whose job is next; 0 where none waits.",
            ["queue"],
            {(queue,): self._age_s(since_ms) for queue, since_ms in self.waiting_since.items()},
        )

    def _age_s(self, since_ms: int | None) -> float:
        return 0.0 if since_ms is None else max(0, self.parts.now_ms() - since_ms) / 1000

    def _breaker(self) -> Iterator[Metric]:
        breaker = self.parts.breaker
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
        counted = _with_zeros(_TRANSITIONS, breaker.transitions)
        transitions = {(old.value, new.value): count for (old, new), count in counted}
        yield _counter(
            "webhookd_circuit_breaker_transitions", "Changes of state.", ["from", "to"], transitions
        )

    def _spool(self) -> Iterator[Metric]:
        parts = self.parts
        if parts.spool is None:
            return
        stats = parts.spool.stats
        age_s = self._age_s(stats.oldest_received_at_ms)
        for name, help_text, value in (
            ("webhookd_spool_up", "Whether the spool takes events.", int(parts.spool.is_up)),
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
        self._looked_at_s = -math.inf
        self._waiters: list[Deferred[None]] | None = None  # None while no look is under way

    async def expose(self, accept: str) -> tuple[str, bytes]:
        """Media type and text, in the format that ``accept`` asks for; it never fails."""
        await self.look_at_queues()
        media_types = {part.partition(";")[0].strip().lower() for part in accept.split(",")}
        if _OPENMETRICS in media_types:
            return _OPENMETRICS_TYPE, openmetrics.exposition.generate_latest(self._registry)
        return _TEXT_TYPE, generate_latest(self._registry)

    def recent_look(self) -> tuple[JobCounts, WaitingSince]:
        """What the last look found; nothing where that is so long ago that it may be wrong."""
        if self._clock.seconds() - self._looked_at_s > _SHOWN_AGE_S:
            return {}, {}
        return self._collector.job_counts, self._collector.waiting_since

    async def look_at_queues(self) -> None:
        """One look for all who ask at once, and none waits for it long: Redis may be what is wrong."""
        if self._waiters is None and self._clock.seconds() - self._looked_at_s >= _LOOK_AGE_S:
            self._waiters = []
            ensureDeferred(self._look()).addErrback(self._cannot_look).addBoth(self._looked)
        if self._waiters is None:
            return
        waiter: Deferred[None] = Deferred()
        self._waiters.append(waiter)
        try:
            await waiter.addTimeout(_LOOK_DEADLINE_S, self._clock)
        except DeadlinePassed:
            self._collector.forget_queues()

    async def _look(self) -> None:
        collector = self._collector
        job_counts = await self._count_jobs()
        collector.waiting_since = await collector.parts.watch.waiting_since(collector.parts.pool)
        collector.job_counts = job_counts

    def _cannot_look(self, failure: Failure) -> None:
        """A defect of ours, of which the other metrics must not suffer."""
        self._collector.forget_queues()
        _log.failure("cannot look at the queues", failure)

    def _looked(self, _result: None) -> None:
        self._looked_at_s = self._clock.seconds()
        waiters, self._waiters = self._waiters or [], None
        for waiter in waiters:
            waiter.callback(None)


def _with_zeros(known: Iterable[_Label], counts: Mapping[_Label, int]) -> Iterable[tuple[_Label, int]]:
    """What was counted, and zero for what is known to come and has not yet."""
    return {**dict.fromkeys(known, 0), **counts}.items()


def _first_events(sources: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """For each source every outcome once, by the event that each installation sends.

    All events with all outcomes would be a hundred series a source, most of them zero for ever. Nobody is
    alerted by one event alone, so it is enough that the sum over events is there from the start.
    """
    for source in sources:
        yield from ((source, "message_created", outcome.value) for outcome in Outcome)
        yield source, "unknown", "failed"


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


def _histogram(
    name: str, help_text: str, labels: list[str], values: Mapping[Any, Sequence[Histogram]]
) -> HistogramMetricFamily:
    """Each value is the sum of several histograms with the same bounds."""
    family = HistogramMetricFamily(name, help_text, labels=labels)
    for label_values, histograms in values.items():
        sums = [sum(column) for column in zip(*(one.buckets for one in histograms), strict=True)]
        bounds = [floatToGoString(bound) for bound in (*histograms[0].bounds, math.inf)]
        buckets = list(zip(bounds, accumulate(sums), strict=True))
        family.add_metric(label_values, buckets, math.fsum(one.sum for one in histograms))
    return family

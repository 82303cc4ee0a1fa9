"""``twistd webhookd``: the options, and the one place where objects are built and put together."""

from __future__ import annotations

import os
import random
import socket
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeAlias

from attrs import frozen
from prometheus_client import CollectorRegistry, ProcessCollector
from twisted.application.service import IService
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import serverFromString
from twisted.internet.interfaces import IReactorTime, IStreamServerEndpoint
from twisted.logger import Logger, LogLevel
from twisted.python import usage

import webhookd
from webhookd import intake
from webhookd.chatwoot import payload as chatwoot
from webhookd.clock import wall_clock_ms
from webhookd.config import ALL_OPTIONS, DEFAULT_SOURCE, Config, resolve
from webhookd.daemon.logs import LogWindows, RepeatLimiter, make_observer
from webhookd.daemon.parts import Daemon, Listener, fatal
from webhookd.daemon.process import end_on_signals, raise_descriptor_limit
from webhookd.daemon.systemd import systemd_service
from webhookd.delivery import Drain, JobDelivery, resend
from webhookd.http import MAX_CONNECTIONS, InFlight, Shortcut, WebhookSite
from webhookd.intake.auth import Authenticator
from webhookd.model import ConfigError, ISpool, Job, Receipt
from webhookd.ops.health import Health, describe_breaker, describe_sources, describe_spool
from webhookd.ops.metrics import DaemonCollector, Exposition, Parts, ReactorLag
from webhookd.ops.status import Sampler, StatusEvents, StatusFeed, load_page
from webhookd.reactor import IReactor, run_on_monotonic_time, the_reactor
from webhookd.redis import embedded
from webhookd.redis.breaker import BreakerPolicy, CircuitBreaker, State
from webhookd.redis.embedded import EmbeddedValkey, find_server
from webhookd.redis.pool import RedisPool
from webhookd.redis.queue import QueueSettings, RedisQueue
from webhookd.redis.recent import RecentJobs
from webhookd.redis.url import RedisUrl
from webhookd.redis.watch import JobCounts, RedisWatch
from webhookd.spool.control import Control
from webhookd.spool.database import SpoolLimits
from webhookd.spool.directory import SpoolRoot
from webhookd.spool.queue import Spools, SpoolThread
from webhookd.spool.service import SpoolService
from webhookd.web import HealthApp, OpsApp, WebhookApp

if TYPE_CHECKING:
    from webhookd.ops.tracing import Tracing

Deliver: TypeAlias = Callable[[Job], Deferred[Receipt]]

_DRAIN_REDIS_DEADLINE_S = 4.0  # below the time after which the breaker takes a probe for lost
_OPS_CONNECTIONS = 100
_OTHER_DESCRIPTORS = 200  # the connections of the ops endpoint and to Redis, the spool's files, logs

_log = Logger()


_RepeatableOption: TypeAlias = Callable[["Options", str], None]


def _documented(method: _RepeatableOption) -> _RepeatableOption:
    """With the help of its option, which twistd reads from the docstring."""
    name = method.__name__.removeprefix("opt_")
    method.__doc__ = next(option.help for option in ALL_OPTIONS if option.name == name)
    return method


class Options(usage.Options):
    """twistd's view of `webhookd.config.ALL_OPTIONS`; ``config`` is the result."""

    synopsis = "[options]"
    longdesc = "Takes Chatwoot's webhooks and turns each event, once, into a BullMQ job in Redis."
    optParameters: ClassVar = [
        [option.flag, None, None, option.help] for option in ALL_OPTIONS if not option.repeatable
    ]
    config: Config

    def __init__(self) -> None:
        super().__init__()
        self._repeated: dict[str, list[str]] = {}

    @_documented
    def opt_secret(self, value: str) -> None:
        self._repeated.setdefault("secret", []).append(value)

    @_documented
    def opt_token(self, value: str) -> None:
        self._repeated.setdefault("token", []).append(value)

    def opt_version(self) -> None:
        """Show webhookd's version and exit."""
        sys.stdout.write(f"webhookd {webhookd.__version__}\n")
        sys.exit(0)

    def parseOptions(self, options: Sequence[str] | None = None) -> None:
        """Parse; whatever is wrong ends the process with one line, where twistd would print its help."""
        try:
            super().parseOptions(options)
            self.config = resolve(self._given(), os.environ)
        except (usage.UsageError, ConfigError) as error:
            raise fatal(error) from None

    def _given(self) -> Mapping[str, object]:
        given = {option.name: self.get(option.flag) for option in ALL_OPTIONS}
        return {name: value for name, value in {**given, **self._repeated}.items() if value is not None}

    @property
    def log_observer(self) -> RepeatLimiter | None:
        """Where the daemon logs to; None where twistd itself was told."""
        if self.parent is not None and self.parent.get("logfile"):
            return None
        return make_observer(self.config.log_format, self.config.log_level)


def makeService(options: Options) -> IService:
    """The daemon, built from its configuration."""
    reactor = the_reactor()  # the one place of the daemon that touches it
    run_on_monotonic_time(reactor)
    end_on_signals(reactor)
    try:
        return _build(options.config, reactor, options.log_observer)
    except ConfigError as error:
        raise fatal(error) from None


def max_connections(descriptors: int) -> int:
    """How many of them senders may take."""
    return min(MAX_CONNECTIONS, max(descriptors - _OTHER_DESCRIPTORS, descriptors // 2))


def _build(settings: Config, reactor: IReactor, log_observer: RepeatLimiter | None) -> Daemon:
    """The object graph, from the bottom up; the daemon's parts in the order of their start."""
    server = _embedded_server(settings, reactor)
    url = settings.redis if server is None else RedisUrl.parse(server.url)
    redis = make_redis(settings, reactor, url)
    spool = None if settings.spool is None else _spool_service(settings, settings.spool, reactor, redis)
    deliver, send_again = _delivery(redis, spool)
    # As patient as the drain: with less, it would give the connection up that a slow drain works on.
    watch = RedisWatch(
        settings.queues, _DRAIN_REDIS_DEADLINE_S, lambda: resend(redis.recent.take(), send_again)
    )
    redis.pool.on_ready(watch.connected)
    health = _health(settings, reactor, redis, spool, watch)
    health_resource = HealthApp(health.report, health.is_ready).app.resource()
    tracing = _tracing(settings, reactor)
    events = _intake(settings, deliver if tracing is None else tracing.delivering(deliver))
    webhooks = WebhookApp(
        accept=intake.log_deliveries(events.accept, reactor.seconds)
        if settings.log_level == "debug"
        else events.accept,
        default_source=DEFAULT_SOURCE,
        now_ms=wall_clock_ms,
        in_flight=InFlight(settings.max_in_flight, settings.max_in_flight_bytes),
        health=health_resource,
        trusted_proxies=settings.trusted_proxies,
    )
    receiver = _site(settings, reactor, webhooks, max_connections(raise_descriptor_limit()))
    if tracing is not None:
        receiver.shortcut = tracing.answering(receiver.shortcut)
    lag = ReactorLag(reactor)
    collector = DaemonCollector(
        Parts(
            version=webhookd.__version__,
            site=receiver,
            app=webhooks,
            intake=events,
            queues=(redis.live, redis.draining),
            pool=redis.pool,
            watch=watch,
            breaker=redis.breaker,
            spool=spool,
            spool_capacity_bytes=settings.spool_max_bytes,
            lag=lag,
            now_ms=wall_clock_ms,
        )
    )
    exposition = _exposition(reactor, collector, partial(watch.count_jobs, redis.pool))

    daemon = Daemon(log_observer, health.drain)
    if log_observer is not None:
        LogWindows(reactor, log_observer).setServiceParent(daemon)
    lag.setServiceParent(daemon)
    if settings.ops_endpoint is not None:
        sampler = Sampler(reactor, collector.parts, health, exposition, _replica(settings))
        feed = StatusFeed(reactor, sampler, exposition.look_at_queues)
        ops = OpsApp(health_resource, exposition.expose, load_page(), StatusEvents(feed))
        endpoint = _endpoint(reactor, settings.ops_endpoint)
        ops_site = _site(settings, reactor, ops, _OPS_CONNECTIONS)
        Listener(reactor, endpoint, ops_site, "ops", required=False).setServiceParent(daemon)
        feed.setServiceParent(daemon)  # after the port, to end before it: the port waits for its connections
    for part in (tracing, server, redis.pool, spool):
        if part is not None:
            part.setServiceParent(daemon)
    endpoint = _endpoint(reactor, settings.endpoint)
    Listener(reactor, endpoint, receiver, "webhooks", required=True).setServiceParent(daemon)
    supervision = systemd_service(os.environ, reactor, lambda: health.status.value)
    if supervision is not None:
        supervision.setServiceParent(daemon)
    _say_hello(settings)
    return daemon


@frozen
class Redis:
    """What has to do with one Redis: ``live`` is for events that wait, ``draining`` for those on disk."""

    pool: RedisPool
    breaker: CircuitBreaker
    recent: RecentJobs
    live: RedisQueue
    draining: RedisQueue
    clock: IReactorTime

    def retry_in_s(self) -> float | None:
        """Seconds until Redis is worth asking; None if that is not known."""
        return self.breaker.retry_in_s(self.clock.seconds())

    def may_call(self) -> bool:
        """Whether Redis is worth asking now."""
        is_open = self.breaker.state is not State.CLOSED and self.retry_in_s() != 0.0
        return self.pool.writer is not None and not is_open

    def why_not(self) -> str | None:
        """Why Redis is not asked now; None if it is."""
        if self.may_call():
            return None
        reason = "it is not connected" if self.pool.last_error is None else str(self.pool.last_error)
        if self.breaker.state is not State.CLOSED:
            reason += (
                f"; the breaker is {self.breaker.state.value}, next try in {self.retry_in_s() or 0:.1f} s"
            )
        return f"Redis at {self.pool.url}: {reason}"


def _embedded_server(settings: Config, reactor: IReactor) -> EmbeddedValkey | None:
    if not settings.redis.embedded:
        return None
    return EmbeddedValkey(reactor, find_server(), embedded.DIRECTORY, settings.redis.embedded_port)


def make_redis(settings: Config, reactor: IReactor, url: RedisUrl) -> Redis:
    """The way to a Redis, not yet connected."""
    pool = RedisPool(reactor, url)
    breaker = CircuitBreaker(BreakerPolicy(slow_call_s=settings.redis_deadline_s / 2), random.random)
    breaker.listen(log_breaker)
    recent = RecentJobs(reactor)

    def queue(deadline_s: float) -> RedisQueue:
        return RedisQueue(
            reactor, pool, breaker, _queue_settings(settings), deadline_s=deadline_s, acknowledged=recent.add
        )

    live, draining = queue(settings.redis_deadline_s), queue(_DRAIN_REDIS_DEADLINE_S)
    return Redis(pool, breaker, recent, live, draining, reactor)


def log_breaker(old: State, new: State, _at_s: float) -> None:
    """A breaker's change, as a line; it listens to the breaker."""
    level = LogLevel.warn if new is State.OPEN else LogLevel.info
    _log.emit(level, "the circuit breaker is {state}, and was {before}", state=new.value, before=old.value)


def _delivery(redis: Redis, spool: SpoolService | None) -> tuple[Deliver, Deliver]:
    """How an event is taken, and how one is sent again that Redis may have lost."""
    if spool is None:
        return redis.live.add, redis.live.add
    drain = spool.drain
    redis.pool.on_ready(lambda _connection: drain.wake())
    delivery = JobDelivery(
        redis.live, spool, may_call=redis.may_call, spooled=drain.wake, handover=drain.handover.wait
    )
    return delivery.deliver, delivery.deliver_through_spool


def _health(
    settings: Config, reactor: IReactor, redis: Redis, spool: SpoolService | None, watch: RedisWatch
) -> Health:
    return Health(
        clock=reactor,
        version=webhookd.__version__,
        started_s=reactor.seconds(),
        can_queue=redis.may_call,
        can_spool=lambda: None if spool is None else spool.stats.problem is None,
        checks={
            "redis": partial(watch.describe, redis.pool),
            "breaker": partial(describe_breaker, redis.breaker),
            "spool": partial(describe_spool, spool, wall_clock_ms),
            "queues": partial(watch.count_jobs, redis.pool),
            "sources": partial(describe_sources, settings.sources),
        },
    )


def _site(settings: Config, reactor: IReactor, app: WebhookApp | OpsApp, connections: int) -> WebhookSite:
    return WebhookSite(
        app.app.resource(),
        reactor,
        max_body_bytes=settings.max_body_bytes,
        max_connections=connections,
        max_arriving_bytes=settings.max_in_flight_bytes,
        access_log=settings.access_log,
        shortcut=Shortcut(app.app, app.failed),
    )


def _tracing(settings: Config, reactor: IReactor) -> Tracing | None:
    if settings.tracing == "off":
        return None
    try:
        from webhookd.ops.tracing import Tracing, otlp_provider  # with the SDK, which takes a while
    except ImportError as error:
        raise ConfigError(
            f"tracing: {error.name} is missing; pip install 'webhookd[otel]' brings it"
        ) from None
    provider = otlp_provider(webhookd.__version__, _replica(settings))
    return Tracing(reactor, provider, webhookd.__version__)


def _replica(settings: Config) -> str:
    return f"{socket.gethostname()}:{settings.port}"


def _exposition(
    clock: IReactorTime, collector: DaemonCollector, count_jobs: Callable[[], Awaitable[JobCounts]]
) -> Exposition:
    registry = CollectorRegistry()
    registry.register(collector)
    ProcessCollector(registry=registry)
    return Exposition(clock, registry, collector, count_jobs)


def _queue_settings(settings: Config) -> QueueSettings:
    replica = _replica(settings)
    return QueueSettings(
        prefix=settings.prefix,
        wire=settings.wire,
        lock_ttl_ms=max(settings.lock_ttl_ms, settings.dedup_ttl_ms),
        set_by=lambda: f"{wall_clock_ms()} {replica}",
        replicas=settings.ack,
    )


def _spool_service(settings: Config, directory: str, reactor: IReactor, redis: Redis) -> SpoolService:
    # twistd may change its directory before the service starts.
    root = SpoolRoot(Path(directory).absolute(), settings.destination)
    with suppress(OSError):  # the service will say so, and try again
        root.prepare()
    thread = SpoolThread(reactor)
    limits = SpoolLimits(max_bytes=settings.spool_max_bytes)
    spools = Spools(root, thread, wall_clock_ms, limits)
    replayed: Counter[str] = Counter()

    def make_drain(spool: ISpool) -> Drain:
        return Drain(reactor, spool, redis.draining, redis.retry_in_s, replayed)

    control = Control(reactor, thread, redis.why_not)
    return SpoolService(reactor, thread, spools, make_drain, settings.drain_timeout_s, control.open)


def _intake(settings: Config, deliver: Deliver) -> intake.Intake:
    sources = {
        name: intake.SourcePolicy(
            authenticator=Authenticator(
                source.secrets,
                source.tokens,
                settings.tolerance_s,
                source.networks,
                settings.trusted_proxies,
            ),
            events=source.events,
            queue=source.queue,
            options=source.job_options,
        )
        for name, source in settings.sources.items()
    }
    return intake.Intake(
        sources=sources,
        encode=intake.ENCODERS[settings.job_data],
        fallback=chatwoot.FALLBACKS[settings.id_fallback],
        deliver=deliver,
    )


def _endpoint(reactor: IReactor, description: str) -> IStreamServerEndpoint:
    try:
        endpoint: IStreamServerEndpoint = serverFromString(reactor, description)
    except Exception as error:  # noqa: BLE001  # each kind of endpoint has its own way to complain
        raise ConfigError(f"endpoint {description!r}: {error}") from None
    return endpoint


def _say_hello(settings: Config) -> None:
    _log.info("webhookd {version}, Redis {url}", version=webhookd.__version__, url=settings.redis)
    if settings.id_fallback == "hash":
        _log.info(
            "updates without a delivery id: their job id ends with a hash of the body, and one that repeats "
            "an earlier body is taken for its duplicate"
        )
    else:
        _log.info("updates without a delivery id: a repeated one becomes two jobs")
    for warning in settings.warnings:
        _log.warn("{problem}", problem=warning)

"""``twistd webhookd``: its options, and the one place that builds the objects and connects them."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeAlias

from twisted.application.service import IService, Service
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import serverFromString
from twisted.internet.interfaces import IStreamServerEndpoint
from twisted.logger import Logger
from twisted.python import usage
from twisted.web.resource import IResource

import webhookd
from webhookd import intake
from webhookd.chatwoot import payload as chatwoot
from webhookd.clock import wall_clock_ms
from webhookd.config import ALL_OPTIONS, DEFAULT_SOURCE, Config, resolve
from webhookd.daemon.logs import LogWindows, RepeatLimiter, make_observer
from webhookd.daemon.parts import Daemon, Listener, fatal
from webhookd.daemon.process import end_on_signals, max_connections, raise_descriptor_limit
from webhookd.daemon.systemd import systemd_service
from webhookd.delivery import Drain, JobDelivery, resend
from webhookd.http import InFlight, Shortcut, WebhookSite
from webhookd.intake.auth import Authenticator
from webhookd.model import ConfigError, ISpool, Job, Receipt
from webhookd.ops.health import Health, describe_sources, describe_spool
from webhookd.ops.metrics import Components, Exposition, ReactorLag
from webhookd.ops.status import Sampler, StatusEvents, StatusFeed, load_page
from webhookd.reactor import IReactor, run_on_monotonic_time, the_reactor
from webhookd.redis import embedded
from webhookd.redis.client import Redis, connect
from webhookd.redis.embedded import EmbeddedValkey, find_server
from webhookd.redis.url import RedisUrl
from webhookd.redis.watch import QueueWatch, RedisWatch
from webhookd.spool.control import Control
from webhookd.spool.database import SpoolLimits
from webhookd.spool.directory import SpoolRoot
from webhookd.spool.queue import Spools, SpoolThread
from webhookd.spool.service import SpoolService
from webhookd.web import HealthApp, OpsApp, WebhookApp

if TYPE_CHECKING:
    from webhookd.ops.tracing import Tracing

Deliver: TypeAlias = Callable[[Job], Deferred[Receipt]]

_OPS_CONNECTIONS = 100

_log = Logger()


def _documented(method: Callable[[Options, str], None]) -> Callable[[Options, str], None]:
    """Give the method the help of its option as its docstring, where twistd looks for it."""
    name = method.__name__.removeprefix("opt_")
    method.__doc__ = next(option.full_help for option in ALL_OPTIONS if option.name == name)
    return method


class Options(usage.Options):
    """The options of `webhookd.config` as twistd reads them; ``config`` is the result."""

    synopsis = "[options]"
    longdesc = "Receives Chatwoot's webhooks and turns each event, once, into a BullMQ job in Redis."
    optParameters: ClassVar = [
        [option.flag, None, None, option.full_help] for option in ALL_OPTIONS if not option.repeatable
    ]
    config: Config

    @_documented
    def opt_secret(self, value: str) -> None:
        self.setdefault("secret", []).append(value)

    @_documented
    def opt_token(self, value: str) -> None:
        self.setdefault("token", []).append(value)

    def opt_version(self) -> None:
        """Show webhookd's version and exit."""
        sys.stdout.write(f"webhookd {webhookd.__version__}\n")
        sys.exit(0)

    def parseOptions(self, options: Sequence[str] | None = None) -> None:
        """Parse; an error ends the process with one line, instead of twistd's help."""
        try:
            super().parseOptions(options)
            self.config = resolve(self._given(), os.environ)
        except (usage.UsageError, ConfigError) as error:
            raise fatal(error) from None

    def _given(self) -> Mapping[str, object]:
        given = {option.name: self.get(option.flag) for option in ALL_OPTIONS}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def log_observer(self) -> RepeatLimiter | None:
        """The observer that writes the log; None if twistd was started with ``--logfile``."""
        if self.parent is not None and self.parent.get("logfile"):
            return None
        return make_observer(self.config.log_format, self.config.log_level)


def makeService(options: Options) -> IService:
    """Build the daemon from its configuration."""
    reactor = the_reactor()  # no other code of the daemon uses the global reactor
    run_on_monotonic_time(reactor)
    end_on_signals(reactor)
    try:
        return _build(options.config, reactor, options.log_observer)
    except ConfigError as error:
        raise fatal(error) from None


def _build(settings: Config, reactor: IReactor, log_observer: RepeatLimiter | None) -> Daemon:
    """Build the object graph from the bottom up, and the daemon of its parts in the order of their start."""
    server = _embedded_server(settings, reactor)
    url = settings.redis if server is None else RedisUrl.parse(server.url)
    redis = connect(reactor, url, settings.queue_settings, settings.redis_deadline_s)
    spool = None if settings.spool is None else _spool_service(settings, settings.spool, reactor, redis)
    deliver, send_again = _delivery(redis, spool)
    redis_watch = RedisWatch(redis.pool, settings.queues, lambda: resend(redis.recent.take(), send_again))
    redis.pool.on_ready(redis_watch.connected)
    queue_watch = QueueWatch(reactor, redis.pool, settings.queues)
    health = Health(
        clock=reactor,
        can_queue=redis.may_call,
        can_spool=lambda: None if spool is None else spool.stats.problem is None,
        sections={
            "redis": redis_watch.describe,
            "breaker": lambda: {"state": redis.breaker.state.value},
            "spool": partial(describe_spool, spool, wall_clock_ms),
            "sources": partial(describe_sources, settings.sources),
        },
        queue_watch=queue_watch,
    )
    health_resource = HealthApp(health.report, health.is_ready).app.resource()
    tracing = _tracing(settings, reactor)
    events = _intake(settings, deliver if tracing is None else tracing.trace_jobs(deliver))
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
        receiver.shortcut = tracing.trace_requests(receiver.shortcut)
    components = Components(
        site=receiver,
        app=webhooks,
        intake=events,
        redis_queues=(redis.live, redis.draining),
        pool=redis.pool,
        breaker=redis.breaker,
        redis_watch=redis_watch,
        queue_watch=queue_watch,
        spool=spool,
        spool_capacity_bytes=settings.spool_max_bytes,
        lag=ReactorLag(reactor),
        now_ms=wall_clock_ms,
    )
    daemon = Daemon(log_observer, health.drain)
    if server is not None:
        redis.pool.setServiceParent(server)
        redis.pool.on_ready(server.connected)
    listener = Listener(
        reactor,
        _endpoint(reactor, settings.endpoint),
        receiver,
        "webhooks",
        required=True,
        accept_after=None if server is None else server.answered,
    )
    for part in (
        None if log_observer is None else LogWindows(reactor, log_observer),
        components.lag,
        *_ops(settings, reactor, components, health, health_resource),
        tracing,
        server or redis.pool,
        spool,
        listener,
        systemd_service(os.environ, reactor, lambda: health.status.value),
    ):
        if part is not None:
            part.setServiceParent(daemon)
    _say_hello(settings)
    return daemon


def _ops(
    settings: Config, reactor: IReactor, components: Components, health: Health, health_resource: IResource
) -> Sequence[Service]:
    """Return the ops port and the feed. The feed stops first, because the port waits for open streams."""
    if settings.ops_endpoint is None:
        return ()
    sampler = Sampler(reactor, components, health, settings.replica)
    feed = StatusFeed(reactor, sampler, components.queue_watch)
    app = OpsApp(health_resource, Exposition(components).expose, load_page(), StatusEvents(feed))
    site = _site(settings, reactor, app, _OPS_CONNECTIONS)
    endpoint = _endpoint(reactor, settings.ops_endpoint)
    return Listener(reactor, endpoint, site, "ops", required=False), feed


def _embedded_server(settings: Config, reactor: IReactor) -> EmbeddedValkey | None:
    if not settings.redis.embedded:
        return None
    return EmbeddedValkey(reactor, find_server(), embedded.DIRECTORY, settings.redis.embedded_port)


def _delivery(redis: Redis, spool: SpoolService | None) -> tuple[Deliver, Deliver]:
    """Return two functions: one delivers an event, the other sends one again that Redis may have lost."""
    if spool is None:
        return redis.live.add, redis.live.add
    drain = spool.drain
    redis.pool.on_ready(lambda _connection: drain.wake())
    delivery = JobDelivery(
        redis.live, spool, may_call=redis.may_call, spooled=drain.wake, handover=drain.handover.wait
    )
    return delivery.deliver, delivery.deliver_through_spool


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
        from webhookd.ops.tracing import Tracing, otlp_provider  # imports the SDK, which is slow
    except ImportError as error:
        raise ConfigError(f"tracing: {error.name} is missing; run pip install 'webhookd[otel]'") from None
    return Tracing(reactor, otlp_provider(settings.replica))


def _spool_service(settings: Config, directory: str, reactor: IReactor, redis: Redis) -> SpoolService:
    # twistd may change its directory before the service starts.
    root = SpoolRoot(Path(directory).absolute(), settings.destination)
    with suppress(OSError):  # the service logs it and tries again
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
                source.secrets, source.tokens, settings.tolerance_s, source.networks, settings.trusted_proxies
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
    except Exception as error:  # noqa: BLE001  # each kind of endpoint raises its own
        raise ConfigError(f"endpoint {description!r}: {error}") from None
    return endpoint


def _say_hello(settings: Config) -> None:
    _log.info("webhookd {version}, Redis {url}", version=webhookd.__version__, url=settings.redis)
    if settings.id_fallback == "hash":
        _log.info(
            "updates without a delivery id: the job id ends with a hash of the body, so an update with the "
            "body of an earlier one counts as its duplicate"
        )
    else:
        _log.info("updates without a delivery id: a repeated update becomes two jobs")
    for warning in settings.warnings:
        _log.warn("{problem}", problem=warning)

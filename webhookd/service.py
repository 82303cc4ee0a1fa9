"""`twistd webhookd`: the options, and the one place where objects are built and put together."""

from __future__ import annotations

import os
import random
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from twisted.application.service import IService, MultiService, Service
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import Deferred, ensureDeferred, maybeDeferred
from twisted.internet.endpoints import serverFromString
from twisted.internet.interfaces import IListeningPort, IReactorTime, IReadDescriptor, IStreamServerEndpoint
from twisted.logger import ILogObserver, Logger
from twisted.python import usage
from twisted.python.failure import Failure

import webhookd
from webhookd import chatwoot, intake
from webhookd.auth import Authenticator
from webhookd.breaker import BreakerPolicy, CircuitBreaker
from webhookd.bullmq import QueueKeys
from webhookd.config import ALL_OPTIONS, DEFAULT_SOURCE, Config, resolve
from webhookd.delivery import Drain, JobDelivery, resend
from webhookd.embedded import EmbeddedValkey, find_server
from webhookd.health import Health, describe_breaker, describe_spool
from webhookd.http import MAX_CONNECTIONS, WebhookSite
from webhookd.logs import make_observer
from webhookd.model import ConfigError, ISpool, Job, Receipt
from webhookd.recent import RecentJobs
from webhookd.redis_pool import RedisPool
from webhookd.redis_queue import QueueSettings, RedisQueue
from webhookd.redis_url import RedisUrl
from webhookd.redis_watch import RedisWatch
from webhookd.spool import Spools, SpoolThread
from webhookd.spool_database import SpoolLimits
from webhookd.spool_directory import SpoolRoot
from webhookd.spool_service import SpoolService
from webhookd.web import HealthApp, InFlight, OpsApp, Shortcut, WebhookApp

_FINISH_DEADLINE_S = 10.0
_DRAIN_REDIS_DEADLINE_S = 4.0  # below the time after which the breaker takes a probe for lost
_EMBEDDED_DIRECTORY = Path("var/embedded")
_OPS_CONNECTIONS = 100
_OTHER_DESCRIPTORS = 200  # the connections of the ops endpoint and to Redis, the spool's files, logs

_log = Logger()


def _exit(message: object) -> SystemExit:
    """The end of a start that cannot succeed: one line for the operator, and exit code 1."""
    return SystemExit(f"webhookd: {message}")


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

    def opt_secret(self, value: str) -> None:
        self._repeated.setdefault("secret", []).append(value)

    def opt_token(self, value: str) -> None:
        self._repeated.setdefault("token", []).append(value)

    opt_secret.__doc__, opt_token.__doc__ = (option.help for option in ALL_OPTIONS if option.repeatable)

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
            raise _exit(error) from None

    def _given(self) -> Mapping[str, object]:
        given = {option.name: self.get(option.flag) for option in ALL_OPTIONS}
        return {name: value for name, value in {**given, **self._repeated}.items() if value is not None}

    @property
    def log_observer(self) -> ILogObserver | None:
        """Where the daemon logs to; None where twistd itself was told."""
        if self.parent is not None and self.parent.get("logfile"):
            return None
        return make_observer(self.config.log_format, self.config.log_level)


def makeService(options: Options) -> IService:
    """The daemon, built from its configuration."""
    from twisted.internet import reactor  # the one place that touches it

    run_on_monotonic_time(reactor)
    end_on_signals(reactor)
    try:
        return _build(options.config, reactor, options.log_observer)
    except ConfigError as error:
        raise _exit(error) from None


def run_on_monotonic_time(reactor: Any) -> None:
    """Keep every timer of the process from jumping with the wall clock.

    Twisted's reactors measure delays with ``time.time``: set back by an hour, a deadline of half a second
    would hold for an hour. Each of their timers asks ``reactor.seconds``.
    """
    reactor.seconds = time.monotonic


def end_on_signals(reactor: Any) -> None:
    """End with exit code 0 on SIGTERM and SIGINT, and only once however often they come.

    twistd would end with the signal again, which supervisors take for a failure.
    """
    stopping = False

    def stop(_signal: int, _frame: object) -> None:
        nonlocal stopping
        if not stopping:
            stopping = True
            reactor.callFromThread(reactor.stop)

    def install() -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)

    reactor.callWhenRunning(install)


def raise_descriptor_limit() -> int:
    """Have as many descriptors as the system allows this process; returns how many.

    Many systems start a program with 1,024 and let it raise that.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # a limit above the kernel's own is not granted
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def max_connections(descriptors: int) -> int:
    """How many of them senders may take."""
    return min(MAX_CONNECTIONS, max(descriptors - _OTHER_DESCRIPTORS, descriptors // 2))


def _wall_clock_ms() -> int:
    return time.time_ns() // 1_000_000


def _build(settings: Config, reactor: Any, log_observer: ILogObserver | None) -> Daemon:
    """The object graph, from the bottom up; the daemon's parts in the order of their start."""
    url = settings.redis
    server = None
    if url.embedded:
        server = EmbeddedValkey(reactor, find_server(), _EMBEDDED_DIRECTORY, url.embedded_port)
        url = RedisUrl.parse(server.url)
    pool = RedisPool(reactor, url)
    breaker = CircuitBreaker(BreakerPolicy(slow_call_s=settings.redis_deadline_s / 2), random.random)
    recent = RecentJobs(reactor)

    def queue(deadline_s: float) -> RedisQueue:
        return RedisQueue(
            reactor, pool, breaker, _queue_settings(settings), deadline_s=deadline_s, acknowledged=recent.add
        )

    def may_call() -> bool:
        return pool.writer is not None and breaker.retry_in_s(reactor.seconds()) == 0.0

    live = queue(settings.redis_deadline_s)
    spool = None
    deliver = send_again = live.add
    if settings.spool is not None:
        make_drain = partial(
            Drain,
            reactor,
            sink=queue(_DRAIN_REDIS_DEADLINE_S),
            pause_s=lambda: breaker.retry_in_s(reactor.seconds()),
        )
        spool = _spool_service(settings, settings.spool, url, reactor, make_drain)
        delivery = JobDelivery(live, spool, may_call=may_call, spooled=spool.drain.wake)
        deliver, send_again = delivery.deliver, delivery.deliver_through_spool
        pool.on_ready(lambda _connection: spool.drain.wake())

    queues = _queue_keys(settings)
    watch = RedisWatch(queues, settings.redis_deadline_s, lambda: resend(recent.take(), send_again))
    pool.on_ready(watch.connected)
    health = Health(
        clock=reactor,
        version=webhookd.__version__,
        started_s=reactor.seconds(),
        can_queue=may_call,
        can_spool=lambda: None if spool is None else spool.stats.problem is None,
        checks={
            "redis": partial(watch.describe, pool),
            "breaker": partial(describe_breaker, breaker),
            "spool": partial(describe_spool, spool, _wall_clock_ms),
            "queues": partial(watch.count_jobs, pool),
        },
    )
    health_resource = HealthApp(health.report, health.is_ready).app.resource()
    webhooks = WebhookApp(
        accept=_intake(settings, deliver).accept,
        default_source=DEFAULT_SOURCE,
        now_ms=_wall_clock_ms,
        in_flight=InFlight(settings.max_in_flight, settings.max_in_flight_bytes),
        health=health_resource,
    )

    def listener(
        description: str, app: WebhookApp | OpsApp, purpose: str, connections: int, *, required: bool
    ) -> Listener:
        site = WebhookSite(
            app.app.resource(),
            reactor,
            max_body_bytes=settings.max_body_bytes,
            max_connections=connections,
            max_arriving_bytes=settings.max_in_flight_bytes,
            access_log=settings.access_log,
            shortcut=Shortcut(app.app, app.failed),
        )
        return Listener(reactor, _endpoint(reactor, description), site, purpose, required=required)

    daemon = Daemon(log_observer, health.drain)
    if settings.ops_endpoint is not None:
        ops = OpsApp(health_resource)
        listener(settings.ops_endpoint, ops, "ops", _OPS_CONNECTIONS, required=False).setServiceParent(daemon)
    for part in (server, pool, spool):
        if part is not None:
            part.setServiceParent(daemon)
    connections = max_connections(raise_descriptor_limit())
    listener(settings.endpoint, webhooks, "webhooks", connections, required=True).setServiceParent(daemon)
    _say_hello(settings)
    return daemon


def _queue_keys(settings: Config) -> list[QueueKeys]:
    names = {source.queue for source in settings.sources.values()}
    return [QueueKeys(settings.prefix, name) for name in sorted(names)]


def _queue_settings(settings: Config) -> QueueSettings:
    return QueueSettings(
        prefix=settings.prefix,
        wire=settings.wire,
        lock_ttl_ms=max(settings.lock_ttl_ms, settings.dedup_ttl_ms),
        set_by=f"{socket.gethostname()}:{settings.port}",
        replicas=settings.ack,
    )


def _spool_service(
    settings: Config, directory: str, url: RedisUrl, reactor: Any, make_drain: Callable[[ISpool], Drain]
) -> SpoolService:
    queues = " ".join(keys.queue for keys in _queue_keys(settings))
    # twistd may change its directory before the service starts.
    root = SpoolRoot(Path(directory).absolute(), f"{_identity(settings, url)} {settings.prefix} {queues}")
    with suppress(OSError):  # the service will say so, and try again
        root.prepare()
    thread = SpoolThread(reactor)
    limits = SpoolLimits(max_bytes=settings.spool_max_bytes)
    spools = Spools(root, thread, _wall_clock_ms, limits)
    return SpoolService(reactor, thread, spools, make_drain, settings.drain_timeout_s)


def _identity(settings: Config, url: RedisUrl) -> str:
    """What tells one Redis from another; an embedded one keeps its data when its port changes."""
    return str(settings.redis if settings.redis.embedded else url)


def _intake(settings: Config, deliver: Callable[[Job], Deferred[Receipt]]) -> intake.Intake:
    sources = {
        name: intake.Source(
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


def _endpoint(reactor: Any, description: str) -> IStreamServerEndpoint:
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


class Daemon(MultiService):
    """The daemon's parts, stopped one after another in the reverse order of their start.

    What takes events ends first, then what they need: nothing is closed that an accepted event waits for.
    """

    def __init__(self, log_observer: ILogObserver | None, on_stop: Callable[[], None]) -> None:
        super().__init__()
        self._log_observer = log_observer
        self._on_stop = on_stop

    def setServiceParent(self, parent: Any) -> None:
        """Become part of twistd's application, and bring its log observer, which twistd looks for there."""
        if self._log_observer is not None:
            parent.setComponent(ILogObserver, self._log_observer)
        super().setServiceParent(parent)

    def startService(self) -> None:
        """Start the parts; what cannot be had ends the process with one line."""
        try:
            super().startService()
        except ConfigError as error:
            raise _exit(error) from None

    def stopService(self) -> Deferred[None]:
        """Fires when all parts have stopped; a part that fails to stop does not keep the others from it."""
        Service.stopService(self)
        return ensureDeferred(self._stop_parts())

    async def _stop_parts(self) -> None:
        self._on_stop()
        for part in reversed(list(self)):
            try:
                await maybeDeferred(part.stopService)
            except Exception:  # noqa: BLE001  # the other parts must still stop
                _log.failure("cannot stop {part}", part=type(part).__name__)


class Listener(Service):
    """One listening port. A ``required`` one that cannot be had ends the start; another only warns."""

    _port: IListeningPort | None = None

    def __init__(
        self,
        clock: IReactorTime,
        endpoint: IStreamServerEndpoint,
        site: WebhookSite,
        purpose: str,
        *,
        required: bool,
    ) -> None:
        self._clock = clock
        self._endpoint = endpoint
        self._site = site
        self._purpose = purpose
        self._required = required

    def privilegedStartService(self) -> None:
        """Listen, before twistd gives up its privileges."""
        failures: list[Failure] = []
        self._endpoint.listen(self._site).addCallbacks(self._listening, failures.append)
        for failure in failures:  # outside of the Deferred, which would keep the exit to itself
            self._failed(failure)

    def _listening(self, port: IListeningPort) -> None:
        self._port = port
        _log.info("webhookd listening for {purpose} on {where}", purpose=self._purpose, where=_where(port))

    def _failed(self, failure: Failure) -> None:
        message = f"cannot listen for {self._purpose}: {failure.getErrorMessage()}"
        if self._required:
            raise _exit(message)
        _log.warn("{problem}", problem=message)

    def stopService(self) -> Deferred[None]:
        """Take no more connections, and close those that there are once they are answered."""
        super().stopService()
        return ensureDeferred(self._stop())

    async def _stop(self) -> None:
        if self._port is None:
            return
        # Twisted closes the port in the reactor's next turn, where this comes just before it.
        self._clock.callLater(0, self._accept_waiting, self._port)
        await maybeDeferred(self._port.stopListening)
        await self._site.drain(_FINISH_DEADLINE_S)

    def _accept_waiting(self, port: IListeningPort) -> None:
        """Clients that are connected but not accepted yet would be reset by the end of the port."""
        known = -1
        while IReadDescriptor.providedBy(port) and known < len(self._site.channels):
            known = len(self._site.channels)
            port.doRead()


def _where(port: IListeningPort) -> str:
    address = port.getHost()
    if isinstance(address, (IPv4Address, IPv6Address)):
        host = f"[{address.host}]" if ":" in address.host else address.host
        return f"{host}:{address.port}"
    return str(getattr(address, "name", address))

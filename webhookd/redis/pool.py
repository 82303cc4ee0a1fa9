"""The connections to Redis: a txredisapi pool that reconnects by itself, and logs why it cannot.

txredisapi's ``getConnection()`` waits forever while Redis is away, and each abandoned wait stays in a list.
So no request waits here: `RedisPool.writer` is a connection that is ready, or None.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import txredisapi
from twisted.application.service import Service
from twisted.internet.defer import CancelledError, Deferred, ensureDeferred, succeed
from twisted.internet.defer import TimeoutError as DeadlinePassed
from twisted.internet.endpoints import HostnameEndpoint, UNIXClientEndpoint, wrapClientTLS
from twisted.internet.error import ConnectingCancelledError
from twisted.internet.interfaces import IProtocol, IProtocolFactory, IStreamClientEndpoint
from twisted.internet.protocol import Factory
from twisted.internet.ssl import Certificate, optionsForClientTLS, trustRootFromCertificates
from twisted.logger import Logger
from zope.interface import implementer

from webhookd.model import ConfigError, QueueUnavailable, RedisErrorKind
from webhookd.reactor import IReactor
from webhookd.redis.connection import ASK_AGAIN, CONNECT_DEADLINE_S, ConnectionFactory, RedisConnection
from webhookd.redis.url import HostPort, RedisUrl

_SENTINEL_DEADLINE_S = 0.5

_CANCELLED = (CancelledError, ConnectingCancelledError)  # endpoints raise the second

_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)

_sentinel_factory = Factory.forProtocol(partial(txredisapi.RedisProtocol, charset=None, convertNumbers=False))
_sentinel_factory.noisy = False

_log = Logger()


class RedisPool(Service):
    """The connections of one daemon to one Redis, from start to stop.

    ``last_error`` is the last failure; None once a call has succeeded after it. ``errors`` counts all
    failures by kind.
    """

    def __init__(self, reactor: IReactor, url: RedisUrl, log: Logger = _log) -> None:
        self.url = url
        self.last_error: QueueUnavailable | None = None
        self.errors: Counter[RedisErrorKind] = Counter()
        self._is_announced = False  # that Redis is connected, since the last failure of another kind
        self._log = log
        self._listeners: list[Callable[[RedisConnection], None]] = []
        self._waiting: list[Deferred[RedisConnection]] = []
        self._factory = ConnectionFactory(url, reactor, self.failed, self._ready)
        self._endpoint = RedisEndpoint(reactor, url, self.failed)

    @property
    def writer(self) -> RedisConnection | None:
        """The connection for adding jobs: always the same one, as long as it lives."""
        pool: list[RedisConnection] = self._factory.pool
        if pool and not pool[0].given_up:
            return pool[0]
        return next((one for one in pool if not one.given_up), None)

    @property
    def prober(self) -> RedisConnection | None:
        """The connection for all else, never the writer: a command that is late costs its connection."""
        writer = self.writer
        others = (one for one in self._factory.pool if not one.given_up and one is not writer)
        return next(others, None)

    def on_ready(self, listener: Callable[[RedisConnection], None]) -> None:
        """Call ``listener`` with each new connection."""
        self._listeners.append(listener)

    def when_ready(self) -> Deferred[RedisConnection]:
        """Fire with the writer once there is one; fail with `QueueUnavailable` if connecting fails first."""
        if self.writer is not None:
            return succeed(self.writer)
        waiting: Deferred[RedisConnection] = Deferred()
        self._waiting.append(waiting)
        return waiting

    def startService(self) -> None:
        """Connect, and reconnect as long as the service runs."""
        super().startService()
        self._factory.startConnecting(self._endpoint)

    def stopService(self) -> Deferred[None]:
        """Close the connections; fire when they are closed."""
        super().stopService()
        disconnected: Deferred[None] = self._factory.disconnect()
        return disconnected

    def _ready(self, connection: RedisConnection) -> None:
        if len(self._factory.pool) == 1 and not self._is_announced:
            self._is_announced = True
            self._log.info("connected to Redis at {url}", url=self.url)
        for listener in self._listeners:
            listener(connection)
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            one.callback(connection)

    def worked(self) -> None:
        """Note that a call has succeeded."""
        self._factory.refusals = 0
        if self.last_error is not None:
            self._log.info("Redis at {url} takes jobs again", url=self.url)
            self.last_error = None

    def failed(self, reason: QueueUnavailable) -> None:
        """Note that a call, or an attempt to connect, has failed; log it if the last failure was another."""
        self.errors[reason.kind] += 1
        self._factory.refusals += reason.kind in ASK_AGAIN
        if self.last_error is None or self.last_error.kind is not reason.kind:
            self._is_announced = False
            self._log.warn(
                "Redis at {url} cannot be used: {kind}: {reason}",
                url=self.url,
                kind=reason.kind.value,
                reason=reason,
            )
        self.last_error = reason
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            one.errback(reason)


@implementer(IStreamClientEndpoint)
class RedisEndpoint:
    """The server to connect to. Each connection looks it up again: host name, certificate and Sentinel."""

    def __init__(self, reactor: IReactor, url: RedisUrl, report: Callable[[QueueUnavailable], None]) -> None:
        self._reactor = reactor
        self._url = url
        self._report = report
        self._trust_root = _trust_root(url.ca_file) if url.ca_file is not None else None

    def __repr__(self) -> str:
        return f"<{self._url}>"  # for Twisted's log; the URL shows no password

    def connect(self, protocolFactory: IProtocolFactory) -> Deferred[IProtocol]:
        """Connect once; the pool repeats this."""
        return ensureDeferred(self._connect(protocolFactory))

    async def _connect(self, factory: IProtocolFactory) -> IProtocol:
        try:
            endpoint = await self._find()
            return await endpoint.connect(factory)
        except _CANCELLED:
            raise
        except Exception as error:
            message = str(error) or type(error).__name__
            self._report(QueueUnavailable(RedisErrorKind.DISCONNECTED, message))
            raise

    async def _find(self) -> IStreamClientEndpoint:
        if self._url.socket_path is not None:
            return UNIXClientEndpoint(self._reactor, self._url.socket_path, CONNECT_DEADLINE_S)
        if self._url.sentinel_name is None:
            return self._tcp(self._url.hosts[0])
        for sentinel in self._url.hosts:
            address = await self._ask(sentinel, self._url.sentinel_name)
            if address is not None:
                return self._tcp(address)
        raise ConnectionError(f"no Sentinel names the primary of {self._url.sentinel_name}")

    def _tcp(self, address: HostPort) -> IStreamClientEndpoint:
        host, port = address
        endpoint = HostnameEndpoint(self._reactor, host, port, timeout=CONNECT_DEADLINE_S)
        if not self._url.tls:
            return endpoint
        return wrapClientTLS(optionsForClientTLS(host, trustRoot=self._trust_root), endpoint)

    async def _ask(self, sentinel: HostPort, name: str) -> HostPort | None:
        """Ask one Sentinel for the primary's address; None if it does not know it, or does not answer."""
        host, port = sentinel
        endpoint = HostnameEndpoint(self._reactor, host, port, timeout=_SENTINEL_DEADLINE_S)
        try:
            connection: Any = await endpoint.connect(_sentinel_factory)
        except _CANCELLED:
            raise
        except Exception:  # noqa: BLE001  # the next Sentinel may know
            return None
        try:
            query = connection.sentinel_get_master_addr_by_name(name)
            answer = await query.addTimeout(_SENTINEL_DEADLINE_S, self._reactor)
        except (txredisapi.RedisError, DeadlinePassed):
            return None
        finally:
            connection.transport.abortConnection()
        return (answer[0].decode(), int(answer[1])) if answer else None


def _trust_root(ca_file: str) -> Any:
    try:
        pem = Path(ca_file).read_bytes()
    except OSError as error:
        raise ConfigError(f"the Redis URL's ca_file cannot be read: {error.strerror}") from None
    certificates = [Certificate.loadPEM(part) for part in _PEM.findall(pem)]
    if not certificates:
        raise ConfigError("the Redis URL's ca_file holds no PEM certificate")
    return trustRootFromCertificates(certificates)

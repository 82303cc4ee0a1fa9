"""The connections to Redis: a txredisapi pool that finds its way back, and says when it cannot.

What txredisapi leaves to its caller, and is done here:

* Its ``getConnection()`` waits for ever while Redis is away, and each abandoned wait stays in a list. So
  nobody waits here: `RedisPool.writer` is a connection that is ready, or None.
* A failed AUTH or SELECT stops its reconnecting for good. Here it is one more reason to try again.
* A server that accepts and then says nothing would keep a connection "connecting" for ever. Here the
  handshake has a deadline.
* A command that passed its deadline leaves its answer under way, to be taken for that of the next command.
  So such a connection is given up: closed, and never used again.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import txredisapi
from twisted.application.service import Service
from twisted.internet.defer import CancelledError, Deferred, ensureDeferred, succeed
from twisted.internet.defer import TimeoutError as DeadlinePassed
from twisted.internet.endpoints import HostnameEndpoint, UNIXClientEndpoint, wrapClientTLS
from twisted.internet.error import ConnectingCancelledError
from twisted.internet.interfaces import (
    IProtocol,
    IProtocolFactory,
    IReactorTime,
    IStreamClientEndpoint,
    ITCPTransport,
)
from twisted.internet.protocol import Factory
from twisted.internet.ssl import Certificate, optionsForClientTLS, trustRootFromCertificates
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from webhookd.model import ConfigError, QueueUnavailable, RedisErrorKind
from webhookd.reactor import IReactor
from webhookd.redis.url import Address, RedisUrl

_CONNECT_DEADLINE_S = 2.0
_SENTINEL_DEADLINE_S = 0.5
_POOL_SIZE = 2  # one connection writes jobs, so that their order holds; the other is for everything else

# What stands in RESP before a value; most values are short.
_LENGTH = b"\r\n$%d\r\n"
_LENGTHS = [_LENGTH % length for length in range(128)]

_CANCELLED = (CancelledError, ConnectingCancelledError)  # the second is an endpoint's word for it

_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)

_KIND_OF_PREFIX = {
    "READONLY": RedisErrorKind.READONLY,
    "UNBLOCKED": RedisErrorKind.READONLY,
    "LOADING": RedisErrorKind.LOADING,
    "MASTERDOWN": RedisErrorKind.MASTERDOWN,
    "NOREPLICAS": RedisErrorKind.NOREPLICAS,
    "OOM": RedisErrorKind.OOM,
    "MISCONF": RedisErrorKind.MISCONF,
    "BUSY": RedisErrorKind.BUSY,
    "NOAUTH": RedisErrorKind.NOAUTH,
    "WRONGPASS": RedisErrorKind.NOAUTH,
    "NOPERM": RedisErrorKind.NOPERM,
    "CLUSTERDOWN": RedisErrorKind.CLUSTER,
    "CROSSSLOT": RedisErrorKind.CLUSTER,
    "MOVED": RedisErrorKind.CLUSTER,
    "ASK": RedisErrorKind.CLUSTER,
    "TRYAGAIN": RedisErrorKind.CLUSTER,
    "WRONGTYPE": RedisErrorKind.WRONGTYPE,
}

# After these another server may have the job to do, so its address is looked up anew.
_ASK_AGAIN = frozenset(
    {
        RedisErrorKind.READONLY,
        RedisErrorKind.LOADING,
        RedisErrorKind.MASTERDOWN,
        RedisErrorKind.NOAUTH,
        RedisErrorKind.CLUSTER,
    }
)


def error_kind(message: str) -> RedisErrorKind:
    """The class of an error reply, by its first word."""
    return _KIND_OF_PREFIX.get(message.split(" ", 1)[0], RedisErrorKind.OTHER)


def unavailable(error: BaseException | None) -> QueueUnavailable:
    """What a failed command means: whether it was carried out is unknown unless Redis itself refused it."""
    if isinstance(error, QueueUnavailable):
        return error
    if isinstance(error, txredisapi.ResponseError):
        message = str(error)
        if message.startswith("MOVED "):  # slot and address
            message += ", where the cluster has the queue's keys: the Redis URL must name that server"
        return QueueUnavailable(error_kind(message), message)
    if isinstance(error, DeadlinePassed):
        return QueueUnavailable(RedisErrorKind.TIMEOUT, "Redis did not answer in time", unknown=True)
    return QueueUnavailable(RedisErrorKind.DISCONNECTED, "the connection to Redis was lost", unknown=True)


@contextmanager
def _suppress_noperm() -> Iterator[None]:
    """A user who may not ask has still got an answer."""
    try:
        yield
    except txredisapi.ResponseError as error:
        if error_kind(str(error)) is not RedisErrorKind.NOPERM:
            raise


class RedisConnection(txredisapi.RedisProtocol):  # type: ignore[misc]  # txredisapi has no types
    """One connection, ready once its handshake is done: AUTH, SELECT, PING and, behind Sentinel, ROLE.

    Without the PING, a server that is stopped or still loading would look ready: the kernel accepts for it.
    """

    factory: _PoolFactory

    def connectionMade(self) -> None:
        """Shake hands first; txredisapi's own part makes the connection available."""
        if ITCPTransport.providedBy(self.transport):
            self.transport.setTcpNoDelay(True)
            self.transport.setTcpKeepAlive(True)
        handshake = ensureDeferred(self._shake_hands(self.factory.url))
        handshake.addTimeout(_CONNECT_DEADLINE_S, self.factory.clock)
        handshake.addCallbacks(self._handshake_done, self._handshake_failed)

    async def _shake_hands(self, url: RedisUrl) -> None:
        if url.password is not None:
            await self._authenticate(url.password, url.username)
        if url.database:
            await self.select(url.database)
        with _suppress_noperm():
            await self.ping()
        if url.sentinel_name is not None:
            role = await self.role()
            if role[0] != b"master":
                raise txredisapi.ResponseError("READONLY the server behind this address is a replica")

    async def _authenticate(self, password: str, username: str | None) -> None:
        try:
            await self.auth(password, username)
        except txredisapi.ResponseError as error:
            # Of its words only the first: a server that does not know a command repeats the arguments.
            code = str(error).partition(" ")[0]
            raise txredisapi.ResponseError(f"{code} the server refused AUTH") from None

    def _handshake_done(self, _result: None) -> None:
        super().connectionMade()

    def _handshake_failed(self, failure: Failure) -> None:
        self.factory.report(unavailable(failure.value))
        self.give_up()

    def give_up(self) -> None:
        """Close the connection now and never use it again."""
        self.given_up = True
        self.transport.abortConnection()

    given_up = False

    def _build_command(self, *args: bytes | str | int, **_options: object) -> bytes:
        """RESP for one command: txredisapi's own takes three times as long, and a call has many arguments."""
        parts = [b"*%d" % len(args)]
        for arg in args:
            value = arg if isinstance(arg, bytes) else str(arg).encode()
            length = len(value)
            parts += (_LENGTHS[length] if length < len(_LENGTHS) else _LENGTH % length, value)
        parts.append(b"\r\n")
        return b"".join(parts)

    async def within(self, deadline_s: float, answer: Deferred[Any]) -> Any:
        """A command's answer; raises `QueueUnavailable`, and gives the connection up where that is due."""
        try:
            return await answer.addTimeout(deadline_s, self.factory.clock)
        except txredisapi.ScriptDoesNotExist:
            raise
        except Exception as error:
            reason = unavailable(error)
            if reason.unknown or reason.kind in _ASK_AGAIN:
                self.give_up()
            raise reason from error


class _PoolFactory(txredisapi.RedisFactory):  # type: ignore[misc]  # txredisapi has no types
    protocol = RedisConnection
    initialDelay = 0.1
    maxDelay = 2.0
    refusals = 0

    def __init__(
        self,
        url: RedisUrl,
        clock: IReactorTime,
        report: Callable[[QueueUnavailable], None],
        ready: Callable[[RedisConnection], None],
    ) -> None:
        super().__init__(str(url), None, _POOL_SIZE, isLazy=True, charset=None, convertNumbers=False)
        self.url = url
        self.clock = clock
        self.report = report
        self.ready = ready

    def addConnection(self, conn: RedisConnection) -> None:
        """A connection has shaken hands."""
        super().addConnection(conn)
        if conn in self.pool:
            self.ready(conn)

    def retryDelay(self, attempt: int) -> float:
        """Seconds; to connect to a server that then refuses what it is asked is no success."""
        delay_s: float = super().retryDelay(max(attempt, self.refusals))
        return delay_s

    def stopTrying(self) -> Deferred[None]:
        """Txredisapi stops for good after a failed AUTH; a password can be mended while we run."""
        return succeed(None)


class RedisPool(Service):
    """The connections of one daemon to one Redis, from start to stop.

    ``last_error`` is why Redis was last found unusable; None since it was last found usable. ``errors``
    counts all failures.
    """

    def __init__(self, reactor: IReactor, url: RedisUrl) -> None:
        self.url = url
        self.last_error: QueueUnavailable | None = None
        self.errors: Counter[RedisErrorKind] = Counter()
        self._is_told = False  # of a connection, since the last failure that was news
        self._log = Logger()
        self._listeners: list[Callable[[RedisConnection], None]] = []
        self._factory = _PoolFactory(url, reactor, self.failed, self._ready)
        self._endpoint = RedisEndpoint(reactor, url, self.failed)

    @property
    def writer(self) -> RedisConnection | None:
        """The connection that jobs are written through; the same one as long as it lives."""
        pool = self._factory.pool
        if pool and not pool[0].given_up:
            first: RedisConnection = pool[0]
            return first
        return next((one for one in pool if not one.given_up), None)

    @property
    def prober(self) -> RedisConnection | None:
        """The connection for everything else, never the writer's: a late probe costs its connection."""
        writer = self.writer
        others = (one for one in self._factory.pool if not one.given_up and one is not writer)
        return next(others, None)

    def on_ready(self, listener: Callable[[RedisConnection], None]) -> None:
        """Have ``listener`` called with each new connection."""
        self._listeners.append(listener)

    def startService(self) -> None:
        """Begin to connect, and go on as long as the service runs."""
        super().startService()
        self._factory.startConnecting(self._endpoint)

    def stopService(self) -> Deferred[None]:
        """Close the connections; fires when they are closed."""
        super().stopService()
        disconnected: Deferred[None] = self._factory.disconnect()
        return disconnected

    def _ready(self, connection: RedisConnection) -> None:
        if len(self._factory.pool) == 1 and not self._is_told:
            self._is_told = True
            self._log.info("connected to Redis at {url}", url=self.url)
        for listener in self._listeners:
            listener(connection)

    def worked(self) -> None:
        """A call has succeeded."""
        self._factory.refusals = 0
        if self.last_error is not None:
            self._log.info("Redis at {url} takes jobs again", url=self.url)
            self.last_error = None

    def failed(self, reason: QueueUnavailable) -> None:
        """A call, or an attempt to connect, has failed."""
        self.errors[reason.kind] += 1
        self._factory.refusals += reason.kind in _ASK_AGAIN
        if self.last_error is None or self.last_error.kind is not reason.kind:
            self._is_told = False
            self._log.warn(
                "Redis at {url} cannot be used: {kind}: {reason}",
                url=self.url,
                kind=reason.kind.value,
                reason=reason,
            )
        self.last_error = reason


@implementer(IStreamClientEndpoint)
class RedisEndpoint:
    """Where to connect to, looked up anew for each connection: name, certificate, and Sentinel's answer."""

    def __init__(self, reactor: IReactor, url: RedisUrl, report: Callable[[QueueUnavailable], None]) -> None:
        self._reactor = reactor
        self._url = url
        self._report = report
        self._trust_root = _trust_root(url.ca_file) if url.ca_file is not None else None

    def __repr__(self) -> str:
        return f"<{self._url}>"  # Twisted puts it into its log; the URL shows no password

    def connect(self, protocolFactory: IProtocolFactory) -> Deferred[IProtocol]:
        """Connect once; the pool repeats it."""
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
            return UNIXClientEndpoint(self._reactor, self._url.socket_path, _CONNECT_DEADLINE_S)
        if self._url.sentinel_name is None:
            return self._tcp(self._url.hosts[0])
        for sentinel in self._url.hosts:
            address = await self._ask(sentinel, self._url.sentinel_name)
            if address is not None:
                return self._tcp(address)
        raise ConnectionError(f"no Sentinel names the primary of {self._url.sentinel_name}")

    def _tcp(self, address: Address) -> IStreamClientEndpoint:
        host, port = address
        endpoint = HostnameEndpoint(self._reactor, host, port, timeout=_CONNECT_DEADLINE_S)
        if not self._url.tls:
            return endpoint
        return wrapClientTLS(optionsForClientTLS(host, trustRoot=self._trust_root), endpoint)

    async def _ask(self, sentinel: Address, name: str) -> Address | None:
        """The primary's address as one Sentinel knows it; None where it does not, or does not answer."""
        host, port = sentinel
        endpoint = HostnameEndpoint(self._reactor, host, port, timeout=_SENTINEL_DEADLINE_S)
        try:
            connection: Any = await endpoint.connect(_SentinelFactory())
        except _CANCELLED:
            raise
        except Exception:  # noqa: BLE001  # whatever it is: the next Sentinel may know
            return None
        try:
            query = connection.sentinel_get_master_addr_by_name(name)
            answer = await query.addTimeout(_SENTINEL_DEADLINE_S, self._reactor)
        except (txredisapi.RedisError, DeadlinePassed):
            return None
        finally:
            connection.transport.abortConnection()
        return (answer[0].decode(), int(answer[1])) if answer else None


class _SentinelFactory(Factory):
    noisy = False

    def buildProtocol(self, addr: object) -> _SentinelConnection:
        return _SentinelConnection()


class _SentinelConnection(txredisapi.RedisProtocol):  # type: ignore[misc]  # txredisapi has no types
    def __init__(self) -> None:
        super().__init__(charset=None, convertNumbers=False)


def _trust_root(ca_file: str) -> Any:
    try:
        pem = Path(ca_file).read_bytes()
    except OSError as error:
        raise ConfigError(f"the Redis URL's ca_file cannot be read: {error.strerror}") from None
    certificates = [Certificate.loadPEM(part) for part in _PEM.findall(pem)]
    if not certificates:
        raise ConfigError("the Redis URL's ca_file holds no PEM certificate")
    return trustRootFromCertificates(certificates)

"""One connection to Redis: its handshake, its deadlines, and what an error of it means.

What txredisapi leaves to its caller, and is done here:

* A failed AUTH or SELECT stops its reconnecting for good. Here it is one more reason to try again.
* A server that accepts and then says nothing would keep a connection "connecting" forever. Here the
  handshake has a deadline.
* A command that passed its deadline leaves its answer under way, to be taken for that of the next command.
  So such a connection is given up: closed, and never used again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hiredis
import txredisapi
from twisted.internet.defer import Deferred, ensureDeferred, succeed
from twisted.internet.defer import TimeoutError as DeadlinePassed
from twisted.internet.interfaces import IReactorTime, ITCPTransport
from twisted.python.failure import Failure

from webhookd.model import QueueUnavailable, RedisErrorKind
from webhookd.redis.url import RedisUrl

CONNECT_DEADLINE_S = 2.0
_POOL_SIZE = 2  # one connection writes jobs, so that their order holds; the other is for everything else

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

# After these errors another server may be the right one, so the connection is replaced: the address is looked
# up again.
ASK_AGAIN = frozenset(
    {
        RedisErrorKind.READONLY,
        RedisErrorKind.LOADING,
        RedisErrorKind.MASTERDOWN,
        RedisErrorKind.NOAUTH,
        RedisErrorKind.CLUSTER,
    }
)


def error_kind(message: str) -> RedisErrorKind:
    """Return the kind of an error reply, by its first word."""
    return _KIND_OF_PREFIX.get(message.split(" ", 1)[0], RedisErrorKind.OTHER)


def unavailable(error: BaseException | None) -> QueueUnavailable:
    """Return what the failure of a command means: its outcome is unknown unless Redis itself refused it."""
    if isinstance(error, QueueUnavailable):
        return error
    if isinstance(error, txredisapi.ResponseError):
        message = str(error)
        if message.startswith("MOVED "):  # slot and address
            message += ": that server has the queue's keys, so the Redis URL must name it"
        return QueueUnavailable(error_kind(message), message)
    if isinstance(error, DeadlinePassed):
        return QueueUnavailable(RedisErrorKind.TIMEOUT, "Redis did not answer in time", unknown=True)
    return QueueUnavailable(RedisErrorKind.DISCONNECTED, "the connection to Redis was lost", unknown=True)


class RedisConnection(txredisapi.RedisProtocol):  # type: ignore[misc]  # txredisapi has no types
    """One connection, ready once its handshake is done: AUTH, SELECT, PING and, with Sentinel, ROLE.

    Without the PING, a server that is stopped or still loading would look ready: the kernel accepts for it.
    """

    factory: ConnectionFactory
    given_up = False

    def connectionMade(self) -> None:
        """Begin the handshake; at its end, txredisapi's own method makes the connection available."""
        if ITCPTransport.providedBy(self.transport):
            self.transport.setTcpNoDelay(True)
            self.transport.setTcpKeepAlive(True)
        handshake = ensureDeferred(self._shake_hands(self.factory.url))
        handshake.addTimeout(CONNECT_DEADLINE_S, self.factory.clock).addErrback(self._handshake_failed)

    async def _shake_hands(self, url: RedisUrl) -> None:
        if url.password is not None:
            await self._authenticate(url.password, url.username)
        if url.database:
            await self.select(url.database)
        try:
            await self.ping()
        except txredisapi.ResponseError as error:
            if error_kind(str(error)) is not RedisErrorKind.NOPERM:  # that is an answer, too
                raise
        if url.sentinel_name is not None:
            role = await self.role()
            if role[0] != b"master":
                raise txredisapi.ResponseError("READONLY the server at this address is a replica")
        super().connectionMade()

    async def _authenticate(self, password: str, username: str | None) -> None:
        try:
            await self.auth(password, username)
        except txredisapi.ResponseError as error:
            # Only the first word: a server that does not know a command repeats its arguments.
            code = str(error).partition(" ")[0]
            raise txredisapi.ResponseError(f"{code} the server refused AUTH") from None

    def _handshake_failed(self, failure: Failure) -> None:
        self.factory.report(unavailable(failure.value))
        self.give_up()

    def give_up(self) -> None:
        """Close the connection now and never use it again."""
        self.given_up = True
        self.transport.abortConnection()

    def _build_command(self, *args: bytes | str | int, **_options: object) -> bytes:
        """Encode one command, in a third of the time of txredisapi: a call has many arguments."""
        command: bytes = hiredis.pack_command(args)  # type: ignore[arg-type]  # typed for one argument
        return command

    async def within(self, deadline_s: float, answer: Deferred[Any]) -> Any:
        """Return a command's answer.

        :raises QueueUnavailable: there is none in time, or it is an error. The connection is given up if the
            answer may still come, or if another server may be the right one.
        """
        try:
            return await answer.addTimeout(deadline_s, self.factory.clock)
        except txredisapi.ScriptDoesNotExist:
            raise
        except Exception as error:
            reason = unavailable(error)
            if reason.unknown or reason.kind in ASK_AGAIN:
                self.give_up()
            raise reason from error


class ConnectionFactory(txredisapi.RedisFactory):  # type: ignore[misc]  # txredisapi has no types
    """Makes a pool's connections, and replaces those that are lost.

    ``report`` is called with each failure of a handshake, ``ready`` with each new connection. ``refusals``
    counts the errors in a row that mean that this server is not the right one.
    """

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
        """Put a connection into the pool once its handshake is done."""
        super().addConnection(conn)
        if conn in self.pool:
            self.ready(conn)

    def retryDelay(self, attempt: int) -> float:
        """Return a delay in seconds; it grows, too, while servers accept connections and refuse commands."""
        delay_s: float = super().retryDelay(max(attempt, self.refusals))
        return delay_s

    def stopTrying(self) -> Deferred[None]:
        """Keep connecting: txredisapi calls this after a failed AUTH, but a password can be corrected."""
        return succeed(None)

"""The server's ends of a pool's connections: RESP over transports in memory, on the clock of the test.

There is no Redis here. A `Line` sends the replies of the test, and fails on an unexpected command.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import hiredis
from attrs import define, field
from twisted.internet.error import ConnectError, ConnectionAborted, ConnectionDone, ConnectionLost
from twisted.internet.task import deferLater
from twisted.internet.testing import MemoryReactorClock, StringTransport
from twisted.python.failure import Failure
from twisted.trial.unittest import TestCase

from tests.support.fakes import Log
from webhookd.redis.pool import RedisPool
from webhookd.redis.url import RedisUrl

OK = b"+OK\r\n"
PONG = b"+PONG\r\n"
NIL = b"$-1\r\n"


def error(message: str) -> bytes:
    """Return an error reply. The first word of the message is its code."""
    return f"-{message}\r\n".encode()


def integer(number: int) -> bytes:
    """Return a number."""
    return b":%d\r\n" % number


def bulk(data: bytes) -> bytes:
    """Return a string."""
    return b"$%d\r\n%s\r\n" % (len(data), data)


def array(*items: bytes) -> bytes:
    """Return a list of replies."""
    return b"*%d\r\n%s" % (len(items), b"".join(items))


PRIMARY = array(bulk(b"master"), integer(0), array())
REPLICA = array(bulk(b"slave"), bulk(b"10.0.0.1"), integer(6379), bulk(b"connected"), integer(0))
_HANDSHAKE = {b"AUTH": OK, b"SELECT": OK, b"PING": PONG, b"ROLE": PRIMARY}

Command = Sequence[bytes]


class _Transport(StringTransport):
    """A transport that ends as a TCP connection does: in the turn of the reactor after the call."""

    is_aborted = False
    _has_ended = False

    def __init__(self, clock: MemoryReactorClock, protocol: Any) -> None:
        super().__init__()
        self._clock = clock
        self._protocol = protocol

    def loseConnection(self) -> None:
        self._end(ConnectionDone())

    def abortConnection(self) -> None:
        self.is_aborted = True
        self._end(ConnectionAborted())

    def _end(self, reason: Exception) -> None:
        self._clock.callLater(0, self.end_now, reason)

    def end_now(self, reason: Exception) -> None:
        if not self._has_ended:
            self._has_ended = True
            self._protocol.connectionLost(Failure(reason))


class Line:
    """The server's end of one connection."""

    def __init__(self, clock: MemoryReactorClock, protocol: Any) -> None:
        self._protocol = protocol
        self._transport = _Transport(clock, protocol)
        self._reader = hiredis.Reader()
        protocol.makeConnection(self._transport)

    @property
    def is_aborted(self) -> bool:
        """True if the client aborted the connection."""
        return self._transport.is_aborted

    def commands(self) -> list[Command]:
        """Return the commands since the last call."""
        self._reader.feed(self._transport.value())
        self._transport.clear()
        return list(iter(self._reader.gets, False))

    def expect(self, name: bytes) -> Command:
        """Return the only command since the last call, which must have this name."""
        commands = self.commands()
        names = [command[0] for command in commands]
        assert names == [name], f"expected {name!r}, but {names} came"
        return commands[0]

    def reply(self, *replies: bytes) -> None:
        """Answer the oldest commands that wait for a reply."""
        for reply in replies:
            self._protocol.dataReceived(reply)

    def shake_hands(self, **answers: bytes) -> list[Command]:
        """Answer a handshake as a server does, and return its commands. ``answers`` replace the replies."""
        replies = {**_HANDSHAKE, **{name.encode(): reply for name, reply in answers.items()}}
        came: list[Command] = []
        while commands := self.commands():
            (command,) = commands
            assert command[0] in replies, f"{command[0]!r} is no command of a handshake"
            came.append(command)
            self.reply(replies[command[0]])
        return came

    def hang_up(self) -> None:
        """Lose the connection."""
        self._transport.end_now(ConnectionLost())


@define
class Network:
    """The reactor of a pool, and the pool's attempts to connect, in order."""

    clock: Any = field(factory=MemoryReactorClock)
    _seen: int = 0

    def attempts(self) -> list[tuple[Any, ...]]:
        """Return the attempts without a result."""
        return [*self.clock.unixClients, *self.clock.tcpClients][self._seen :]

    def where(self) -> object:
        """Return the target of the next attempt: a path, or a port, since each name is 127.0.0.1 here."""
        attempt = self.attempts()[0]
        return attempt[1] if len(attempt) == 5 else attempt[0]

    def accept(self) -> Line:
        """Accept the next attempt."""
        return Line(self.clock, self._next_factory().buildProtocol(None))

    def refuse(self) -> None:
        """Refuse the next attempt."""
        self._next_factory().clientConnectionFailed(None, Failure(ConnectError(string="no")))

    def _next_factory(self) -> Any:
        attempt = self.attempts()[0]
        self._seen += 1
        return attempt[2] if len(attempt) == 5 else attempt[1]


async def turn() -> None:
    """Wait for one turn of the real reactor, for which txredisapi makes a new connection wait."""
    from twisted.internet import reactor

    await deferLater(reactor, 0)


async def until_attempts(network: Network, count: int) -> None:
    """Wait until the pool connects again. It pauses in real time, as Twisted's ``ClientService`` does."""
    from twisted.internet import reactor

    while len(network.attempts()) < count:
        await deferLater(reactor, 0.01)


class PoolCase(TestCase):
    """A pool that has begun to connect, and its server."""

    url = "unix:///redis.sock"

    def setUp(self) -> None:
        self.log = Log.of(self)
        self.start_pool()

    def start_pool(self) -> None:
        """Start a new pool on a new network."""
        self.network = Network()
        self.clock = self.network.clock
        self.pool = RedisPool(self.clock, RedisUrl.parse(self.url))
        self.addCleanup(self._stop, self.pool, self.clock)
        self.pool.startService()

    async def _stop(self, pool: RedisPool, clock: MemoryReactorClock) -> None:
        stopped = pool.stopService()
        clock.advance(0)
        await stopped

    async def connect(self, **answers: bytes) -> Line:
        """Accept the next connection, and complete its handshake."""
        line = self.network.accept()
        line.shake_hands(**answers)
        await turn()
        return line

"""A client of a `WebhookSite` without sockets: bytes in, bytes out, and a clock that the test advances."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from twisted.internet.error import ConnectionAborted, ConnectionDone, ConnectionLost
from twisted.internet.interfaces import ITCPTransport
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure
from zope.interface import implementer

from webhookd.http import WebhookChannel, WebhookSite

from .http import Response, request_bytes


@implementer(ITCPTransport)
class MemoryTransport(StringTransport):
    """A `StringTransport` that reports its end to its protocol, in the next turn of the reactor."""

    protocol: WebhookChannel

    def __init__(self, clock: Clock) -> None:
        super().__init__(lenient=True)
        self.is_write_closed = False
        self.is_aborted = False
        self.is_closed = False
        self._clock = clock

    @property
    def is_paused(self) -> bool:
        """True if nothing more is read from the client for now."""
        return bool(self.producerState == "paused")

    def loseConnection(self) -> None:
        self._close(ConnectionDone())

    def abortConnection(self) -> None:
        self.is_aborted = True
        self._close(ConnectionAborted())

    def loseWriteConnection(self) -> None:
        self.is_write_closed = True

    def _close(self, reason: Exception) -> None:
        if not self.disconnecting:
            self.disconnecting = True
            self._clock.callLater(0, self.closed, reason)

    def closed(self, reason: Exception) -> None:
        """Report the end of the connection."""
        if not self.is_closed:
            self.is_closed = self.disconnecting = True
            self.protocol.connectionLost(Failure(reason))

    def unregisterProducer(self) -> None:
        self.producer = None

    def getTcpNoDelay(self) -> bool:
        return True

    def setTcpNoDelay(self, enabled: bool) -> None:
        pass

    def getTcpKeepAlive(self) -> bool:
        return False

    def setTcpKeepAlive(self, enabled: bool) -> None:
        pass


class MemoryClient:
    """One connection to a site."""

    def __init__(self, site: WebhookSite, clock: Clock) -> None:
        channel = site.buildProtocol(None)
        assert isinstance(channel, WebhookChannel)
        self.transport = MemoryTransport(clock)
        self.transport.protocol = channel
        self._channel = channel
        self._clock = clock
        self._to_send: deque[bytes] = deque()
        self._read = 0
        channel.makeConnection(self.transport)

    def send(self, data: bytes, piece_bytes: int | None = None) -> None:
        """Send bytes, all at once or in pieces. Pieces that the site does not read yet wait."""
        size = piece_bytes or max(len(data), 1)
        self._to_send += (data[start : start + size] for start in range(0, len(data), size))
        self.turn()

    def turn(self) -> None:
        """Run turns of the reactor: deliver what the site reads, and make the calls that are due."""
        while True:
            while self._may_send():
                self._channel.dataReceived(self._to_send.popleft())
            self._clock.advance(0)
            if not self._may_send():
                return

    def _may_send(self) -> bool:
        return bool(self._to_send) and not (self.transport.is_paused or self.transport.disconnecting)

    def hang_up(self) -> None:
        """Lose the connection, as if the client's machine had died."""
        self.transport.closed(ConnectionLost())

    @property
    def received(self) -> bytes:
        """The bytes that `response` has not taken yet, at the end of this turn."""
        self.turn()
        data: bytes = self.transport.value()[self._read :]
        return data

    def response(self, method: str = "GET") -> Response:
        """Take the next answer. Fail if there is none, or only a part of one."""
        head, blank_line, rest = self.received.partition(b"\r\n\r\n")
        assert blank_line, f"no answer: {self.received!r}"
        status_line, *lines = head.decode("latin-1").split("\r\n")
        version, status, _phrase = status_line.split(" ", 2)
        assert version == "HTTP/1.1"
        fields = [line.split(": ", 1) for line in lines]
        headers = {name.lower(): value for name, value in fields}
        assert len(headers) == len(fields), f"a header came twice: {head!r}"
        has_body = method != "HEAD" and status not in ("100", "204")
        size = int(headers["content-length"]) if has_body else 0
        assert len(rest) >= size, f"half an answer: {self.received!r}"
        self._read += len(head) + len(blank_line) + size
        return Response(int(status), headers, rest[:size])

    def exchange(
        self, method: str, path: str, headers: Mapping[str, str] | None = None, body: bytes | None = None
    ) -> Response:
        """Send one request, and take its answer. The connection stays open."""
        self.send(request_bytes(method, path, {"Connection": "keep-alive"} | dict(headers or {}), body))
        return self.response(method)

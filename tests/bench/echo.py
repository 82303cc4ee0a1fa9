"""A bare Twisted protocol with llhttp (through httptools): reads each body, and queues nothing.

python echo.py PORT
"""

from __future__ import annotations

import sys

from httptools import HttpRequestParser
from twisted.internet import reactor
from twisted.internet.endpoints import serverFromString
from twisted.internet.protocol import Factory, Protocol

_ANSWER = b'{"status":"queued","jobId":"chatwoot.message_created.7.1700000000000000"}'
_RESPONSE = (
    b"HTTP/1.1 202 Accepted\r\nContent-Type: application/json\r\nAccess-Control-Allow-Origin: *\r\n"
    b"Content-Length: %d\r\n\r\n%b" % (len(_ANSWER), _ANSWER)
)


class Echo(Protocol):
    """Answers each request as webhookd would."""

    def connectionMade(self) -> None:
        """Prepare for a new client."""
        self._body: list[bytes] = []
        self._parser = HttpRequestParser(self)

    def dataReceived(self, data: bytes) -> None:
        """Parse some bytes."""
        self._parser.feed_data(data)

    def on_body(self, part: bytes) -> None:
        """Keep a part of a body."""
        self._body.append(part)

    def on_message_complete(self) -> None:
        """Answer a complete request."""
        b"".join(self._body)
        self._body.clear()
        assert self.transport is not None
        self.transport.write(_RESPONSE)


def main(port: int) -> None:
    """Listen until the process is killed."""
    endpoint = serverFromString(reactor, f"tcp:{port}:interface=127.0.0.1:backlog=1024")
    endpoint.listen(Factory.forProtocol(Echo))
    reactor.run()


if __name__ == "__main__":
    main(int(sys.argv[1]))

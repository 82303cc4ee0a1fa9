"""The channel: one connection, from bytes to requests and from requests to answers."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from httptools import HttpParserCallbackError, HttpParserError, HttpParserUpgrade, HttpRequestParser
from twisted.internet.interfaces import IPushProducer, ISSLTransport, ITCPTransport
from twisted.internet.protocol import Protocol, connectionDone
from twisted.internet.tcp import Connection
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.http_headers import Headers
from twisted.web.server import Site
from zope.interface import implementer

from webhookd.http import refusals
from webhookd.http.answers import encode
from webhookd.http.refusals import RefusedRequest, Rejection, host_of
from webhookd.http.request import WebhookRequest, request_id
from webhookd.http.state import EdgeState

#: Longer than nginx keeps an idle connection to its upstream (60 s), so that nginx never sends a request on
#: a connection that we close.
IDLE_TIMEOUT_S = 75.0
HEAD_DEADLINE_S = 10.0
BODY_DEADLINE_S = 30.0
WRITE_DEADLINE_S = 30.0
#: The time that a client has to read a rejection before the connection closes.
LINGER_S = 2.0

MAX_HEAD_BYTES = 16_384
MAX_HEADERS = 100
#: The limit of complete requests that wait on one connection. One read can bring 2,000 of them, and they take
#: more memory than the bytes that were read.
MAX_PIPELINED = 32

# The allowed values of Transfer-Encoding by version: llhttp accepts any list that ends with "chunked", and
# that in HTTP/1.0 too.
_CODINGS: Mapping[str, Sequence[bytes | None]] = {"1.1": (None, b"chunked"), "1.0": (None,)}

_log = Logger()


@implementer(IPushProducer)
class WebhookChannel(Protocol):
    """One connection of a client, with the interface that twisted.web's Request expects of a channel.

    A channel is fresh until its first byte. Complete requests wait in ``_waiting`` until the requests before
    them are answered; a rejection is the last item there. ``_is_reading`` becomes false with a rejection, or
    with a request after which the client wants to close. ``is_blocked`` is true while the client does not
    read our answers.
    """

    _is_receiving: bool
    _is_head_complete: bool
    _head_bytes: int
    _body_bytes: int
    _read_bytes: int
    transport: Any  # of TCP, TLS or a UNIX socket

    def __init__(self, site: Site, state: EdgeState) -> None:
        self.site = self.factory = site
        self.state = state
        self.is_fresh = True
        self.deadline_s = state.now_s + HEAD_DEADLINE_S
        self.arriving_bytes = 0
        self._body: list[bytes] = []
        self._parser = HttpRequestParser(self)
        self._waiting: deque[WebhookRequest | Rejection] = deque()
        self._answering: WebhookRequest | None = None
        self._is_reading = True
        self._is_paused = False
        self.is_blocked = False
        self._is_closing = False
        self._is_lingering = False
        self._peer: Any = None
        self._host: Any = None
        self._begin_message()

    # -- the connection

    def connectionMade(self) -> None:
        """Register the new connection, or reject it if there are too many."""
        transport = self.transport
        if ITCPTransport.providedBy(transport):
            transport.setTcpNoDelay(True)
        transport.registerProducer(self, True)  # noqa: FBT003  # Twisted's interface
        # Write to the socket directly, without a turn of the reactor in between. A TLS transport has a socket
        # too, but bytes written there would not be encrypted.
        self._send_some: Callable[[bytes], int] | None = (
            transport.socket.send if isinstance(transport, Connection) else None
        )
        self.state.channels.add(self)
        if len(self.state.channels) > self.state.max_connections:
            self._send_rejection(refusals.TOO_MANY_CONNECTIONS)
            self._close()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Forget what waits: the connection is closed, by the client or by us."""
        self._is_reading = False
        self._forget_body()
        waiting, self._waiting = self._waiting, deque()
        for request in (self._answering, *waiting):
            if isinstance(request, WebhookRequest):
                request.connectionLost(reason)
        self.state.remove_channel(self)

    def dataReceived(self, data: bytes) -> None:
        """Parse the bytes, and answer the complete requests in order."""
        if not self._is_reading:
            return  # discarded, so that the client reads the answer
        if not self._is_receiving:
            self.is_fresh = False
            self._is_receiving = True
            self._set_deadline(HEAD_DEADLINE_S)
        fields, body_bytes = self._fields, self._body_bytes
        self._read_bytes = len(data)
        try:
            self._parse(data)
        except HttpParserCallbackError as error:
            _log.failure("cannot read a request", Failure(error.__context__ or error))
            self._reject(refusals.BAD_REQUEST)
        except HttpParserError:
            self._reject(refusals.BAD_REQUEST)
        if self._is_receiving:
            # More of a head or of trailers: httptools keeps both in memory until they are complete.
            is_more_of_head = self._fields is fields and self._body_bytes == body_bytes
            self._head_bytes = self._head_bytes + len(data) if is_more_of_head else 0
            if self._head_bytes > MAX_HEAD_BYTES:
                self._reject(refusals.HEAD_TOO_LARGE)
            else:
                self._count_arriving()
        self._answer_next()

    def _count_arriving(self) -> None:
        """Count the part of a body that this read brought. A body that is complete by now does not count."""
        arrived = self._body_bytes - self.arriving_bytes
        if arrived:
            self.arriving_bytes += arrived
            self.state.add_arriving(arrived)

    def _parse(self, data: bytes) -> None:
        while True:
            try:
                self._parser.feed_data(data)
            except HttpParserUpgrade as offer:
                if self._parser.get_method() == b"CONNECT":
                    self._reject(refusals.BAD_REQUEST)
                    return
                # llhttp takes the rest for the other protocol. We decline the offer (RFC 9110, 7.8): a new
                # parser reads the same request without it.
                data = self._head_without_offer() + data[offer.args[0] :]
                self._parser = HttpRequestParser(self)
                self._begin_message()
            else:
                return

    def _head_without_offer(self) -> bytes:
        start = (self._parser.get_method(), self._uri, self._parser.get_http_version().encode())
        headers = [*self._fields.items(), *self._repeats]
        lines = [b"%b: %b\r\n" % header for header in headers if header[0] != b"upgrade"]
        return b"%b %b HTTP/%b\r\n%b\r\n" % (*start, b"".join(lines))

    def _set_deadline(self, in_s: float) -> None:
        self.deadline_s = self.state.now_s + in_s

    def overdue(self) -> None:
        """Act on a deadline that has passed."""
        if self._is_lingering or self.is_blocked:
            self.transport.abortConnection()
        elif self._is_receiving:
            self._reject(refusals.TOO_SLOW)
            self.deadline_s = math.inf  # the next one is set when the rejection is sent
            self._answer_next()
        else:
            self._close()

    # -- callbacks of llhttp: they only collect, so that nothing else runs in the middle of a parse

    def _begin_message(self) -> None:
        """Reset what is known of the request that arrives."""
        self._uri = b""
        self._fields: dict[bytes, bytes] = {}
        self._repeats: list[tuple[bytes, bytes]] = []
        self._forget_body()
        self._head_bytes = 0
        self._body_bytes = 0
        self._is_receiving = False
        self._is_head_complete = False

    def on_message_begin(self) -> None:
        """Note that a request begins, perhaps in the middle of a read."""
        self._is_receiving = True

    def on_url(self, url: bytes) -> None:
        """Collect a part of the request target."""
        self._uri += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Collect a header; ignore trailers."""
        if self._is_head_complete:
            return
        name = name.lower()
        if name in self._fields:
            self._repeats.append((name, value))
        else:
            self._fields[name] = value

    def on_headers_complete(self) -> None:
        """Check the complete head, and reject a bad one before its body arrives."""
        self._is_head_complete = True
        if not self._is_reading or self._parser.should_upgrade():
            return
        rejection = self._check_head()
        if rejection is not None:
            self._reject(rejection)
            return
        self._set_deadline(BODY_DEADLINE_S)
        if self._fields.get(b"expect", b"").lower() == b"100-continue":
            self._send_continue()

    def _send_continue(self) -> None:
        """Ask for the body, unless the client would read this as the answer to another request."""
        is_next = self._answering is None and not self._waiting
        if is_next and self._parser.get_http_version() == "1.1":
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _check_head(self) -> Rejection | None:
        if self._is_head_too_large():
            return refusals.HEAD_TOO_LARGE
        fields = self._fields
        for name, value in self._repeats:  # RFC 9110, 5.3
            fields[name] += b", " + value
        version = self._parser.get_http_version()
        coding = fields.get(b"transfer-encoding")
        if (coding and coding.lower()) not in _CODINGS.get(version, ()):
            return refusals.BAD_REQUEST
        host = fields.get(b"host")
        if b"," in (host or b"") or (host is None and version == "1.1"):
            return refusals.BAD_HOST
        if int(fields.get(b"content-length", b"0")) > self.state.max_body_bytes:
            return refusals.TOO_LARGE
        return None

    def _is_head_too_large(self) -> bool:
        if len(self._fields) + len(self._repeats) > MAX_HEADERS:
            return True
        if self._head_bytes + self._read_bytes <= MAX_HEAD_BYTES:
            return False  # the usual case: all bytes read so far are within the limit
        headers = (*self._fields.items(), *self._repeats)
        return len(self._uri) + sum(len(name) + len(value) for name, value in headers) > MAX_HEAD_BYTES

    def on_body(self, data: bytes) -> None:
        """Collect a part of the body."""
        self._body_bytes += len(data)
        if self._body_bytes > self.state.max_body_bytes:
            self._reject(refusals.TOO_LARGE)
        elif self._is_reading:
            self._body.append(data)

    def on_message_complete(self) -> None:
        """Queue a complete request."""
        parser, body = self._parser, self._body
        if not self._is_reading or parser.should_upgrade():
            return
        if len(self._waiting) == MAX_PIPELINED:
            self._reject(refusals.TOO_MANY_REQUESTS)
            return
        keep_alive = self._is_reading = parser.should_keep_alive()
        request = WebhookRequest(
            self,
            parser.get_method(),
            _origin_form(self._uri),
            b"HTTP/1.1" if parser.get_http_version() == "1.1" else b"HTTP/1.0",
            self._fields,
            body[0] if len(body) == 1 else b"".join(body),
            keep_alive=keep_alive,
        )
        self._waiting.append(request)
        self._begin_message()

    def _reject(self, rejection: Rejection) -> None:
        """Make a rejection the last answer of this connection."""
        if self._is_reading:
            self._is_reading = False
            self._is_receiving = False
            self._forget_body()
            self._waiting.append(rejection)

    def _forget_body(self) -> None:
        self._body = []
        if self.arriving_bytes:
            self.state.arriving_bytes -= self.arriving_bytes
            self.arriving_bytes = 0

    def give_way(self) -> None:
        """Reject the body that arrives here, so that there is room for others."""
        self._reject(refusals.TOO_MUCH_AT_ONCE)
        self._answer_next()

    # -- answering

    def _answer_next(self) -> None:
        """Start to answer the next request that waits, if no other is being answered."""
        if self._waiting and self._answering is None and not self.is_blocked:
            request = self._waiting.popleft()
            if isinstance(request, Rejection):
                self._answer_rejection(request)
            else:
                self._answering = request
                if not self._is_receiving:
                    self.deadline_s = math.inf
                self.state.arrived.add(request)
        self._regulate()

    def _regulate(self) -> None:
        """Read only while nothing waits, so that no client can fill our memory."""
        pause = self.is_blocked or bool(self._waiting)
        if pause is not self._is_paused:
            self._is_paused = pause
            if pause:
                self.transport.pauseProducing()
            else:
                self.transport.resumeProducing()

    def _send_rejection(self, rejection: Rejection) -> None:
        state, status = self.state, rejection.status
        state.requests["none", "none", status] += 1
        name = request_id(self._fields, state.request_ids)
        self.send(encode(rejection.response(), state.date, name, has_body=True, closes=True))
        path = _origin_form(self._uri).partition(b"?")[0] if self._is_head_complete else b""
        state.add_refusal(RefusedRequest(status, rejection.code, name, path, host_of(self.getPeer())))

    def _answer_rejection(self, rejection: Rejection) -> None:
        self._send_rejection(rejection)
        self._is_lingering = True
        self._set_deadline(LINGER_S)
        if ITCPTransport.providedBy(self.transport):
            self.transport.loseWriteConnection()

    def stays_open_after(self, request: WebhookRequest) -> bool:
        """Return whether the connection stays open after this answer."""
        return request.keep_alive and not (self._is_closing and not self._waiting and not self._is_receiving)

    def requestDone(self, request: WebhookRequest) -> None:
        """Continue with the next request after an answer, or close."""
        self._answering = None
        if not self.stays_open_after(request):
            self._close()
            return
        if not self._is_receiving:
            self._set_deadline(IDLE_TIMEOUT_S)
        if self._waiting:
            self._answer_next()

    def close_when_done(self) -> None:
        """Close once all requests are answered; the first request of a fresh connection may be on its way."""
        self._is_closing = True
        if not self.is_fresh and self._answering is None and not self._is_receiving and not self._waiting:
            self._close()

    def _close(self) -> None:
        self._is_reading = False
        self._waiting.clear()
        self._is_lingering = True  # until the client has read what was sent before
        self._set_deadline(WRITE_DEADLINE_S)
        self.transport.unregisterProducer()
        self.transport.loseConnection()

    # -- the interface for Request and for the transport

    def send(self, data: bytes) -> None:
        """Write to the socket directly if it accepts all, else to the transport."""
        if self._send_some is not None:
            try:
                sent = self._send_some(data)
            except OSError:
                sent = 0  # the socket is full, or closed, which the transport will notice
            if sent == len(data):
                return
            # From now on bytes may wait in the transport, and later ones must not overtake them.
            self._send_some = None
            data = data[sent:]
        self.transport.write(data)

    write = send

    def writeSequence(self, data: Sequence[bytes]) -> None:
        """Write several pieces."""
        self.send(b"".join(data))

    def writeHeaders(self, version: bytes, code: bytes, reason: bytes, headers: Headers) -> None:
        """Write the head of an answer that does not come from `WebhookRequest.respond`."""
        lines = [
            b"%b: %b\r\n" % (name, value) for name, values in headers.getAllRawHeaders() for value in values
        ]
        if self._answering is not None and not self.stays_open_after(self._answering):
            lines.append(b"Connection: close\r\n")
        self.send(b"HTTP/1.1 %b %b\r\n%b\r\n" % (code, reason, b"".join(lines)))

    def getPeer(self) -> Any:
        """Return the client's address; with the PROXY protocol it is known after the first bytes."""
        if self._peer is None:
            self._peer = self.transport.getPeer()
        return self._peer

    def getHost(self) -> Any:
        """Return our address, and remember it: each look-up is a system call."""
        if self._host is None:
            self._host = self.transport.getHost()
        return self._host

    def isSecure(self) -> bool:
        """Return whether this connection uses TLS."""
        return bool(ISSLTransport.providedBy(self.transport))

    def pauseProducing(self) -> None:
        """Stop answering and reading: the client does not read our answers."""
        self.is_blocked = True
        self._set_deadline(WRITE_DEADLINE_S)
        self._regulate()

    def resumeProducing(self) -> None:
        """Continue: the client reads again."""
        self.is_blocked = False
        is_waiting_for_us = self._answering is not None and not self._is_receiving
        self._set_deadline(math.inf if is_waiting_for_us else IDLE_TIMEOUT_S)
        self._answer_next()

    def stopProducing(self) -> None:
        """Do nothing: `connectionLost` follows."""

    def abort(self) -> None:
        """Close the connection at once, and drop unsent bytes."""
        self.transport.abortConnection()


def _origin_form(target: bytes) -> bytes:
    """Return a request target without the scheme and host that a client may send (RFC 9112, 3.2.2)."""
    scheme, separator, rest = target.partition(b"://")
    if not separator or scheme.lower() not in (b"http", b"https"):
        return target
    _, slash, path = rest.partition(b"/")
    return slash + path or b"/"

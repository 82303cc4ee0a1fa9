"""One connection of a client: bytes to requests, and answers in their order."""

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

#: Longer than nginx keeps an idle connection to its upstream (60 s), so that never both use and close it.
IDLE_TIMEOUT_S = 75.0
HEAD_DEADLINE_S = 10.0
BODY_DEADLINE_S = 30.0
WRITE_DEADLINE_S = 30.0
#: How long an answer to a request that was not read to its end may be fetched before the connection closes.
LINGER_S = 2.0

MAX_HEAD_BYTES = 16_384
MAX_HEADERS = 100
#: How many complete requests of a connection wait. One read can bring 2,000, and they need more room than it.
MAX_PIPELINED = 32

# What Transfer-Encoding may say, by version. llhttp takes any list that ends with "chunked", and in HTTP/1.0.
_CODINGS: Mapping[str, Sequence[bytes | None]] = {"1.1": (None, b"chunked"), "1.0": (None,)}

_log = Logger()


@implementer(IPushProducer)
class WebhookChannel(Protocol):
    """One connection of a client, in the form that twisted.web's Request expects.

    It is fresh until its first byte. Requests that are complete wait in ``_waiting`` until those before them
    are answered; a refusal is the last of them. ``_is_reading`` ends with a refusal, or with a request after
    which the client wants no other. ``is_blocked`` while the client does not read what was sent.
    """

    _is_receiving: bool
    _is_head_complete: bool
    _head_bytes: int
    _body_bytes: int
    _read_bytes: int
    transport: Any  # that of TCP, TLS or a UNIX socket

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
        """A client has connected."""
        transport = self.transport
        if ITCPTransport.providedBy(transport):
            transport.setTcpNoDelay(True)
        transport.registerProducer(self, True)  # noqa: FBT003  # Twisted's interface
        # A socket can be written to at once, without a turn of the reactor in between. A TLS transport shows
        # the socket below it as well, but what is sent there is not encrypted.
        self._send_some: Callable[[bytes], int] | None = (
            transport.socket.send if isinstance(transport, Connection) else None
        )
        self.state.channels.add(self)
        if len(self.state.channels) > self.state.max_connections:
            self._send_rejection(refusals.TOO_MANY_CONNECTIONS)
            self._close()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The connection is gone, whoever closed it."""
        self._is_reading = False
        self._forget_body()
        waiting, self._waiting = self._waiting, deque()
        for request in (self._answering, *waiting):
            if isinstance(request, WebhookRequest):
                request.connectionLost(reason)
        self.state.remove_channel(self)

    def dataReceived(self, data: bytes) -> None:
        """Parse; the requests that are complete are answered in their turn."""
        if not self._is_reading:
            return  # thrown away, so that the client gets to the answer
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
            # More of a head, or of trailers, which llhttp's wrapper keeps in memory until they are complete.
            is_more_of_head = self._fields is fields and self._body_bytes == body_bytes
            self._head_bytes = self._head_bytes + len(data) if is_more_of_head else 0
            if self._head_bytes > MAX_HEAD_BYTES:
                self._reject(refusals.HEAD_TOO_LARGE)
            else:
                self._count_arriving()
        self._answer_next()

    def _count_arriving(self) -> None:
        """Tell the site of what this read brought of a body; one that is complete by now is never counted."""
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
                # llhttp now takes a body for the other protocol. We pass on the offer (RFC 9110, 7.8), and so
                # have a new parser read the same request without it.
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
        """The deadline has passed."""
        if self._is_lingering or self.is_blocked:
            self.transport.abortConnection()
        elif self._is_receiving:
            self._reject(refusals.TOO_SLOW)
            self.deadline_s = math.inf  # its answer, perhaps after those before it, sets the next one
            self._answer_next()
        else:
            self._close()

    # -- what llhttp finds; it is only collected, so that nothing happens in the middle of its work

    def _begin_message(self) -> None:
        """What is known of the request that is being received: nothing yet."""
        self._uri = b""
        self._fields: dict[bytes, bytes] = {}
        self._repeats: list[tuple[bytes, bytes]] = []
        self._forget_body()
        self._head_bytes = 0
        self._body_bytes = 0
        self._is_receiving = False
        self._is_head_complete = False

    def on_message_begin(self) -> None:
        """A request begins, perhaps in the middle of what one read brought."""
        self._is_receiving = True

    def on_url(self, url: bytes) -> None:
        """A part of the request target."""
        self._uri += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header; trailers are left out."""
        if self._is_head_complete:
            return
        name = name.lower()
        if name in self._fields:
            self._repeats.append((name, value))
        else:
            self._fields[name] = value

    def on_headers_complete(self) -> None:
        """The head is complete; what is wrong with it is said before the body arrives."""
        self._is_head_complete = True
        if not self._is_reading or self._parser.should_upgrade():
            return
        if self._is_head_too_large():
            self._reject(refusals.HEAD_TOO_LARGE)
            return
        for name, value in self._repeats:  # RFC 9110, 5.3
            self._fields[name] += b", " + value
        rejection = self._check_head()
        if rejection is not None:
            self._reject(rejection)
            return
        self._set_deadline(BODY_DEADLINE_S)
        if self._fields.get(b"expect", b"").lower() == b"100-continue":
            self._send_continue()

    def _send_continue(self) -> None:
        """Ask for the body, unless that would be read as an answer to another request."""
        is_next = self._answering is None and not self._waiting
        if is_next and self._parser.get_http_version() == "1.1":
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _check_head(self) -> Rejection | None:
        fields = self._fields
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
            return False  # as a rule: all that was read is no larger
        headers = (*self._fields.items(), *self._repeats)
        return len(self._uri) + sum(len(name) + len(value) for name, value in headers) > MAX_HEAD_BYTES

    def on_body(self, data: bytes) -> None:
        """A part of the body."""
        self._body_bytes += len(data)
        if self._body_bytes > self.state.max_body_bytes:
            self._reject(refusals.TOO_LARGE)
        elif self._is_reading:
            self._body.append(data)

    def on_message_complete(self) -> None:
        """A request is complete."""
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
        """Make a refusal the last answer of this connection."""
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
        """Make room for what others send."""
        self._reject(refusals.TOO_MUCH_AT_ONCE)
        self._answer_next()

    # -- answering

    def _answer_next(self) -> None:
        """Answer what waits, one request after the other."""
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
        """Read on only while nothing waits, so that no client can fill our memory."""
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
        """Whether the connection stays open after this answer."""
        return request.keep_alive and not (self._is_closing and not self._waiting and not self._is_receiving)

    def requestDone(self, request: WebhookRequest) -> None:
        """A request is answered."""
        self._answering = None
        if not self.stays_open_after(request):
            self._close()
            return
        if not self._is_receiving:
            self._set_deadline(IDLE_TIMEOUT_S)
        if self._waiting:
            self._answer_next()

    def close_when_done(self) -> None:
        """Close once all that has come is answered; a fresh connection's request may be on its way."""
        self._is_closing = True
        if not self.is_fresh and self._answering is None and not self._is_receiving and not self._waiting:
            self._close()

    def _close(self) -> None:
        self._is_reading = False
        self._waiting.clear()
        self._is_lingering = True  # as long as the client takes to fetch what was sent before
        self._set_deadline(WRITE_DEADLINE_S)
        self.transport.unregisterProducer()
        self.transport.loseConnection()

    # -- what Request and the transport ask of a channel

    def send(self, data: bytes) -> None:
        """Write, at once as far as the socket takes it."""
        if self._send_some is not None:
            try:
                sent = self._send_some(data)
            except OSError:
                sent = 0  # the socket is full, or gone, as the transport will find
            if sent == len(data):
                return
            # From now on something may wait in the transport, and must not be overtaken.
            self._send_some = None
            data = data[sent:]
        self.transport.write(data)

    write = send

    def writeSequence(self, data: Sequence[bytes]) -> None:
        """Write several pieces."""
        self.send(b"".join(data))

    def writeHeaders(self, version: bytes, code: bytes, reason: bytes, headers: Headers) -> None:
        """Write the head of an answer that is not made by `WebhookRequest.respond`."""
        lines = [
            b"%b: %b\r\n" % (name, value) for name, values in headers.getAllRawHeaders() for value in values
        ]
        if self._answering is not None and not self.stays_open_after(self._answering):
            lines.append(b"Connection: close\r\n")
        self.send(b"HTTP/1.1 %b %b\r\n%b\r\n" % (code, reason, b"".join(lines)))

    def getPeer(self) -> Any:
        """The client's address; behind a PROXY protocol it is known once the first bytes are here."""
        if self._peer is None:
            self._peer = self.transport.getPeer()
        return self._peer

    def getHost(self) -> Any:
        """Our address, which costs a system call."""
        if self._host is None:
            self._host = self.transport.getHost()
        return self._host

    def isSecure(self) -> bool:
        """Whether this is TLS."""
        return bool(ISSLTransport.providedBy(self.transport))

    def pauseProducing(self) -> None:
        """The client does not read our answers: give it no more, and read nothing of it."""
        self.is_blocked = True
        self._set_deadline(WRITE_DEADLINE_S)
        self._regulate()

    def resumeProducing(self) -> None:
        """The client reads again."""
        self.is_blocked = False
        is_waiting_for_us = self._answering is not None and not self._is_receiving
        self._set_deadline(math.inf if is_waiting_for_us else IDLE_TIMEOUT_S)
        self._answer_next()

    def stopProducing(self) -> None:
        """The connection is gone; `connectionLost` says so, too."""

    def abort(self) -> None:
        """End the connection at once, and forget what was not sent."""
        self.transport.abortConnection()


def _origin_form(target: bytes) -> bytes:
    """A request target without the scheme and host that a client may send (RFC 9112, 3.2.2)."""
    scheme, separator, rest = target.partition(b"://")
    if not separator or scheme.lower() not in (b"http", b"https"):
        return target
    _, slash, path = rest.partition(b"/")
    return slash + path or b"/"

"""The HTTP edge: a Site that keeps bodies within their limit, and that can be drained.

twisted.web parses and frames; what it lacks is added here: a body limit that holds while the bytes arrive,
errors as JSON, and an end without cutting a request off.
"""

from __future__ import annotations

from collections.abc import Iterable
from io import BytesIO
from urllib.parse import unquote_to_bytes

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IDelayedCall, IReactorTime, ITCPTransport
from twisted.internet.protocol import connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.http import HTTPChannel
from twisted.web.http import Request as HTTPRequest
from twisted.web.resource import IResource
from twisted.web.server import Request, Site

#: Longer than nginx keeps an idle connection to its upstream (60 s), so that never both use and close it.
IDLE_TIMEOUT_S = 75

#: How long an answer to a request that was not read to its end may be fetched before the connection closes.
_LINGER_S = 2.0

#: How long a connection that was just made may take to send its request while the daemon ends.
_FRESH_GRACE_S = 1.0

_log = Logger()

_ERROR_HEAD = (
    b"HTTP/1.1 %d %b\r\nConnection: close\r\nContent-Type: application/json\r\n"
    b"Access-Control-Allow-Origin: *\r\nContent-Length: %d\r\n\r\n"
)


class WebhookRequest(Request):
    """A request whose body is in memory and within the limit."""

    channel: WebhookChannel
    content: BytesIO

    def gotLength(self, length: int | None) -> None:
        """The head is read; ``length`` is what it says of the body, None where that is chunked."""
        self.content = BytesIO()
        if length is not None and length > self.channel.site.max_body_bytes:
            self.channel.refuse_body()

    def handleContentChunk(self, data: bytes) -> None:
        """Some of the body has arrived."""
        if self.content.tell() + len(data) > self.channel.site.max_body_bytes:
            self.channel.refuse_body()
        else:
            self.content.write(data)

    def process(self) -> None:
        """Route it; Klein would answer a path that is not UTF-8 with a traceback in the log."""
        try:
            unquote_to_bytes(self.path).decode()
        except UnicodeDecodeError:
            self.channel.refuse(400, b"Bad Request", b"bad_path", b"the path is not UTF-8")
        else:
            super().process()


class WebhookChannel(HTTPChannel):
    """One connection of a client: fresh, then by turns busy with a request and idle."""

    site: WebhookSite
    transport: ITCPTransport
    requestFactory = WebhookRequest
    is_fresh = True
    is_idle = False
    _refused = False
    _closing = False
    _lingering: IDelayedCall | None = None

    def connectionMade(self) -> None:
        """A client has connected."""
        self.site.channels.add(self)
        super().connectionMade()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The connection is gone, whoever closed it."""
        if self._lingering is not None and self._lingering.active():
            self._lingering.cancel()
        super().connectionLost(reason)
        self.site.channel_lost(self)

    def dataReceived(self, data: bytes) -> None:
        """After a refusal the rest is read and thrown away, so that the client gets to the answer."""
        if not self._refused:
            self.is_fresh = self.is_idle = False
            super().dataReceived(data)

    # A refusal can come in the middle of what one read brought; nothing of the rest may become a request.

    def lineReceived(self, line: bytes) -> None:
        """A line of a head."""
        if not self._refused:
            super().lineReceived(line)

    def rawDataReceived(self, data: bytes) -> None:
        """A part of a body."""
        if not self._refused:
            super().rawDataReceived(data)

    def allContentReceived(self) -> None:
        """A request is complete."""
        if not self._refused:
            super().allContentReceived()

    def _send100Continue(self) -> None:
        if not self._refused:
            super()._send100Continue()

    def checkPersistence(self, request: Request, version: bytes) -> bool:
        """Whether another request may follow on this connection."""
        if self._closing:
            request.responseHeaders.setRawHeaders(b"Connection", [b"close"])
            return False
        return bool(super().checkPersistence(request, version))

    def requestDone(self, request: Request) -> None:
        """A request was answered; the next one may have come with it."""
        self.is_idle = not self._dataBuffer
        super().requestDone(request)

    def close_when_done(self) -> None:
        """Close now if idle, else after the answer; a fresh connection's request may be on its way."""
        self._closing = True
        if self.is_idle:
            self.loseConnection()
        for request in self.requests:
            self.persistent = False
            request.responseHeaders.setRawHeaders(b"Connection", [b"close"])

    def refuse_body(self) -> None:
        """Answer 413."""
        self.refuse(413, b"Content Too Large", b"too_large", b"the body is larger than allowed")

    def _respondToBadRequestAndDisconnect(self) -> None:
        self.refuse(400, b"Bad Request", b"bad_request", b"the request is not HTTP/1.1")

    def refuse(self, status: int, phrase: bytes, code: bytes, message: bytes) -> None:
        """Answer a request that is not read to its end, or makes no sense, and close."""
        if self._refused:
            return
        self._refused = True
        body = b'{"error":{"code":"%b","message":"%b"}}\n' % (code, message)
        self.transport.write(_ERROR_HEAD % (status, phrase, len(body)) + body)
        self.setTimeout(None)
        self._lingering = self.callLater(_LINGER_S, self.transport.abortConnection)
        if ITCPTransport.providedBy(self.transport):
            self.transport.loseWriteConnection()


class WebhookSite(Site):
    """All connections of one listening port."""

    protocol = WebhookChannel  # type: ignore[assignment]  # Twisted names its own wrapper, for HTTP/2
    displayTracebacks = False
    noisy = False

    def __init__(
        self, resource: IResource, reactor: IReactorTime, *, max_body_bytes: int, access_log: bool
    ) -> None:
        super().__init__(
            resource,
            WebhookRequest,
            parsePOSTFormSubmission=False,
            timeout=IDLE_TIMEOUT_S,
            reactor=reactor,
        )
        self.max_body_bytes = max_body_bytes
        self.channels: set[WebhookChannel] = set()
        self._access_log = access_log
        self._clock = reactor
        self._drained: Deferred[None] | None = None

    def log(self, request: HTTPRequest) -> None:
        """A line for a request, if wanted; never the query, which may hold a token."""
        if self._access_log:
            _log.info(
                "{client} {method} {path} {status}",
                client=request.getClientAddress().host,
                method=request.method.decode("ascii", "replace"),
                path=request.path.decode("ascii", "replace"),
                status=request.code,
            )

    def channel_lost(self, channel: WebhookChannel) -> None:
        """A connection is gone."""
        self.channels.discard(channel)
        if not self.channels and self._drained is not None:
            drained, self._drained = self._drained, None
            drained.callback(None)

    def drain(self, deadline_s: float) -> Deferred[None]:
        """Close all connections once their requests are answered, and what is left at the deadline anyway."""
        for channel in tuple(self.channels):
            channel.close_when_done()
        if not self.channels:
            return succeed(None)
        drained = self._drained = Deferred()
        calls = (
            self._clock.callLater(min(_FRESH_GRACE_S, deadline_s), self._close_fresh),
            self._clock.callLater(deadline_s, self._abort_all),
        )
        return drained.addCallback(_cancel, calls)

    def _close_fresh(self) -> None:
        for channel in tuple(self.channels):
            if channel.is_fresh:
                channel.loseConnection()

    def _abort_all(self) -> None:
        for channel in tuple(self.channels):
            channel.forceAbortClient()


def _cancel(_result: None, calls: Iterable[IDelayedCall]) -> None:
    for call in calls:
        if call.active():
            call.cancel()

"""What a connection hands on: a complete request, or why there is none."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from io import BytesIO
from itertools import count
from secrets import token_hex
from typing import Any, Protocol, TypeAlias
from urllib.parse import unquote_to_bytes

from attrs import frozen
from twisted.internet.interfaces import IReactorTime
from twisted.python.failure import Failure
from twisted.web.http import Request as HTTPRequest
from twisted.web.http import parse_qs
from twisted.web.http_headers import Headers
from twisted.web.server import Request

from webhookd.http.turn import EndOfTurn

SERVER = b"webhookd"
HEADS: Mapping[int, bytes] = {
    status.value: b"HTTP/1.1 %d %b\r\nServer: %b\r\nDate: " % (status.value, status.phrase.encode(), SERVER)
    for status in HTTPStatus
}

Fields: TypeAlias = Mapping[bytes, bytes]

_MAX_REQUEST_ID_BYTES = 64
_OF_A_REQUEST_ID = (string.ascii_letters + string.digits + "._-").encode()


def request_ids() -> Iterator[bytes]:
    """Names for requests that bring none; no other process gives the same."""
    return map((token_hex(6).encode() + b"-%x").__mod__, count(1))


def request_id(fields: Fields, own: Iterator[bytes]) -> bytes:
    """The name that nginx, or the client, gave to a request, if it is harmless wherever it may be written."""
    given = fields.get(b"x-request-id")
    if given is None or len(given) > _MAX_REQUEST_ID_BYTES or not given:
        return next(own)
    if given.isalnum() or not given.translate(None, _OF_A_REQUEST_ID):  # most are, and that is quicker
        return given
    return next(own)


class Edge(Protocol):
    """What a request needs to know of the site that it came to."""

    clock: IReactorTime
    date: bytes
    request_ids: Iterator[bytes]
    shortcut: Callable[[WebhookRequest], bool]
    arrived: EndOfTurn[WebhookRequest]
    answered: EndOfTurn[WebhookRequest]

    def getResourceFor(self, request: HTTPRequest) -> Any: ...

    def log(self, request: HTTPRequest) -> None: ...

    def refused(self, refused: Refused) -> None: ...


class Line(Protocol):
    """What a request needs of its connection, beside what twisted.web asks of one."""

    @property
    def site(self) -> Edge: ...

    @property
    def is_blocked(self) -> bool: ...

    def send(self, data: bytes) -> None: ...

    def abort(self) -> None: ...

    def goes_on_after(self, request: WebhookRequest) -> bool: ...


class WebhookRequest(Request):
    """A complete request: head and body are in memory, and within the limits.

    ``fields`` are its headers by lower-case name; what came several times is joined by commas, as RFC 9110,
    5.3 allows. ``keep_alive`` says whether its client may send another one on the same connection. ``route``
    is for the metrics: a word from a closed set. ``request_id`` goes into the answer, the log and the job's
    envelope.

    It must have no more than 30 attributes: beyond that, Python keeps the keys of each request's dict anew,
    which takes 3 microseconds.
    """

    _has_headers: bool
    _answer: bytes
    channel: Line  # type: ignore[assignment]  # it has all that Request asks of a channel
    site: Edge  # type: ignore[assignment]  # the same of a site

    def __init__(
        self,
        channel: Line,
        method: bytes,
        uri: bytes,
        version: bytes,
        fields: Fields,
        body: bytes,
        *,
        keep_alive: bool,
    ) -> None:
        super().__init__(channel, parsePOSTFormSubmission=False)
        self.site = channel.site
        self.method = method
        self.uri = uri
        self.clientproto = version
        self.keep_alive = keep_alive
        self.path, _, query = uri.partition(b"?")
        self.args = parse_qs(query, 1) if query else {}
        self.fields = fields
        self.body = body
        self.content = BytesIO(body)  # of the same bytes: no second copy
        self.is_gone = False
        self.route = "other"
        self.request_id = request_id(fields, channel.site.request_ids)
        self.began_s = channel.site.clock.seconds()

    @property
    def requestHeaders(self) -> Headers:
        """The headers as twisted.web has them; few requests need more than `fields`."""
        if not self._has_headers:
            self._has_headers = True
            for name, value in self.fields.items():
                self._headers.addRawHeader(name, value)
        return self._headers

    @requestHeaders.setter
    def requestHeaders(self, headers: Headers) -> None:
        self._headers = headers
        self._has_headers = False

    def getRequestHostname(self) -> bytes:
        """The routes are the same for every host; Klein would fail over one that is no domain name."""
        return b"localhost"

    def process(self) -> None:
        """Answer it, by the short way if its route has one, else as twisted.web does.

        A client that hung up meanwhile may be a sender that has lost patience, so its event counts.
        """
        try:
            if not self.site.shortcut(self) and not self.is_gone:
                self._process_as_twisted_does()
        except Exception:  # noqa: BLE001  # as twisted.web's own
            self.processingFailed(Failure())

    def _process_as_twisted_does(self) -> None:
        self.prepath = []
        self.postpath = [unquote_to_bytes(part) for part in self.path[1:].split(b"/")]
        self.setHeader(b"Server", SERVER)
        self.setHeader(b"Date", self.site.date)
        self.setHeader(b"X-Request-Id", self.request_id)
        try:
            b"/".join(self.postpath).decode()  # Klein would put a traceback for this into the log
        except UnicodeDecodeError:
            self.refused(BAD_PATH.status, BAD_PATH.code)
            self.respond(*BAD_PATH.response())
        else:
            self.render(self.site.getResourceFor(self))

    def respond(self, status: int, headers: Mapping[Any, Any], body: bytes) -> None:
        """Answer, head and body in one write; ``headers`` are complete but for those of the connection.

        The steps of an answer: it is made, then `send`, then `end`, each with those of the same turn.
        """
        if self.is_gone:
            return
        channel = self.channel
        parts = [HEADS[status], channel.site.date, b"\r\nX-Request-Id: ", self.request_id]
        for name, value in headers.items():
            parts += (b"\r\n", name, b": ", value)
        parts.append(b"\r\n\r\n" if channel.goes_on_after(self) else b"\r\nConnection: close\r\n\r\n")
        if self.method != b"HEAD":
            parts.append(body)
        self.code = status
        self._answer = b"".join(parts)
        channel.site.answered.add(self)

    def send(self) -> None:
        """Write the answer, unless its client is gone."""
        if not self.is_gone:
            self.channel.send(self._answer)

    def end(self) -> None:
        """It is answered: the next one may have its turn."""
        if not self.is_gone:
            self.channel.site.log(self)
            self.finished = 1
            self._cleanup()

    def refused(self, status: int, code: str, **known: str | None) -> None:
        """Tell the site that this request is refused, and what else is known, as `Refused` names it."""
        known = {"client": address(self.client), **known}
        self.site.refused(Refused(status, code, self.request_id, self.path, **known))

    def connectionLost(self, reason: Failure) -> None:
        """The client is gone before it had its answer."""
        self.is_gone = True
        super().connectionLost(reason)


@frozen
class Refused:
    """A request that was refused, at the edge or behind it; ``reason`` is what an answer does not tell."""

    status: int
    code: str
    request_id: bytes
    path: bytes
    client: str | None = None
    source: str | None = None
    reason: str | None = None


def address(client: object) -> str | None:
    """Of a client as Twisted has it; one of a UNIX socket has none."""
    host: str | None = getattr(client, "host", None)
    return host


@frozen
class Refusal:
    """An answer to what is no request, or one that is not read to its end."""

    status: int
    code: str
    message: str

    def response(self) -> tuple[int, Mapping[bytes, bytes], bytes]:
        """Status, headers and body."""
        body = b'{"error":{"code":"%b","message":"%b"}}\n' % (self.code.encode(), self.message.encode())
        headers = {
            b"Content-Type": b"application/json",
            b"Access-Control-Allow-Origin": b"*",
            b"Content-Length": b"%d" % len(body),
        }
        if self.status == 429:
            headers[b"Retry-After"] = b"3"
        return self.status, headers, body


BAD_REQUEST = Refusal(400, "bad_request", "this is not an HTTP/1.1 request")
BAD_HOST = Refusal(400, "bad_host", "an HTTP/1.1 request has one Host header")
BAD_PATH = Refusal(400, "bad_path", "the path is not UTF-8")
TOO_LARGE = Refusal(413, "too_large", "the body is larger than allowed")
HEAD_TOO_LARGE = Refusal(431, "head_too_large", "the head is larger than allowed")
TOO_SLOW = Refusal(408, "too_slow", "the request did not arrive in time")
TOO_MANY_CONNECTIONS = Refusal(429, "too_many_connections", "too many connections are open")
TOO_MANY_REQUESTS = Refusal(429, "too_many", "too many requests were sent without waiting for an answer")
TOO_MUCH_AT_ONCE = Refusal(429, "too_many", "too many bodies are arriving, and this is the largest")

"""The complete request that a connection hands on."""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping
from io import BytesIO
from itertools import count
from secrets import token_hex
from typing import TYPE_CHECKING, TypeAlias
from urllib.parse import unquote_to_bytes

from klein import Response
from twisted.python.failure import Failure
from twisted.web.http import parse_qs
from twisted.web.http_headers import Headers
from twisted.web.server import Request

from webhookd.http.answers import SERVER, encode
from webhookd.http.refusals import BAD_PATH, RefusedRequest, host_of

if TYPE_CHECKING:
    from webhookd.http.channel import WebhookChannel

Fields: TypeAlias = Mapping[bytes, bytes]

_MAX_REQUEST_ID_BYTES = 64
_SAFE = (string.ascii_letters + string.digits + "._-").encode()


def request_ids() -> Iterator[bytes]:
    """Generate ids for requests without one; no other process generates the same."""
    return map((token_hex(6).encode() + b"-%x").__mod__, count(1))


def request_id(fields: Fields, own: Iterator[bytes]) -> bytes:
    """Return the id that a request brings, from nginx or the client, if it is safe to write; else our own."""
    given = fields.get(b"x-request-id", b"")
    # isalnum() is the fast path: nginx gives hexadecimal digits.
    if 0 < len(given) <= _MAX_REQUEST_ID_BYTES and (given.isalnum() or not given.translate(None, _SAFE)):
        return given
    return next(own)


class WebhookRequest(Request):
    """A complete request: head and body are in memory, and within the limits.

    ``fields`` are the headers by lower-case name; repeated headers are joined by commas (RFC 9110, 5.3).
    ``keep_alive`` says whether the client may send another request on this connection. ``route`` is a label
    for the metrics, from a closed set. ``request_id`` goes into the answer, the log and the job's envelope.

    A request must have at most 30 attributes. With more, CPython no longer shares the keys of the instance
    dicts, which costs 3 microseconds per request.
    """

    _has_headers: bool
    _answer: bytes
    channel: WebhookChannel  # type: ignore[assignment]  # it has all that Request asks of a channel

    def __init__(
        self,
        channel: WebhookChannel,
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
        self.state = state = channel.state  # the channel is None after the client hung up
        self.method = method
        self.uri = uri
        self.clientproto = version
        self.keep_alive = keep_alive
        self.path, _, query = uri.partition(b"?")
        self.args = parse_qs(query, 1) if query else {}
        self.fields = fields
        self.body = body
        self.content = BytesIO(body)  # shares the bytes, without a copy
        self.is_gone = False
        self.route = "other"
        self.request_id = request_id(fields, state.request_ids)
        self.began_s = state.clock.seconds()

    @property
    def requestHeaders(self) -> Headers:
        """The headers as twisted.web has them, built on demand: `fields` is enough for most requests."""
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
        """Return a constant: no route depends on the host, and Klein fails on an invalid host name."""
        return b"localhost"

    def process(self) -> None:
        """Answer the request as twisted.web does, by the site's resource."""
        self.prepath = []
        self.postpath = [unquote_to_bytes(part) for part in self.path[1:].split(b"/")]
        self.setHeader(b"Server", SERVER)
        self.setHeader(b"Date", self.state.date)
        self.setHeader(b"X-Request-Id", self.request_id)
        try:
            b"/".join(self.postpath).decode()  # Klein would log a traceback for this
        except UnicodeDecodeError:
            self.add_refusal(BAD_PATH.status, BAD_PATH.code)
            self.respond(BAD_PATH.response())
        else:
            self.render(self.channel.site.getResourceFor(self))

    def respond(self, response: Response) -> None:
        """Answer; this adds the headers of the connection.

        The answer is encoded here. At the end of the turn follow `send` and then `end`.
        """
        if self.is_gone:
            return
        state = self.state
        self.code = response.code
        has_body, closes = self.method != b"HEAD", not self.channel.stays_open_after(self)
        self._answer = encode(response, state.date, self.request_id, has_body=has_body, closes=closes)
        state.answered.add(self)

    def send(self) -> None:
        """Write head and body at once, unless the client hung up."""
        if not self.is_gone:
            self.channel.send(self._answer)

    def end(self) -> None:
        """Finish the request, so that the channel continues with the next one."""
        if not self.is_gone:
            self.channel.site.log(self)
            self.finished = 1
            self._cleanup()

    def add_refusal(self, status: int, code: str, **known: str | None) -> None:
        """Record that this request is refused; ``known`` are other fields of `RefusedRequest`."""
        known = {"client": host_of(self.client), **known}
        self.state.add_refusal(RefusedRequest(status, code, self.request_id, self.path, **known))

    def connectionLost(self, reason: Failure) -> None:
        """Note that the client hung up before it had its answer."""
        self.is_gone = True
        super().connectionLost(reason)

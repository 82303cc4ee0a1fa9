"""What a connection hands on: a complete request, or why there is none."""

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
        self.state = state = channel.state  # the channel is gone once the client is
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
        self.request_id = request_id(fields, state.request_ids)
        self.began_s = state.clock.seconds()

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
        """Answer the request as twisted.web does: by the resource that the site finds for it."""
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
        """Answer, head and body in one write; this adds the headers of the connection.

        An answer takes three steps: it is made here, then `send`, then `end`. The answers of one turn take
        each step together.
        """
        if self.is_gone:
            return
        state = self.state
        self.code = response.code
        has_body, closes = self.method != b"HEAD", not self.channel.stays_open_after(self)
        self._answer = encode(response, state.date, self.request_id, has_body=has_body, closes=closes)
        state.answered.add(self)

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

    def add_refusal(self, status: int, code: str, **known: str | None) -> None:
        """Record that this request is refused; ``known`` are further fields of `RefusedRequest`."""
        known = {"client": host_of(self.client), **known}
        self.state.add_refusal(RefusedRequest(status, code, self.request_id, self.path, **known))

    def connectionLost(self, reason: Failure) -> None:
        """The client is gone before it had its answer."""
        self.is_gone = True
        super().connectionLost(reason)

"""An HTTP client that posts webhooks at a given rate, and keeps the replies."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from http.client import responses

from attrs import field, frozen
from OpenSSL import SSL
from service_identity import VerificationError
from treq.client import HTTPClient
from twisted.internet import error
from twisted.internet.defer import CancelledError, DeferredSemaphore, ensureDeferred
from twisted.internet.defer import TimeoutError as DeferredTimeoutError
from twisted.internet.task import deferLater
from twisted.web.client import Agent, HTTPConnectionPool, RequestTransmissionFailed, ResponseFailed
from twisted.web.http_headers import Headers

from webhookd.cli.terminal import brief
from webhookd.reactor import IReactor

_MAX_AT_ONCE = 10  # the number of Chatwoot's workers
_MAX_AT_ONCE_AT_A_RATE = 256
_MAX_ANSWER_BYTES = 65_536


@frozen
class Post:
    """One request: its body, and all its headers."""

    body: bytes
    headers: Mapping[str, str] = field(repr=False)


@frozen
class Reply:
    """The reply to one request. If there was none, ``status`` is None, and ``outcome`` gives the reason."""

    status: int | None
    outcome: str
    job_id: str | None
    latency_ms: float

    @property
    def is_taken(self) -> bool:
        """True if Chatwoot would count the request as delivered."""
        return self.status is not None and 200 <= self.status < 300


class Sender:
    """Posts to one address, with a limited number of requests in progress."""

    def __init__(
        self, reactor: IReactor, address: str, make: Callable[[int], Post], deadline_s: float
    ) -> None:
        """``make`` returns the request with a number, just before it is sent."""
        self.replies: list[Reply] = []
        self._reactor = reactor
        self._address = address
        self._make = make
        self._deadline_s = deadline_s
        self._pool = HTTPConnectionPool(reactor)
        self._pool.maxPersistentPerHost = _MAX_AT_ONCE_AT_A_RATE
        self._http = HTTPClient(Agent(reactor, pool=self._pool))

    async def send(self, numbers: Iterable[int], rate: float | None) -> Sequence[Reply]:
        """Send a request for each number. Return when each has a reply, or has failed.

        With a rate per second, requests do not wait for replies, and a latency counts from when the request
        was due. Without a rate, a reply starts the next request.
        """
        at_once = _MAX_AT_ONCE if rate is None else _MAX_AT_ONCE_AT_A_RATE
        places = DeferredSemaphore(at_once)
        started_s = self._reactor.seconds()
        for position, number in enumerate(numbers):
            await places.acquire()
            due_s = self._reactor.seconds() if rate is None else started_s + position / rate
            if due_s > self._reactor.seconds():
                await deferLater(self._reactor, due_s - self._reactor.seconds())
            ensureDeferred(self._send(number, due_s, places))
        for _ in range(at_once):
            await places.acquire()
        await self._pool.closeCachedConnections()
        return self.replies

    async def _send(self, number: int, due_s: float, places: DeferredSemaphore) -> None:
        try:
            exchange = ensureDeferred(self._exchange(self._make(number)))
            status, body = await exchange.addTimeout(self._deadline_s, self._reactor)
        except Exception as problem:  # noqa: BLE001  # each failure is counted by its meaning
            self._answered(None, self._reason(problem), None, due_s)
        else:
            self._answered(status, *_read(status, body), due_s)
        finally:
            places.release()

    def _answered(self, status: int | None, outcome: str, job_id: str | None, due_s: float) -> None:
        latency_ms = (self._reactor.seconds() - due_s) * 1000
        self.replies.append(Reply(status, outcome, job_id, latency_ms))

    def _reason(self, problem: Exception) -> str:
        if isinstance(problem, ResponseFailed | RequestTransmissionFailed):
            problem = problem.reasons[0].value
        if isinstance(problem, _LATE):
            return f"no answer within {self._deadline_s:g} s"
        return next(
            (reason for kind, reason in _REASONS.items() if isinstance(problem, kind)), "no HTTP answer"
        )

    async def _exchange(self, post: Post) -> tuple[int, bytes]:
        headers = Headers({name: [value] for name, value in post.headers.items()})
        # Chatwoot would follow a redirect with a second POST. An operator wants to see the redirect.
        response = await self._http.post(
            self._address, data=post.body, headers=headers, allow_redirects=False
        )
        body = bytearray()

        def keep(chunk: bytes) -> None:
            body.extend(chunk[: _MAX_ANSWER_BYTES - len(body)])

        await response.collect(keep)
        return response.code, bytes(body)


def _read(status: int, body: bytes) -> tuple[str, str | None]:
    """Return the outcome and the job id. If the reply is not from webhookd, the outcome says so."""
    try:
        content = json.loads(body)
        if "error" in content:
            return brief(f"{content['error']['code']}: {content['error']['message']}"), None
        job_id = content.get("jobId")
        return brief(str(content["status"])), None if job_id is None else brief(str(job_id))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{responses.get(status, 'Unknown Status')}, and not from webhookd", None


_LATE = (DeferredTimeoutError, CancelledError)  # only the deadline cancels
_REASONS: Mapping[type[Exception] | tuple[type[Exception], ...], str] = {
    error.ConnectionRefusedError: "connection refused",
    error.DNSLookupError: "no such host",
    error.ConnectError: "cannot connect",
    (SSL.Error, VerificationError): "no TLS, or an untrusted certificate",
    (error.ConnectionDone, error.ConnectionLost): "the connection ended before the answer",
}

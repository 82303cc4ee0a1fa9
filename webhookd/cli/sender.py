"""Posts webhooks, as many at once and as often as is wanted, and keeps what came back."""

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

_MAX_AT_ONCE = 10  # as many workers as Chatwoot has
_MAX_AT_ONCE_AT_A_RATE = 256
_MAX_ANSWER_BYTES = 65_536


@frozen
class Post:
    """One request: its body, and all its headers."""

    body: bytes
    headers: Mapping[str, str] = field(repr=False)


@frozen
class Reply:
    """What came back: ``status`` is None where nothing did, and ``outcome`` says why."""

    status: int | None
    outcome: str
    job_id: str | None
    latency_ms: float

    @property
    def is_taken(self) -> bool:
        """Whether Chatwoot would be content."""
        return self.status is not None and 200 <= self.status < 300


class Sender:
    """Posts to one address, and never has more than a bounded number of requests under way."""

    def __init__(
        self, reactor: IReactor, address: str, make: Callable[[int], Post], deadline_s: float
    ) -> None:
        """``make`` makes the request of that number, when it is about to be sent."""
        self.replies: list[Reply] = []
        self._reactor = reactor
        self._address = address
        self._make = make
        self._deadline_s = deadline_s
        self._pool = HTTPConnectionPool(reactor)
        self._pool.maxPersistentPerHost = _MAX_AT_ONCE_AT_A_RATE
        self._http = HTTPClient(Agent(reactor, pool=self._pool))

    async def send(self, numbers: Iterable[int], rate: float | None) -> Sequence[Reply]:
        """Send a request for each number, and return when all are answered, or given up.

        At a rate, requests are due so many times a second, whether the answers come or not, and a latency
        counts from then. Without one, the next is sent when one is answered.
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
        except Exception as problem:  # noqa: BLE001  # whatever it is, it is counted by what it means
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
        # Chatwoot would follow a redirect with a second POST; whoever looks after webhookd wants to see it.
        response = await self._http.post(
            self._address, data=post.body, headers=headers, allow_redirects=False
        )
        body = bytearray()

        def keep(chunk: bytes) -> None:
            body.extend(chunk[: _MAX_ANSWER_BYTES - len(body)])

        await response.collect(keep)
        return response.code, bytes(body)


def _read(status: int, body: bytes) -> tuple[str, str | None]:
    """What webhookd says of it, and the job's id; of an answer that is not webhookd's, that it is not."""
    try:
        content = json.loads(body)
        if "error" in content:
            return brief(f"{content['error']['code']}: {content['error']['message']}"), None
        job_id = content.get("jobId")
        return brief(str(content["status"])), None if job_id is None else brief(str(job_id))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{responses.get(status, 'Unknown Status')}, and not from webhookd", None


_LATE = (DeferredTimeoutError, CancelledError)  # what was cancelled, was so by the deadline
_REASONS: Mapping[type[Exception] | tuple[type[Exception], ...], str] = {
    error.ConnectionRefusedError: "connection refused",
    error.DNSLookupError: "there is no such host",
    error.ConnectError: "cannot connect",
    (SSL.Error, VerificationError): "no TLS, or a certificate that is not trusted",
    (error.ConnectionDone, error.ConnectionLost): "the connection ended before the answer",
}

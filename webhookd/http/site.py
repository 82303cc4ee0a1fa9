"""All connections of one listening port: their limits, their deadlines, and their end."""

from __future__ import annotations

import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.handlers import format_date_time

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IAddress, IDelayedCall, IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import Logger, LogLevel
from twisted.web.http import Request as HTTPRequest
from twisted.web.resource import IResource
from twisted.web.server import Site

from webhookd.clock import wall_clock_ms
from webhookd.histogram import DURATIONS_S, Histogram
from webhookd.http.channel import FRESH_GRACE_S, MAX_ARRIVING_BYTES, MAX_CONNECTIONS, WebhookChannel
from webhookd.http.request import Refused, WebhookRequest, address, request_ids
from webhookd.http.turn import EndOfTurn

_SWEEP_INTERVAL_S = 1.0
_MAX_LOGGED_PATH = 256
_RECENT_REFUSALS = 12

_METHODS = {name.encode(): name for name in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH")}

_log = Logger()
_accesses = Logger("webhookd.access")


class WebhookSite(Site):
    """All connections of one listening port.

    ``shortcut`` answers a request and says so, or leaves it to the resource. Requests that are complete have
    ``arrived``, and wait for the end of the turn; those that have an answer are ``answered``, and it waits
    as well. ``now_s`` and ``date`` are at most a second old. ``requests`` counts by route, method and status;
    what never became a request has none of the first two. ``durations_s`` is by route. ``recent_refusals``
    are the last, newest first, each with its time in ms since 1970.
    """

    displayTracebacks = False
    noisy = False

    def __init__(
        self,
        resource: IResource,
        reactor: IReactorTime,
        *,
        max_body_bytes: int,
        access_log: bool,
        max_connections: int = MAX_CONNECTIONS,
        max_arriving_bytes: int = MAX_ARRIVING_BYTES,
        shortcut: Callable[[WebhookRequest], bool] = lambda _request: False,
    ) -> None:
        super().__init__(resource, reactor=reactor)
        self.max_body_bytes = max_body_bytes
        self.max_connections = max_connections
        self.arriving_bytes = 0
        self._max_arriving_bytes = max_arriving_bytes
        self.shortcut = shortcut
        self.channels: set[WebhookChannel] = set()
        self.requests: Counter[tuple[str, str, int]] = Counter()
        self.durations_s: defaultdict[str, Histogram] = defaultdict(lambda: Histogram(DURATIONS_S))
        self.recent_refusals: deque[tuple[int, Refused]] = deque(maxlen=_RECENT_REFUSALS)
        self.request_ids = request_ids()
        self.arrived = EndOfTurn(reactor, WebhookRequest.process)
        self.answered = EndOfTurn(reactor, WebhookRequest.send, WebhookRequest.end)
        self._access_log = access_log
        self.clock = reactor
        self._drained: Deferred[None] | None = None
        self._sweeping = LoopingCall(self._sweep)
        self._sweeping.clock = reactor
        self._tell_time()

    def startFactory(self) -> None:
        """The port listens."""
        if not self._sweeping.running:
            self._sweeping.start(_SWEEP_INTERVAL_S, now=False)

    def stopFactory(self) -> None:
        """The port is closed; `drain` ends the sweeps, which its connections still need."""

    def buildProtocol(self, addr: IAddress | None) -> Any:  # Twisted's interface
        """A channel for a new connection."""
        return WebhookChannel(self)

    def _sweep(self) -> None:
        self._tell_time()
        for channel in [channel for channel in self.channels if channel.deadline_s < self.now_s]:
            channel.overdue()

    def _tell_time(self) -> None:
        self.now_s = self.clock.seconds()
        self.date = format_date_time(time.time()).encode()

    def log(self, request: HTTPRequest) -> None:
        """Count an answered request, and log it if wanted; never its query, which may hold a token."""
        assert isinstance(request, WebhookRequest)  # noqa: S101  # Twisted's signature is wider
        self.requests[request.route, _METHODS.get(request.method, "other"), request.code] += 1
        self.durations_s[request.route].observe(self.clock.seconds() - request.began_s)
        if self._access_log:
            _accesses.info(
                "{client} {method} {path} {status}",
                client=address(request.client) or "-",
                method=request.method.decode("ascii", "replace"),
                path=_shown(request.path),
                status=request.code,
                request_id=request.request_id.decode(),
            )

    def refused(self, refused: Refused) -> None:
        """Log a refusal: the one place that all of them pass, those of the edge and those behind it."""
        self.recent_refusals.appendleft((wall_clock_ms(), refused))
        is_our_fault = refused.status == 429 or refused.status >= 500
        _log.emit(
            LogLevel.warn if is_our_fault else LogLevel.info,
            "refused {path} from {client}: {status} {log_why}, request {request_id}",
            status=refused.status,
            code=refused.code,
            source=refused.source,
            path=_shown(refused.path),
            client=refused.client or "-",
            request_id=refused.request_id.decode(),
            reason=refused.reason,
            log_why=refused.code if refused.reason is None else f"{refused.code} ({refused.reason})",
        )

    def body_arrives(self, size_bytes: int) -> None:
        """Count a part of a body in, and refuse the largest of those that arrive where all are too much.

        So whoever would fill our memory with slow and large bodies does not keep small ones out.
        """
        self.arriving_bytes += size_bytes
        while self.arriving_bytes > self._max_arriving_bytes:
            largest = max(self.channels, key=lambda one: one.arriving_bytes)
            largest.give_way()

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
            return succeed(None).addCallback(self._stop_sweeping)
        drained = self._drained = Deferred()
        calls = (
            self.clock.callLater(
                min(FRESH_GRACE_S, deadline_s), self._abort, lambda channel: channel.is_fresh
            ),
            self.clock.callLater(deadline_s, self._abort, lambda _channel: True),
        )
        return drained.addCallback(_cancel, calls).addCallback(self._stop_sweeping)

    def _abort(self, condition: Callable[[WebhookChannel], bool]) -> None:
        for channel in tuple(self.channels):
            if condition(channel):
                channel.transport.abortConnection()

    def _stop_sweeping(self, _result: None) -> None:
        if self._sweeping.running:
            self._sweeping.stop()


def _shown(path: bytes) -> str:
    return path[:_MAX_LOGGED_PATH].decode("ascii", "replace") or "-"


def _cancel(_result: None, calls: Iterable[IDelayedCall]) -> None:
    for call in calls:
        if call.active():
            call.cancel()

"""The site of one listening port: it accepts connections, enforces their deadlines, and closes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IAddress, IDelayedCall, IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.resource import IResource
from twisted.web.server import Site

from webhookd.http.channel import WebhookChannel
from webhookd.http.refusals import host_of, printable_path
from webhookd.http.request import WebhookRequest
from webhookd.http.state import EdgeState
from webhookd.http.turn import EndOfTurn

MAX_CONNECTIONS = 20_000
_MAX_ARRIVING_BYTES = 268_435_456
# The time that a new connection has to send its first request during the shutdown.
_FRESH_GRACE_S = 1.0
_SWEEP_INTERVAL_S = 1.0

_METHODS = {name.encode(): name for name in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH")}

_accesses = Logger("webhookd.access")


class WebhookSite(Site):
    """A twisted.web site whose channels share one `EdgeState`.

    ``shortcut`` answers a request and returns True, or returns False and leaves it to ``resource``.
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
        max_arriving_bytes: int = _MAX_ARRIVING_BYTES,
        shortcut: Callable[[WebhookRequest], bool] = lambda _request: False,
    ) -> None:
        super().__init__(resource, reactor=reactor)
        self.shortcut = shortcut
        self.state = EdgeState(
            reactor,
            arrived=EndOfTurn(reactor, self._handle),
            answered=EndOfTurn(reactor, WebhookRequest.send, WebhookRequest.end),
            max_body_bytes=max_body_bytes,
            max_connections=max_connections,
            max_arriving_bytes=max_arriving_bytes,
        )
        self._access_log = access_log
        self._clock = reactor
        self._sweeping = LoopingCall(self._sweep)
        self._sweeping.clock = reactor

    def startFactory(self) -> None:
        """Start the sweeps: the port listens."""
        if not self._sweeping.running:
            self._sweeping.start(_SWEEP_INTERVAL_S, now=False)

    def stopFactory(self) -> None:
        """Do nothing: open connections still need the sweeps, and `drain` stops them."""

    def buildProtocol(self, addr: IAddress | None) -> Any:  # Twisted's interface
        """Return a channel for a new connection."""
        return WebhookChannel(self, self.state)

    def _sweep(self) -> None:
        state = self.state
        state.tick()
        for channel in [channel for channel in state.channels if channel.deadline_s < state.now_s]:
            channel.overdue()

    def _handle(self, request: WebhookRequest) -> None:
        """Answer a request.

        If the client has hung up, the shortcut takes its event all the same: a sender that loses patience
        does not send it again.
        """
        try:
            if not self.shortcut(request) and not request.is_gone:
                request.process()
        except Exception:  # noqa: BLE001  # as twisted.web's own
            request.processingFailed(Failure())

    def log(self, request: WebhookRequest) -> None:  # type: ignore[override]  # Twisted's type is wider
        """Count an answered request, and log it if configured; never its query, which may hold a token."""
        state = self.state
        state.requests[request.route, _METHODS.get(request.method, "other"), request.code] += 1
        state.durations_s[request.route].observe(state.clock.seconds() - request.began_s)
        if self._access_log:
            _accesses.info(
                "{client} {method} {path} {status}",
                client=host_of(request.client) or "-",
                method=request.method.decode("ascii", "replace"),
                path=printable_path(request.path),
                status=request.code,
                request_id=request.request_id.decode(),
            )

    def drain(self, deadline_s: float) -> Deferred[None]:
        """Close each connection once its requests are answered, and the rest at the deadline."""
        for channel in tuple(self.state.channels):
            channel.close_when_done()
        calls = (
            self._clock.callLater(min(_FRESH_GRACE_S, deadline_s), self._abort, only_fresh=True),
            self._clock.callLater(deadline_s, self._abort, only_fresh=False),
        )
        return self.state.until_all_closed().addCallback(self._drained, calls)

    def _abort(self, *, only_fresh: bool) -> None:
        for channel in tuple(self.state.channels):
            if channel.is_fresh or not only_fresh:
                channel.abort()

    def _drained(self, _result: None, calls: Iterable[IDelayedCall]) -> None:
        for call in calls:
            if call.active():
                call.cancel()
        if self._sweeping.running:
            self._sweeping.stop()

"""The state that a site, its connections and their requests share."""

from __future__ import annotations

import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from typing import TYPE_CHECKING
from wsgiref.handlers import format_date_time

from attrs import define, field
from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IReactorTime

from webhookd.clock import wall_clock_ms
from webhookd.histogram import DURATIONS_S, Histogram
from webhookd.http.refusals import RefusedRequest
from webhookd.http.request import WebhookRequest, request_ids
from webhookd.http.turn import EndOfTurn

if TYPE_CHECKING:
    from webhookd.http.channel import WebhookChannel

_RECENT_REFUSALS = 12


@define(eq=False)
class EdgeState:
    """Limits, time, open connections and counters of one listening port.

    A complete request waits in ``arrived`` for the end of the turn, and its answer in ``answered``.
    ``arriving_bytes`` is the size of all incomplete bodies. ``requests`` counts answers by route, method and
    status; a rejection has route and method "none". ``durations_s`` is by route. ``recent_refusals`` starts
    with the newest; each comes with its time in ms since 1970. ``now_s`` and ``date`` are at most a second
    old.
    """

    clock: IReactorTime
    arrived: EndOfTurn[WebhookRequest]
    answered: EndOfTurn[WebhookRequest]
    max_body_bytes: int
    max_connections: int
    max_arriving_bytes: int
    arriving_bytes: int = 0
    channels: set[WebhookChannel] = field(factory=set)
    requests: Counter[tuple[str, str, int]] = field(factory=Counter)
    durations_s: defaultdict[str, Histogram] = field(
        factory=lambda: defaultdict(lambda: Histogram(DURATIONS_S))
    )
    recent_refusals: deque[tuple[int, RefusedRequest]] = field(factory=lambda: deque(maxlen=_RECENT_REFUSALS))
    request_ids: Iterator[bytes] = field(factory=request_ids)
    now_s: float = field(init=False)
    date: bytes = field(init=False)
    _all_closed: Deferred[None] | None = None

    def __attrs_post_init__(self) -> None:
        self.tick()

    def tick(self) -> None:
        """Update ``now_s`` and ``date``."""
        self.now_s = self.clock.seconds()
        self.date = format_date_time(time.time()).encode()

    def add_arriving(self, size_bytes: int) -> None:
        """Count a part of a body, and reject the largest body while all together are too large.

        So large, slow bodies that fill our memory do not keep small ones out.
        """
        self.arriving_bytes += size_bytes
        while self.arriving_bytes > self.max_arriving_bytes:
            largest = max(self.channels, key=lambda one: one.arriving_bytes)
            largest.give_way()

    def add_refusal(self, refused: RefusedRequest) -> None:
        """Log and remember a request that the edge or the application refused."""
        self.recent_refusals.appendleft((wall_clock_ms(), refused))
        refused.log()

    def remove_channel(self, channel: WebhookChannel) -> None:
        """Forget a closed connection."""
        self.channels.discard(channel)
        if not self.channels and self._all_closed is not None:
            all_closed, self._all_closed = self._all_closed, None
            all_closed.callback(None)

    def until_all_closed(self) -> Deferred[None]:
        """Return a Deferred that fires once no connection is open."""
        if not self.channels:
            return succeed(None)
        self._all_closed = Deferred()
        return self._all_closed

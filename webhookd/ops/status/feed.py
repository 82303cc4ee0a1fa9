"""The stream of server-sent events that the page reads: one message a second, the same for all viewers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec
from klein import Response
from twisted.application.internet import TimerService
from twisted.internet.defer import Deferred, ensureDeferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET

from webhookd.http import Rejection, WebhookRequest
from webhookd.ops.status.sampler import Point, Sampler
from webhookd.redis.watch import QueueWatch

INTERVAL_S = 1.0
MAX_VIEWERS = 20

_ENDING = Rejection(503, "ending", "this replica is stopping")
_TOO_MANY = Rejection(503, "too_many_viewers", "too many viewers of this page")

_log = Logger()


class StatusFeed(TimerService):
    """Samples once a second, and sends each sample to all viewers.

    While there is a viewer, the feed refreshes the queues, and does not wait for that. A viewer that does not
    read is dropped: its browser connects again and gets the history again.
    """

    def __init__(self, clock: IReactorTime, sampler: Sampler, queue_watch: QueueWatch) -> None:
        super().__init__(INTERVAL_S, self._tick)
        self.clock = clock
        self._sampler = sampler
        self._queue_watch = queue_watch
        self._viewers: set[WebhookRequest] = set()

    def stopService(self) -> Deferred[None]:
        """End all streams, so that their connections can close."""
        stopped: Deferred[None] = super().stopService()
        for viewer in self._reading():
            viewer.finish()
        return stopped

    def watch(self, request: WebhookRequest) -> None:
        """Answer with the stream: first the history, then each new sample."""
        if not self.running or len(self._viewers) >= MAX_VIEWERS:
            request.respond((_TOO_MANY if self.running else _ENDING).response())
            return
        request.keep_alive = False  # nothing comes after a stream
        request.setHeader(b"Content-Type", b"text/event-stream")
        request.setHeader(b"Cache-Control", b"no-store")
        request.setHeader(b"X-Content-Type-Options", b"nosniff")
        request.setHeader(b"X-Accel-Buffering", b"no")  # for an nginx in front
        self._viewers.add(request)
        request.notifyFinish().addBoth(lambda _: self._viewers.discard(request))
        request.write(self._message(self._sampler.points))
        self._refresh_queues()

    def _tick(self) -> None:
        if self._viewers:
            self._refresh_queues()
        try:
            self._sampler.sample()
            if self._viewers:
                message = self._message(self._sampler.points[-1:])
                for viewer in self._reading():
                    viewer.write(message)
        except Exception:  # noqa: BLE001  # the next tick may succeed, and an error would end the timer
            _log.failure("cannot update the status page")

    def _refresh_queues(self) -> None:
        ensureDeferred(self._queue_watch.refresh())

    def _reading(self) -> Iterator[WebhookRequest]:
        """Yield the viewers that read; drop the others."""
        for viewer in tuple(self._viewers):
            if viewer.channel.is_blocked:
                viewer.channel.abort()
            else:
                yield viewer

    def _message(self, points: Sequence[Point]) -> bytes:
        return b"data: %b\n\n" % msgspec.json.encode({"now": self._sampler.state, "points": points})


class StatusEvents(Resource):
    """The feed as a resource."""

    isLeaf = True

    def __init__(self, feed: StatusFeed) -> None:
        super().__init__()
        self._feed = feed

    def render_GET(self, request: WebhookRequest) -> int:
        """Answer with the stream."""
        self._feed.watch(request)
        return NOT_DONE_YET

    def render_HEAD(self, request: WebhookRequest) -> int:
        """Answer with the head of the stream alone."""
        request.respond(Response(200, {b"Content-Type": b"text/event-stream"}))
        return NOT_DONE_YET

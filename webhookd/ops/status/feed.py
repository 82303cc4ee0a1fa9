"""The stream of server-sent events that the page reads: a message a second, the same for all viewers."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import msgspec
from klein import Response
from twisted.application.service import Service
from twisted.internet.defer import Deferred, ensureDeferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET

from webhookd.http import Rejection, WebhookRequest
from webhookd.ops.status.sampler import Point, Sampler

INTERVAL_S = 1.0
MAX_VIEWERS = 20

_ENDING = Rejection(503, "ending", "this replica ends")
_TOO_MANY = Rejection(503, "too_many_viewers", "too many look at this page already")

_log = Logger()


class StatusFeed(Service):
    """Samples once a second, and sends what it found to all viewers.

    ``look_at_queues`` is asked for while there is a viewer, and nobody waits for it. A viewer that does not
    read what it gets is dropped: its browser comes back and gets the history again.
    """

    def __init__(
        self,
        clock: IReactorTime,
        sampler: Sampler,
        look_at_queues: Callable[[], Coroutine[Any, Any, None]],
    ) -> None:
        self._sampler = sampler
        self._look_at_queues = look_at_queues
        self._viewers: set[WebhookRequest] = set()
        self._loop = LoopingCall(self._tick)
        self._loop.clock = clock

    def startService(self) -> None:
        """Begin to sample."""
        super().startService()
        self._loop.start(INTERVAL_S)

    def stopService(self) -> None:
        """End all streams, so that their connections can close."""
        super().stopService()
        self._loop.stop()
        for viewer in tuple(self._viewers):
            if viewer.channel.is_blocked:
                viewer.channel.abort()
            else:
                viewer.finish()

    def watch(self, request: WebhookRequest) -> None:
        """Answer with the stream: the history at once, and from then on what is new."""
        if not self.running or len(self._viewers) >= MAX_VIEWERS:
            request.respond((_TOO_MANY if self.running else _ENDING).response())
            return
        request.keep_alive = False  # nothing comes after a stream
        request.setHeader(b"Content-Type", b"text/event-stream")
        request.setHeader(b"Cache-Control", b"no-store")
        request.setHeader(b"X-Content-Type-Options", b"nosniff")
        request.setHeader(b"X-Accel-Buffering", b"no")  # nginx, where somebody puts one in front
        self._viewers.add(request)
        request.notifyFinish().addBoth(lambda _: self._viewers.discard(request))
        request.write(self._message(self._sampler.points))
        self._refresh_queues()

    def _tick(self) -> Deferred[None]:
        return ensureDeferred(self._sample()).addErrback(_log_defect)

    async def _sample(self) -> None:
        if self._viewers:
            self._refresh_queues()
        await self._sampler.sample()
        if self._viewers:
            self._publish(self._message(self._sampler.points[-1:]))

    def _refresh_queues(self) -> None:
        ensureDeferred(self._look_at_queues()).addErrback(_log_defect)

    def _publish(self, message: bytes) -> None:
        for viewer in tuple(self._viewers):
            if viewer.channel.is_blocked:
                viewer.channel.abort()
            else:
                viewer.write(message)

    def _message(self, points: Sequence[Point]) -> bytes:
        return b"data: %b\n\n" % msgspec.json.encode({"now": self._sampler.state, "points": points})


class StatusEvents(Resource):
    """The feed as a resource."""

    isLeaf = True

    def __init__(self, feed: StatusFeed) -> None:
        super().__init__()
        self._feed = feed

    def render_GET(self, request: WebhookRequest) -> int:
        """The stream."""
        self._feed.watch(request)
        return NOT_DONE_YET

    def render_HEAD(self, request: WebhookRequest) -> int:
        """What the stream would be, for which nobody has to wait."""
        request.respond(Response(200, {b"Content-Type": b"text/event-stream"}))
        return NOT_DONE_YET


def _log_defect(failure: Failure) -> None:
    _log.failure("the status page cannot be told", failure)

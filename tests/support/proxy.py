"""A TCP proxy with faults, to stand between two programs that the tests start.

    with Proxy(redis.port) as proxy:
        daemon = start_daemon("--redis", f"redis://127.0.0.1:{proxy.port}")
        with proxy.faulty(reply_latency_s=0.2):
            ...

It turns in a thread of its own, and a call that changes it returns once the change holds.
"""

from __future__ import annotations

import selectors
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread
from types import TracebackType
from typing import Self

from attrs import define, field, frozen

from .process import ReservedPort

_LOOPBACK = "127.0.0.1"
_CHUNK_BYTES = 65_536
_SLICE_GAP_S = 0.0005
_CONNECT_DEADLINE_S = 1.0
_CALL_DEADLINE_S = 10.0
_RESET = struct.pack("ii", 1, 0)


@frozen
class Faults:
    """What is wrong with the way between client and server; by default nothing is.

    C{reply_latency_s} holds back each piece of a reply; many may be on their way at once, as on a long line.
    C{slice_bytes} cuts replies into pieces that small, which arrive one by one. A C{black_hole} lets nothing
    through either way, not even an end, and the clients still get a connection; what was sent into it comes
    out once it is healed, as TCP's repeats would. C{drops_replies} throws away what the server says;
    C{resets_on_reply} in addition resets the connection, so that a client cannot know what became of its
    request. C{refuses} lets no new connection in.
    """

    reply_latency_s: float = 0.0
    slice_bytes: int = _CHUNK_BYTES
    black_hole: bool = False
    drops_replies: bool = False
    resets_on_reply: bool = False
    refuses: bool = False


@define(eq=False)
class _Direction:
    """The bytes on their way from one socket to the other, and when each piece may arrive."""

    source: socket.socket
    sink: socket.socket
    is_reply: bool
    pieces: deque[tuple[float, bytes]] = field(factory=deque)
    source_ended: bool = False
    sink_ended: bool = False

    def receive(self, now_s: float, faults: Faults) -> bool:
        """Read what there is; whether the connection must be reset."""
        data = self.source.recv(_CHUNK_BYTES)
        if not data:
            self.source_ended = True
        elif not self.is_reply:
            self.pieces.append((now_s, data))
        elif faults.resets_on_reply:
            return True
        elif not faults.drops_replies:
            self._cut(data, now_s + faults.reply_latency_s, faults.slice_bytes)
        return False

    def _cut(self, data: bytes, due_s: float, size_bytes: int) -> None:
        due_s = max([due_s, *(last_s for last_s, _ in list(self.pieces)[-1:])])
        for start in range(0, len(data), size_bytes):
            self.pieces.append((due_s, data[start : start + size_bytes]))
            due_s += _SLICE_GAP_S

    def send(self, now_s: float) -> None:
        """Write the pieces that are due, and the end after the last one."""
        while self.pieces and self.pieces[0][0] <= now_s:
            due_s, data = self.pieces.popleft()
            try:
                sent = self.sink.send(data)
            except BlockingIOError:
                sent = 0
            if sent < len(data):
                self.pieces.appendleft((due_s, data[sent:]))
                return
        if self.source_ended and not self.pieces and not self.sink_ended:
            self.sink_ended = True
            self.sink.shutdown(socket.SHUT_WR)

    def next_due_s(self) -> float | None:
        return self.pieces[0][0] if self.pieces else None


@define(eq=False)
class _Link:
    """One client's connection, and the one to the server that belongs to it."""

    client: socket.socket
    server: socket.socket
    directions: tuple[_Direction, _Direction] = field(init=False)

    @directions.default
    def _both_ways(self) -> tuple[_Direction, _Direction]:
        return (
            _Direction(self.client, self.server, is_reply=False),
            _Direction(self.server, self.client, is_reply=True),
        )

    @property
    def has_ended(self) -> bool:
        return all(direction.sink_ended for direction in self.directions)

    def close(self, *, reset: bool) -> None:
        for side in self.client, self.server:
            if reset:
                side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            side.close()


class Proxy:
    """Forwards L{port} on loopback to C{target_port} there, with the L{Faults} of the moment."""

    def __init__(self, target_port: int) -> None:
        self._target = (_LOOPBACK, target_port)
        self._reserved = ReservedPort()
        self.port = self._reserved.number
        self._faults = Faults()
        self._links: list[_Link] = []
        self._listener: socket.socket | None = None
        self._selector = selectors.DefaultSelector()
        self._calls: deque[tuple[Callable[[], None], Event]] = deque()
        self._alarm, self._alarm_bell = socket.socketpair()
        self._is_closing = False
        self._thread = Thread(target=self._turn, name="proxy", daemon=True)

    def become(self, faults: Faults) -> None:
        """Have these faults, and no others, from now on."""
        self._call(lambda: self._set(faults))

    def heal(self) -> None:
        """Have no faults from now on."""
        self.become(Faults())

    @contextmanager
    def faulty(self, **faults: float) -> Iterator[None]:
        """Have these L{Faults} for a while."""
        self.become(Faults(**faults))
        try:
            yield
        finally:
            self.heal()

    def reset_all(self) -> None:
        """Reset the connections that there are, as a server's crash would."""
        self._call(lambda: [self._drop(link, reset=True) for link in tuple(self._links)])

    @property
    def connection_count(self) -> int:
        """How many clients are connected."""
        return len(self._links)

    def __enter__(self) -> Self:
        self._alarm_bell.setblocking(False)
        self._selector.register(self._alarm_bell, selectors.EVENT_READ)
        self._thread.start()
        self.heal()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._call(self._end)
        self._thread.join()
        for resource in self._alarm, self._alarm_bell, self._selector, self._reserved:
            resource.close()

    # Everything from here on but _call runs in the proxy's own thread.

    def _call(self, function: Callable[[], object]) -> None:
        done = Event()
        self._calls.append((lambda: void(function()), done))
        self._alarm.send(b"!")
        if not done.wait(_CALL_DEADLINE_S):
            raise TimeoutError("the proxy's thread does not answer")

    def _turn(self) -> None:
        while not self._is_closing:
            for key, events in self._selector.select(self._pause_s()):
                if key.fileobj is self._alarm_bell:
                    self._alarm_bell.recv(_CHUNK_BYTES)
                elif key.fileobj is self._listener:
                    self._accept(self._listener)
                elif events & selectors.EVENT_READ:
                    self._receive(*key.data)
            while self._calls:
                function, done = self._calls.popleft()
                function()
                done.set()
            for link in tuple(self._links):
                self._forward(link)

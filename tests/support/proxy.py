"""A TCP proxy with faults, for the tests to put between two programs.

    with Proxy(redis.port) as proxy:
        daemon = start_daemon("--redis", f"redis://127.0.0.1:{proxy.port}")
        with proxy.faulty(reply_latency_s=0.2):
            ...

It runs in its own thread. A call that changes it returns when the change is effective.
"""

from __future__ import annotations

import math
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any, Self

from attrs import define, field, frozen

from .process import ReservedPort, Resource

_LOOPBACK = "127.0.0.1"
_CHUNK_BYTES = 65_536
_MAX_HELD_BYTES = 4_194_304
_SLICE_GAP_S = 0.0005
_CONNECT_DEADLINE_S = 1.0
_CALL_DEADLINE_S = 60.0
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


@frozen
class Faults:
    """The faults between client and server. The default is none.

    ``reply_latency_s`` delays each piece of a reply. Several can be under way at once, as on a long line.
    ``slice_bytes`` is the largest piece of a reply: the pieces arrive one by one. A ``black_hole`` accepts
    connections, and lets nothing through in either direction, not even their end. When it is healed, it lets
    through what it has held, as TCP's retransmissions do. ``drops_replies`` discards what the server sends.
    ``resets_on_reply`` resets the connection instead, so that a client does not know the outcome of its
    request. ``refuses`` accepts no new connection.
    """

    reply_latency_s: float = 0.0
    slice_bytes: int = _CHUNK_BYTES
    black_hole: bool = False
    drops_replies: bool = False
    resets_on_reply: bool = False
    refuses: bool = False


class _MustReset(Exception):
    """The faults demand that the connection ends."""


@define(eq=False)
class _Direction:
    """The bytes on their way from one socket to the other, and the earliest arrival of each piece."""

    source: socket.socket
    sink: socket.socket
    is_reply: bool
    pieces: deque[tuple[float, bytes]] = field(factory=deque)
    held_bytes: int = 0
    source_has_ended: bool = False
    sink_has_ended: bool = False

    @property
    def wants_to_receive(self) -> bool:
        return not self.source_has_ended and self.held_bytes < _MAX_HELD_BYTES

    def next_piece_s(self) -> float:
        """Return when the next piece is due, or infinity."""
        return self.pieces[0][0] if self.pieces else math.inf

    def receive(self, now_s: float, faults: Faults) -> None:
        try:
            data = self.source.recv(_CHUNK_BYTES)
        except BlockingIOError:
            return  # the socket was ready for the other direction's bytes
        if not data:
            self.source_has_ended = True
            self._pass_the_end_on()
        elif not self.is_reply:
            self._hold(data, now_s)
        elif faults.resets_on_reply:
            raise _MustReset
        elif not faults.drops_replies:
            self._hold_slices(data, now_s + faults.reply_latency_s, faults.slice_bytes)

    def _hold_slices(self, data: bytes, due_s: float, slice_bytes: int) -> None:
        if self.pieces:
            due_s = max(due_s, self.pieces[-1][0])  # nothing overtakes
        for start in range(0, len(data), slice_bytes):
            self._hold(data[start : start + slice_bytes], due_s)
            due_s += _SLICE_GAP_S

    def _hold(self, data: bytes, due_s: float) -> None:
        self.pieces.append((due_s, data))
        self.held_bytes += len(data)

    def send(self, now_s: float) -> None:
        """Send the pieces that are due, until the sink takes no more."""
        while self.next_piece_s() <= now_s:
            due_s, data = self.pieces.popleft()
            try:
                sent = self.sink.send(data)
            except BlockingIOError:
                sent = 0
            self.held_bytes -= sent
            if sent < len(data):
                self.pieces.appendleft((due_s, data[sent:]))
                return
        self._pass_the_end_on()

    def _pass_the_end_on(self) -> None:
        if self.source_has_ended and not self.pieces and not self.sink_has_ended:
            self.sink_has_ended = True
            self.sink.shutdown(socket.SHUT_WR)


@define(eq=False)
class _Link:
    """A client's connection to the proxy, and the proxy's connection to the server for it."""

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
        return all(direction.sink_has_ended for direction in self.directions)

    def close(self) -> None:
        for side in self.client, self.server:
            side.close()

    def reset(self) -> None:
        for side in self.client, self.server:
            side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            side.close()


class Proxy(Resource):
    """A proxy that forwards `port` on loopback to ``target_port``, with the current `Faults`."""

    def __init__(self, target_port: int) -> None:
        self._target = (_LOOPBACK, target_port)
        self._reserved = ReservedPort()
        self.port = self._reserved.number
        self._faults = Faults()
        self._links: list[_Link] = []
        self._listener: socket.socket | None = None
        self._calls: deque[tuple[Callable[[], None], Event]] = deque()
        self._bell, self._ringer = socket.socketpair()
        self._is_closing = False
        self._thread = Thread(target=self._run, name="proxy", daemon=True)

    def become(self, faults: Faults) -> None:
        """Replace the faults."""
        self._call(lambda: self._set_faults(faults))

    def heal(self) -> None:
        """Remove all faults."""
        self.become(Faults())

    @contextmanager
    def faulty(self, **faults: Any) -> Iterator[None]:
        """Have these `Faults` while the block runs."""
        self.become(Faults(**faults))
        try:
            yield
        finally:
            self.heal()

    def reset_all(self) -> None:
        """Reset all connections, as the crash of a server does."""
        self._call(self._reset_links)

    @property
    def connection_count(self) -> int:
        """The number of clients that are connected."""
        return len(self._links)

    def start(self) -> Self:
        self._thread.start()
        self.heal()
        return self

    def close(self) -> None:
        self._call(self._end)
        self._thread.join()
        for resource in self._reserved, self._bell, self._ringer:
            resource.close()

    def _call(self, function: Callable[[], None]) -> None:
        """Run a function in the proxy's thread, and wait for its end."""
        done = Event()
        self._calls.append((function, done))
        self._ringer.send(b"!")
        if not done.wait(_CALL_DEADLINE_S):
            raise TimeoutError("the proxy's thread has died")

    def _set_faults(self, faults: Faults) -> None:
        self._faults = faults
        if faults.refuses:
            self._close_listener()
        elif self._listener is None:
            self._listener = socket.create_server((_LOOPBACK, self.port), backlog=1024)

    def _close_listener(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def _reset_links(self) -> None:
        for link in self._links:
            link.reset()
        self._links.clear()

    def _end(self) -> None:
        self._is_closing = True
        self._close_listener()
        self._reset_links()

    def _run(self) -> None:
        while not self._is_closing:
            ready = self._wait()
            if self._bell.fileno() in ready:
                self._answer_calls()
            if self._listener is not None and self._listener.fileno() in ready:
                self._accept(self._listener)
            if not self._faults.black_hole:
                for link in tuple(self._links):
                    self._forward(link, ready)

    def _wait(self) -> set[int]:
        """Sleep until there is something to do, and return the sockets that are ready."""
        poll = select.poll()
        poll.register(self._bell, select.POLLIN)
        if self._listener is not None:
            poll.register(self._listener, select.POLLIN)
        pause_s = math.inf
        if not self._faults.black_hole:
            now_s = time.monotonic()
            for socket_, events in self._interests(now_s).items():
                poll.register(socket_, events)
            pause_s = min(self._pauses_s(now_s), default=math.inf)
        timeout_ms = None if pause_s == math.inf else math.ceil(1000 * pause_s)
        return {descriptor for descriptor, _ in poll.poll(timeout_ms)}

    def _interests(self, now_s: float) -> dict[socket.socket, int]:
        interests: dict[socket.socket, int] = {}
        for direction in self._directions():
            if direction.wants_to_receive:
                interests[direction.source] = interests.get(direction.source, 0) | select.POLLIN
            if direction.next_piece_s() <= now_s:
                interests[direction.sink] = interests.get(direction.sink, 0) | select.POLLOUT
        return interests

    def _pauses_s(self, now_s: float) -> Iterator[float]:
        """Yield the remaining delay of each first piece that is not due."""
        for direction in self._directions():
            if direction.next_piece_s() > now_s:
                yield direction.next_piece_s() - now_s

    def _directions(self) -> Iterator[_Direction]:
        for link in self._links:
            yield from link.directions

    def _answer_calls(self) -> None:
        self._bell.recv(_CHUNK_BYTES)
        while self._calls:
            function, done = self._calls.popleft()
            function()
            done.set()

    def _accept(self, listener: socket.socket) -> None:
        client, _ = listener.accept()
        try:
            server = socket.create_connection(self._target, timeout=_CONNECT_DEADLINE_S)
        except OSError:
            client.close()
            return
        for side in client, server:
            side.setblocking(False)
            side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._links.append(_Link(client, server))

    def _forward(self, link: _Link, ready: set[int]) -> None:
        try:
            for direction in link.directions:
                if direction.source.fileno() in ready and direction.wants_to_receive:
                    direction.receive(time.monotonic(), self._faults)
                direction.send(time.monotonic())
        except (OSError, _MustReset):
            self._links.remove(link)
            link.reset()
            return
        if link.has_ended:
            self._links.remove(link)
            link.close()

"""A TCP proxy with faults, for the tests to put between two programs.

    with Proxy(redis.port) as proxy:
        daemon = start_daemon("--redis", f"redis://127.0.0.1:{proxy.port}")
        with proxy.faulty(reply_latency_s=0.2):
            ...

It runs in its own thread. A call that changes it returns when the change is effective.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any, Self

from attrs import frozen

from .process import ReservedPort, Resource

_LOOPBACK = "127.0.0.1"
_CHUNK_BYTES = 65_536
_SLICE_GAP_S = 0.0005
_CALL_DEADLINE_S = 60.0
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)

_Pieces = asyncio.Queue[tuple[float, bytes]]


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


class Proxy(Resource):
    """A proxy that forwards `port` on loopback to ``target_port``, with the current `Faults`."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._reserved = ReservedPort()
        self.port = self._reserved.number
        self._faults = Faults()
        self._is_open = asyncio.Event()
        self._links: dict[asyncio.Task[None], list[asyncio.StreamWriter]] = {}
        self._server: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    def start(self) -> Self:
        self._thread.start()
        self.heal()
        return self

    def close(self) -> None:
        self.become(Faults(refuses=True))
        self.reset_all()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._reserved.close()

    def become(self, faults: Faults) -> None:
        """Replace the faults."""
        self._call(self._set_faults(faults))

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
        self._call(self._reset_links())

    @property
    def connection_count(self) -> int:
        """The number of clients that are connected."""
        return len(self._links)

    def _call(self, change: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine in the proxy's thread, and wait for its end."""
        asyncio.run_coroutine_threadsafe(change, self._loop).result(_CALL_DEADLINE_S)

    async def _set_faults(self, faults: Faults) -> None:
        self._faults = faults
        if faults.black_hole:
            self._is_open.clear()
        else:
            self._is_open.set()
        if faults.refuses and self._server is not None:
            self._server.close()
            self._server = None
        elif not faults.refuses and self._server is None:
            self._server = await asyncio.start_server(self._serve, _LOOPBACK, self.port, backlog=1024)

    async def _reset_links(self) -> None:
        links = list(self._links)
        for link in links:
            link.cancel()
        await asyncio.gather(*links, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Forward one connection in both directions, until both end or one is reset."""
        link = asyncio.current_task()
        assert link is not None
        writers = self._links[link] = [writer]
        has_ended = False
        try:
            server_reader, server_writer = await asyncio.open_connection(_LOOPBACK, self._target_port)
            writers.append(server_writer)
            requests: _Pieces = asyncio.Queue()
            replies: _Pieces = asyncio.Queue()
            async with asyncio.TaskGroup() as directions:
                directions.create_task(self._receive(reader, requests, is_reply=False))
                directions.create_task(self._send(requests, server_writer))
                directions.create_task(self._receive(server_reader, replies, is_reply=True))
                directions.create_task(self._send(replies, writer))
            has_ended = True
        except* OSError:
            pass
        finally:
            del self._links[link]
            for side in writers:
                if has_ended:
                    side.close()
                else:
                    _reset(side)

    async def _receive(self, reader: asyncio.StreamReader, pieces: _Pieces, *, is_reply: bool) -> None:
        """Take what one side sends, and cut it into pieces with the earliest time to send them on."""
        due_s = 0.0
        is_over = False
        while not is_over:
            data = await reader.read(_CHUNK_BYTES)
            is_over = not data
            await self._is_open.wait()
            faults = self._faults if is_reply else Faults()
            if data and faults.resets_on_reply:
                raise ConnectionResetError
            if data and faults.drops_replies:
                continue
            due_s = max(due_s, self._loop.time() + faults.reply_latency_s)
            for start in range(0, len(data) or 1, faults.slice_bytes):
                pieces.put_nowait((due_s, data[start : start + faults.slice_bytes]))
                due_s += _SLICE_GAP_S

    async def _send(self, pieces: _Pieces, writer: asyncio.StreamWriter) -> None:
        """Send each piece when it is due, until an empty one, which is the end."""
        while True:
            due_s, data = await pieces.get()
            if (pause_s := due_s - self._loop.time()) > 0:
                await asyncio.sleep(pause_s)
            await self._is_open.wait()
            if not data:
                writer.write_eof()
                return
            writer.write(data)
            await writer.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    if not writer.is_closing():
        connection = writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        writer.transport.abort()

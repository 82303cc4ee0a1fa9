"""One connection of an attacker: sends any bytes, and reads until the end."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Sequence

from attrs import frozen

from tests.support.http import Response

_DEADLINE_S = 20.0
_READ_BYTES = 65_536


@frozen
class Exchange:
    """The answers, and the bytes after the last of them, which are not an answer."""

    answers: Sequence[Response]
    rest: bytes

    @property
    def statuses(self) -> list[int]:
        """The status of each final answer."""
        return [answer.status for answer in self.answers if answer.status >= 200]


class NoEnd(Exception):
    """The other side did not close the connection in time."""


def exchange(
    port: int, data: bytes, *, stays_open: bool = False, from_address: str = "127.0.0.1"
) -> Exchange:
    """Send bytes, and read to the end; if the request ``stays_open``, hang up after it."""
    received = bytearray()
    with socket.create_connection(("127.0.0.1", port), _DEADLINE_S, (from_address, 0)) as connection:
        connection.setblocking(False)
        end_s = time.monotonic() + _DEADLINE_S
        to_send = memoryview(data)
        poll = select.poll()
        while True:
            poll.register(connection, select.POLLIN | (select.POLLOUT if to_send else 0))
            events = sum(events for _, events in poll.poll(1000))
            readable = events & ~select.POLLOUT
            try:
                if events & select.POLLOUT:
                    to_send = to_send[connection.send(to_send) :]
                    if not to_send and stays_open:
                        connection.shutdown(socket.SHUT_WR)
                if readable:
                    piece = connection.recv(_READ_BYTES)
                    if not piece:
                        return _parse(bytes(received))
                    received += piece
            except (BrokenPipeError, ConnectionResetError):
                to_send = memoryview(b"")  # refused before all was sent; the answer may have arrived already
                if not readable or not _read_rest(connection, received):
                    return _parse(bytes(received))
            if time.monotonic() > end_s:
                raise NoEnd(f"{len(received)} bytes came: {bytes(received[-200:])!r}")


def _read_rest(connection: socket.socket, received: bytearray) -> bool:
    """Read after a write has failed; return True if there was something."""
    try:
        piece = connection.recv(_READ_BYTES)
    except OSError:
        return False
    received += piece
    return bool(piece)


def _parse(data: bytes) -> Exchange:
    answers = []
    while data.startswith(b"HTTP/1.1 "):
        head, blank_line, rest = data.partition(b"\r\n\r\n")
        if not blank_line:
            break
        status_line, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        size = int(headers.get("content-length", "0"))
        if len(rest) < size:
            break
        answers.append(Response(int(status_line.split(" ")[1]), headers, rest[:size]))
        data = rest[size:]
    return Exchange(answers, data)

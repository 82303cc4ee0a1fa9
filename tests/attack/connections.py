"""Hostile connections that stay open and do little, while honest senders continue."""

from __future__ import annotations

import resource
import select
import socket
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from threading import Event, Thread

from attrs import define, field

from tests.support.daemon import Daemon
from tests.support.process import find_tool
from webhookd.http.channel import BODY_DEADLINE_S, HEAD_DEADLINE_S, LINGER_S, WRITE_DEADLINE_S

from .bodies import MAX_BODY_BYTES, padded
from .framing import head, message, post
from .target import Tally, Target
from .wire import exchange

#: The latest deadline, plus time for sweeps and a busy machine.
ALL_CLOSED_AFTER_S = HEAD_DEADLINE_S + max(BODY_DEADLINE_S, WRITE_DEADLINE_S) + LINGER_S + 10.0
P95_S = 0.050
_HONEST_RATE = 50.0
_SLOW_BYTE_S = 1.0
_SMALL_BUFFER_BYTES = 4096


@define(eq=False)
class _Hostile:
    """One connection: sends one byte at a time; or all it can, without reading an answer."""

    kind: str
    connection: socket.socket
    slow: memoryview
    reads: bool = True
    received: bytearray = field(factory=bytearray)

    def send_some(self) -> None:
        if self.slow:
            with suppress(OSError):
                self.slow = self.slow[self.connection.send(self.slow[:1] if self.reads else self.slow) :]

    def is_over(self, events: int) -> bool:
        """Read what is available; return True if the connection has ended."""
        if events & (select.EPOLLHUP | select.EPOLLERR):
            return True
        if not self.reads:
            return False
        try:
            piece = self.connection.recv(65_536)
        except BlockingIOError:
            return False
        except OSError:
            return True
        self.received += piece
        return not piece


def _idle(_number: int) -> tuple[bytes, bytes]:
    return b"", b""


def _slow_head(number: int) -> tuple[bytes, bytes]:
    return b"", post(10_000 + number)


def _slow_body(number: int) -> tuple[bytes, bytes]:
    return head(b"Content-Length: 1000"), message(20_000 + number)


def _slow_chunks(number: int) -> tuple[bytes, bytes]:
    return head(b"Transfer-Encoding: chunked"), b"1;" + b"x" * 1000


def _slow_reader(_number: int) -> tuple[bytes, bytes]:
    """Return requests whose answers fill all buffers; each is so large that one read never has too many."""
    return b"", head(b"X: " + b"x" * 2048, start=b"GET /nobody HTTP/1.1") * 24_000


KINDS: Mapping[str, Callable[[int], tuple[bytes, bytes]]] = {
    "idle": _idle,
    "slow head": _slow_head,
    "slow body": _slow_body,
    "slow chunks": _slow_chunks,
    "slow reader": _slow_reader,
}


class Crowd(Thread):
    """Many hostile connections at once; ``open`` holds those that the daemon has not closed yet."""

    def __init__(self, port: int, counts: Mapping[str, int]) -> None:
        super().__init__(daemon=True)
        self.open: dict[int, _Hostile] = {}
        self.answers: Counter[str] = Counter()
        self.are_connected = Event()
        self._port = port
        self._counts = counts
        self._stopped = Event()
        self._poll = select.epoll()

    def run(self) -> None:
        for kind, count in self._counts.items():
            for number in range(count):
                self._connect(kind, number)
        self.are_connected.set()
        next_byte_s = 0.0
        while self.open and not self._stopped.is_set():
            is_time = time.monotonic() >= next_byte_s
            if is_time:
                next_byte_s = time.monotonic() + _SLOW_BYTE_S
            for hostile in self.open.values():
                if is_time or not hostile.reads:
                    hostile.send_some()
            self._look(0.05)

    def stop(self) -> None:
        """Close the connections that are still open."""
        self._stopped.set()
        self.join()
        for hostile in self.open.values():
            hostile.connection.close()
        self._poll.close()

    def counts(self) -> Counter[str]:
        """Return the number of open connections of each kind."""
        return Counter(hostile.kind for hostile in tuple(self.open.values()))

    def _connect(self, kind: str, number: int) -> None:
        connection = socket.socket()
        if kind == "slow reader":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SMALL_BUFFER_BYTES)
        connection.settimeout(10.0)
        connection.connect(("127.0.0.1", self._port))
        connection.setblocking(False)
        at_once, slow = KINDS[kind](number)
        if at_once:
            connection.send(at_once)
        self.open[connection.fileno()] = _Hostile(kind, connection, memoryview(slow), kind != "slow reader")
        self._poll.register(connection, select.EPOLLIN if kind != "slow reader" else 0)

    def _look(self, timeout_s: float) -> None:
        for descriptor, events in self._poll.poll(timeout_s):
            hostile = self.open[descriptor]
            if hostile.is_over(events):
                status = bytes(hostile.received[9:12]).decode() or "closed"
                self.answers[f"{hostile.kind}: {status}"] += 1
                self._poll.unregister(hostile.connection)
                hostile.connection.close()
                del self.open[descriptor]


class Honest(Thread):
    """Sends plain messages all the time, and measures the time of each."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.took_s: list[float] = []
        self.bad: Counter[str] = Counter()
        self._port = port
        self._stopped = Event()

    def run(self) -> None:
        number = 1_000_000
        data = b""
        while not self._stopped.wait(1 / _HONEST_RATE):
            number += 1
            data = post(number, b"Connection: close")
            start_s = time.monotonic()
            try:
                statuses = exchange(self._port, data).statuses
            except OSError as error:
                statuses = [error.errno or 0]
            self.took_s.append(time.monotonic() - start_s)
            if statuses != [202]:
                self.bad[str(statuses)] += 1

    def stop(self) -> None:
        """Stop, and wait for the last answer."""
        self._stopped.set()
        self.join()

    @property
    def p95_s(self) -> float:
        """The 95th percentile of all answers so far."""
        return statistics.quantiles(self.took_s, n=20)[-1] if len(self.took_s) > 1 else 0.0


def resident_bytes(pid: int) -> int:
    """Return the memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise ProcessLookupError(pid)


def descriptors(pid: int) -> int:
    """Return the number of descriptors of a process."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


class CrampedDaemon(Daemon):
    """A daemon with a low limit of descriptors."""

    max_connections = 150

    def argv(self) -> Sequence[str]:
        prlimit = find_tool("prlimit", "it is in Debian's package util-linux")
        return [prlimit, f"--nofile={2 * self.max_connections}", "--", *super().argv()]


def raise_own_limit() -> None:
    """Raise our own limit: the attacker needs as many descriptors as the daemon."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def attack_connections(target: Target, counts: Mapping[str, int], *, p95_s: float | None) -> Tally:
    """Open many hostile connections: all must be closed in time, and honest senders must not notice them."""
    tally = Tally(f"connections: {sum(counts.values()):,}")
    raise_own_limit()
    before = descriptors(target.daemon.pid)
    with ExitStack() as stack:
        crowd = Crowd(target.port, counts)
        crowd.start()
        stack.callback(crowd.stop)
        crowd.are_connected.wait()
        start_s = time.monotonic()
        honest = Honest(target.port)
        honest.start()
        stack.callback(honest.stop)
        memory = 0
        while crowd.open and time.monotonic() - start_s < ALL_CLOSED_AFTER_S:
            time.sleep(0.2)
            memory = max(memory, resident_bytes(target.daemon.pid))
        closed_s = time.monotonic() - start_s
        honest.stop()
        tally.tried = sum(counts.values())
        tally.refused = tally.tried - len(crowd.open)
        tally.expect("all", "still open in the end", dict(crowd.counts()), {})
        tally.expect("honest traffic", "answers other than 202", dict(honest.bad), {})
        if p95_s is not None and honest.p95_s > p95_s:
            tally.problems.append(f"p95 of honest traffic is {1000 * honest.p95_s:.1f} ms")
        tally.notes += [
            f"all closed after {closed_s:.0f} s, the daemon at {memory >> 20} MiB",
            f"p95 of {len(honest.took_s)} honest requests: {1000 * honest.p95_s:.1f} ms",
            ", ".join(f"{count} {what}" for what, count in sorted(crowd.answers.items())),
        ]
    target.client.flushall()
    left = descriptors(target.daemon.pid) - before
    if left > 2:
        tally.problems.append(f"{left} descriptors are still open")
    tally.problems += target.problems()
    return tally


def attack_memory(target: Target, max_arriving_bytes: int) -> Tally:
    """Send large bodies that never end: their memory together has a limit."""
    tally = Tally("memory: large bodies that never end")
    before = resident_bytes(target.daemon.pid)
    statuses: Counter[str] = Counter()
    data = head(b"Content-Length: %d" % MAX_BODY_BYTES) + padded(MAX_BODY_BYTES)[:-1]
    with ExitStack() as stack:
        for _ in range(3 * max_arriving_bytes // MAX_BODY_BYTES):
            connection = stack.enter_context(
                socket.create_connection(("127.0.0.1", target.port), timeout=10.0)
            )
            connection.sendall(data)
            answer = exchange(target.port, post(1, b"Connection: close")).statuses
            statuses[f"honest {answer}"] += 1
            tally.tried += 1
            grown = resident_bytes(target.daemon.pid) - before
            if grown > 2 * max_arriving_bytes:
                tally.problems.append(f"the daemon has grown by {grown >> 20} MiB")
        tally.expect("honest traffic", "answers", set(statuses), {"honest [202]", "honest [200]"})
    tally.refused = tally.tried
    tally.notes.append(f"grew by {(resident_bytes(target.daemon.pid) - before) >> 20} MiB at most")
    target.client.flushall()
    tally.problems += target.problems()
    return tally


def attack_limit(target: Target, limit: int) -> Tally:
    """Open more connections than allowed: each further one gets 429 at once, and is closed."""
    tally = Tally("connections beyond the limit")
    with ExitStack() as stack:
        for _ in range(limit):
            stack.enter_context(socket.create_connection(("127.0.0.1", target.port), timeout=10.0))
        for number in range(20):
            exchanged = exchange(target.port, post(number, b"Connection: close"))
            tally.count(f"connection {limit + number}", exchanged.answers)
            tally.expect(f"connection {limit + number}", "answer", exchanged.statuses, [429])
    tally.expect("afterwards", "answer", exchange(target.port, post(1, b"Connection: close")).statuses, [202])
    target.client.flushall()
    tally.problems += target.problems()
    return tally

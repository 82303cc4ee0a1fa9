"""Constant load, from a separate process.

    python -m tests.faults.load NEW RATE PORT...               until SIGTERM; NEW is its ledger
    python -m tests.faults.load --repeat OLD NEW RATE PORT...  the unanswered events of OLD, once

The loop is open: requests are due on a schedule that does not wait for answers, and latency is counted from
when a request was due. About 12 % of the requests are natural duplicates: they repeat a recent event, on any
of the ports. A request without an answer is not repeated, because Chatwoot does not repeat it.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import json
import random
import signal
import time
from collections.abc import Iterator, Sequence
from itertools import count, cycle
from pathlib import Path
from typing import Any

from tests.support.http import request_bytes
from tests.support.webhooks import PATH

from .ledger import Ledger, event, read_ledger, unanswered

DUPLICATES = 0.12
LATEST_DUPLICATE_S = 1.5
SENDER_PATIENCE_S = 5.0
"""Seconds that Chatwoot waits for an answer."""

MAX_IDLE = 8
"""The largest number of connections to a port that are kept for the next requests."""

Due = tuple[float, int, int]
"""The time, the number of the event, and the port."""


def schedule(rate: float, first: int, ports: Sequence[int]) -> Iterator[Due]:
    """Yield events and their duplicates at regular times, without end."""
    chance = random.Random(first)
    numbers = count(first)
    targets = cycle(ports)
    again: list[tuple[float, int]] = []
    due_s = time.monotonic()
    while True:
        if again and again[0][0] <= due_s:
            yield due_s, heapq.heappop(again)[1], chance.choice(ports)
        else:
            number = next(numbers)
            yield due_s, number, next(targets)
            if chance.random() < DUPLICATES / (1 - DUPLICATES):
                heapq.heappush(again, (due_s + chance.uniform(0.01, LATEST_DUPLICATE_S), number))
        due_s += 1 / rate


def repetition(rate: float, numbers: Sequence[int], ports: Sequence[int]) -> Iterator[Due]:
    """Yield each event once."""
    start_s = time.monotonic()
    for place, (number, port) in enumerate(zip(numbers, cycle(ports), strict=False)):
        yield start_s + place / rate, number, port


class _Connection(asyncio.Protocol):
    """One connection, for one request at a time."""

    transport: asyncio.Transport
    is_closed = False
    _answer: asyncio.Future[tuple[int, bytes]] | None = None
    _received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def ask(self, request: bytes) -> asyncio.Future[tuple[int, bytes]]:
        self._answer = asyncio.get_running_loop().create_future()
        self._received = b""
        self.transport.write(request)
        return self._answer

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, blank, body = self._received.partition(b"\r\n\r\n")
        if not blank or self._answer is None:
            return
        fields = head.lower()
        length = int(fields.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        if len(body) >= length:
            if b"connection: close" in fields:
                self.transport.close()
                self.is_closed = True
            answer, self._answer = self._answer, None
            if not answer.done():
                answer.set_result((int(head[9:12]), body))

    def connection_lost(self, error: Exception | None) -> None:
        self.is_closed = True
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error or ConnectionResetError("closed"))


class Sender:
    """A sender of the requests that are due, which records each request and its answer."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._idle: dict[int, list[_Connection]] = {}
        self._under_way: set[asyncio.Task[None]] = set()

    async def run(self, plan: Iterator[Due], stop: asyncio.Event) -> None:
        """Send until the plan ends or is stopped, then wait for the last answers."""
        for due_s, number, port in plan:
            pause_s = due_s - time.monotonic()
            if pause_s > 0:
                await asyncio.sleep(pause_s)
            if stop.is_set():
                break
            task = asyncio.create_task(self._send(due_s, number, port))
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)
        await asyncio.gather(*self._under_way)

    async def _send(self, due_s: float, number: int, port: int) -> None:
        webhook = event(number)
        headers = {**webhook.headers, "Connection": "keep-alive"}
        request = request_bytes("POST", PATH, headers, webhook.body)
        serial = self._ledger.sends(number, port, due_s)
        connection: _Connection | None = None
        try:
            async with asyncio.timeout(SENDER_PATIENCE_S):
                connection = await self._connect(port)
                status, body = await connection.ask(request)
        except (OSError, TimeoutError) as error:
            if connection is not None:
                connection.transport.abort()
            self._ledger.answered(serial, 0, type(error).__name__)
            return
        self._ledger.answered(serial, status, _outcome(body))
        if connection.is_closed:
            return
        if len(self._idle[port]) < MAX_IDLE:
            self._idle[port].append(connection)
        else:
            connection.transport.close()

    async def _connect(self, port: int) -> _Connection:
        idle = self._idle.setdefault(port, [])
        while idle:
            connection = idle.pop()
            if not connection.is_closed:
                return connection
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(_Connection, "127.0.0.1", port)
        return connection


def _outcome(body: bytes) -> str:
    try:
        answer: dict[str, Any] = json.loads(body)
    except ValueError:
        return "no-json"  # of nginx
    return str(answer.get("status") or answer["error"]["code"])


async def _main(arguments: argparse.Namespace) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    path, rate, ports = arguments.ledger, arguments.rate, arguments.ports
    if arguments.repeat:
        plan = repetition(rate, unanswered(read_ledger(arguments.repeat)), ports)
    else:
        plan = schedule(rate, arguments.first, ports)
    with Ledger(path) as ledger:
        await Sender(ledger).run(plan, stop)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.load")
    parser.add_argument("--repeat", type=Path)
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("ledger", type=Path)
    parser.add_argument("rate", type=float)
    parser.add_argument("ports", type=int, nargs="+")
    return parser


if __name__ == "__main__":
    asyncio.run(_main(_parser().parse_args()))

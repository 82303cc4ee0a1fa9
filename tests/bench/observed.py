"""The cost of observation: counting events, frequent scrapes, and an open status page."""

from __future__ import annotations

import http.client
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from socket import SHUT_RDWR
from statistics import median
from tempfile import TemporaryDirectory
from threading import Event, Thread
from typing import Self

from tests.faults.builds import Build, Edit
from tests.support.process import Resource
from webhookd.bullmq.script import AddResult
from webhookd.histogram import BATCH_SIZES, DURATIONS_S, Histogram
from webhookd.model import Outcome

from .arrival import LATENCIES, latencies
from .comparison import COLUMNS, alone_us, medians, pooled, problems_of, rounds
from .figures import Figure, Section, number, share
from .load import Run, Shape, Wrk, close_loop, complaints, cpu_s, jobs_settled, open_loop
from .machine import Cores
from .servers import BenchRedis, Webhookd

_SCRAPES_PER_SECOND = 50
_SCRAPES_WITH_PAGE = 1 / 15
_PER_SECOND = 500
_WARM_S = 2
_BATCH = 16  # about the jobs of one call under load

UNCOUNTED = Build(
    "without counting",
    (
        Edit(
            "http/site.py",
            'state.requests[request.route, _METHODS.get(request.method, "other"), request.code] += 1',
            "pass",
        ),
        Edit(
            "http/site.py",
            "state.durations_s[request.route].observe(state.clock.seconds() - request.began_s)",
            "pass",
        ),
        Edit("web.py", "self.events[source, event, receipt.outcome] += 1", "pass"),
        Edit("redis/queue.py", "self.durations_s.observe(ended_s - began_s)", "pass"),
        Edit("redis/queue.py", "self.batch_sizes.observe(len(jobs))", "pass"),
        Edit(
            "redis/queue.py",
            "self.results.update(result for result in results if isinstance(result, AddResult))",
            "pass",
        ),
    ),
)
"""webhookd without the counters on the way of an accepted event."""


class _Observed(Webhookd):
    """A webhookd with metrics on `ops_port`."""

    def __init__(self, core: int, redis: BenchRedis) -> None:
        super().__init__(core, redis)
        self.ops_port = self.reserve_port()

    def argv(self) -> Sequence[str]:
        return [*super().argv(), "--ops-endpoint", f"tcp:{self.ops_port}:interface={self.host}"]


class _Scraper(Resource):
    """Fetches the metrics at a constant rate during the ``with`` block; ``seconds`` has the time of each."""

    def __init__(self, port: int, per_second: float) -> None:
        self.seconds: list[float] = []
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10.0)
        self._pause_s = 1 / per_second
        self._is_over = Event()
        self._thread = Thread(target=self._scrape)

    def _scrape(self) -> None:
        due_s = time.monotonic()
        while not self._is_over.wait(max(0.0, due_s - time.monotonic())):
            began_s = time.monotonic()
            self._connection.request("GET", "/metrics")
            answer = self._connection.getresponse()
            answer.read()
            assert answer.status == 200
            self.seconds.append(time.monotonic() - began_s)
            due_s += self._pause_s

    def start(self) -> Self:
        self._thread.start()
        return self

    def close(self) -> None:
        self._is_over.set()
        self._thread.join()
        self._connection.close()


@contextmanager
def _viewing(port: int) -> Iterator[None]:
    """Read the status page's stream during the ``with`` block, as a browser does."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10.0)
    connection.request("GET", "/status/events")
    connected = connection.sock
    stream = connection.getresponse()
    assert stream.status == 200

    def read() -> None:
        with suppress(http.client.HTTPException):  # we close the connection
            while stream.read1():
                pass

    thread = Thread(target=read)
    thread.start()
    try:
        yield
    finally:
        connected.shutdown(SHUT_RDWR)
        thread.join()


def counting(cores: Cores, *, pairs: int, count: int) -> Section:
    """Send the same requests to webhookd, and to one that does not count.

    Two processes of the same program differ by more than the measured cost, so there are several pairs.
    """
    runs = pooled([_counting_pair(cores, count) for _ in range(pairs)])
    of_cpu = share(
        [run.cpu_us_per_request for run in runs["counted"]],
        [run.cpu_us_per_request for run in runs["not counted"]],
    )
    alone_us = _counting_us()
    of_median = 100 * alone_us / median(run.cpu_us_per_request for run in runs["counted"])
    note = (
        f"Counting is {of_cpu.text(1)} % of the CPU by these runs: {pairs} pairs of servers, {count} rounds "
        f"each. In a separate loop it takes {number(alone_us, 2)} µs per event, {number(of_median, 1)} %."
    )
    header = ["", *(column.name for column in COLUMNS)]
    rows = [medians(name, each, COLUMNS) for name, each in runs.items()]
    measured = {Figure.COUNTING: of_cpu.median}
    return Section("Counting", note, header, rows, measured=measured, problems=problems_of(runs))


def _counting_us() -> float:
    """Return the microseconds of an event's counters alone, with the same objects and statements."""
    requests: Counter[tuple[str, str, int]] = Counter()
    events: Counter[tuple[str, str, str]] = Counter()
    results: Counter[AddResult] = Counter()
    durations_s = {"/webhook/chatwoot": Histogram(DURATIONS_S)}
    calls_s, batch_sizes = Histogram(DURATIONS_S), Histogram(BATCH_SIZES)
    batch = [AddResult.ADDED] * _BATCH

    def count_call() -> None:
        for _ in batch:
            requests["/webhook/chatwoot", "POST", 202] += 1
            durations_s["/webhook/chatwoot"].observe(0.002)
            events["chatwoot", "message_created", Outcome.QUEUED] += 1
        calls_s.observe(0.002)
        batch_sizes.observe(_BATCH)
        results.update(result for result in batch if isinstance(result, AddResult))

    return alone_us(count_call) / _BATCH


def _counting_pair(cores: Cores, count: int) -> Mapping[str, Sequence[Run]]:
    with ExitStack() as stack:
        wrk = Wrk(cores.load)
        redis = stack.enter_context(BenchRedis(cores.redis))
        directory = Path(stack.enter_context(TemporaryDirectory(prefix="webhookd-bench-")))
        servers = {
            "counted": stack.enter_context(Webhookd(cores.server, redis)),
            "not counted": stack.enter_context(_Uncounted(cores.server, redis, directory)),
        }
        for server in servers.values():
            close_loop(wrk, redis, [server], Shape(_WARM_S))

        def measure(name: str) -> Run:
            redis.empty()
            return close_loop(wrk, redis, [servers[name]], Shape(1))

        return rounds(count, list(servers), measure)


class _Uncounted(Webhookd):
    def __init__(self, core: int, redis: BenchRedis, directory: Path) -> None:
        super().__init__(core, redis)
        self._build = UNCOUNTED.make(directory)

    def environ(self) -> Mapping[str, str]:
        return {**super().environ(), **self._build}


def scraped(cores: Cores, *, duration_s: int) -> Section:
    """Run an open loop without observers, with a Prometheus and an open page, and with many scrapes."""
    rows, problems, p95_ms = [], [], []
    for name, per_second, is_viewed in (
        ("no observer", 0, False),
        ("status page, scraped every 15 s", _SCRAPES_WITH_PAGE, True),
        (f"{_SCRAPES_PER_SECOND} scrapes/s", _SCRAPES_PER_SECOND, False),
    ):
        with ExitStack() as stack:
            redis = stack.enter_context(BenchRedis(cores.redis))
            server = stack.enter_context(_Observed(cores.server, redis))
            close_loop(Wrk(cores.load), redis, [server], Shape(_WARM_S))
            redis.empty()
            scraper = stack.enter_context(_Scraper(server.ops_port, per_second)) if per_second else None
            if is_viewed:
                stack.enter_context(_viewing(server.ops_port))
            before_s = cpu_s(server.pid)
            answers = open_loop(cores.load, server.port, _PER_SECOND, duration_s)
            p95_ms.append(answers.p95_ms)
            busy = (cpu_s(server.pid) - before_s) / answers.duration_s
            with redis.client() as client:
                jobs = jobs_settled(client, [server])
        slowest_ms = 1000 * max(scraper.seconds) if scraper else 0.0
        done = len(scraper.seconds) / duration_s if scraper else 0.0
        rows.append(
            [
                name,
                *latencies(answers),
                f"{number(100 * busy, 1)} %",
                number(done, 0),
                number(slowest_ms, 0),
            ]
        )
        problems += [f"{name}: {problem}" for problem in complaints(answers, jobs, repeat=1, under_way=0)]
    return Section(
        title=f"Observed, at {_PER_SECOND} requests/s",
        note=f"An open loop for {duration_s} s, and at the same time clients of the ops endpoint.",
        header=["", *LATENCIES, "CPU", "scrapes/s", "slowest scrape ms"],
        rows=rows,
        measured={Figure.P95_SCRAPED: p95_ms[-1]},
        problems=problems,
    )

"""webhookd while Redis is down, and after a million requests."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack

from attrs import frozen

from .arrival import LATENCIES, latencies
from .bodies import first_id
from .figures import Figure, Section, number
from .load import Shape, Wrk, close_loop, complaints, cpu_s, jobs_settled, jobs_since, open_loop, rss_mb
from .machine import Cores
from .outputs import Answers
from .servers import BenchRedis, Webhookd

_PER_SECOND = 500
_WARM_S = 2


@frozen
class _Outage:
    """One way in which Redis goes down and comes back."""

    name: str
    begin: Callable[[BenchRedis], None]
    end: Callable[[BenchRedis], object]


_OUTAGES = (
    _Outage("SIGSTOP", BenchRedis.suspend, BenchRedis.resume),
    _Outage("killed", BenchRedis.kill, BenchRedis.start),
)


def spooling(cores: Cores, *, duration_s: int) -> Section:
    """Stop Redis just before the load begins, so that the figures include the requests that notice it."""
    rows, problems, p95 = [], [], []
    for outage in _OUTAGES:
        answers, jobs, drained_s, cpu_us = _spool_through(cores, outage, duration_s)
        p95.append(answers.p95_ms)
        rows.append(
            [
                outage.name,
                *latencies(answers),
                number(cpu_us, 0),
                number(jobs, 0),
                number(drained_s, 1),
            ]
        )
        problems += [f"{outage.name}: {each}" for each in complaints(answers, jobs, repeat=1, under_way=0)]
    return Section(
        title=f"Redis is down, at {_PER_SECOND} requests/s",
        note=f"An open loop for {duration_s} s that begins when Redis is down: everything goes to the spool, "
        "with an fsync before each answer. Then Redis comes back, and each answered event becomes one job "
        "in it. The last column is the time for that.",
        header=["Redis", *LATENCIES, "CPU µs per request", "jobs afterwards", "drained in s"],
        rows=rows,
        measured={Figure.P95_SPOOLING: max(p95)},
        problems=problems,
    )


def _spool_through(cores: Cores, outage: _Outage, duration_s: int) -> tuple[Answers, int, float, float]:
    """Return the answers, the jobs afterwards, the time of the drain, and CPU µs per request."""
    with ExitStack() as stack:
        redis = stack.enter_context(BenchRedis(cores.redis))
        server = stack.enter_context(Webhookd(cores.server, redis))
        close_loop(Wrk(cores.load), redis, [server], Shape(_WARM_S))
        redis.empty()
        outage.begin(redis)
        before, first = cpu_s(server.pid), first_id()
        answers = open_loop(cores.load, server.port, _PER_SECOND, duration_s)
        cpu_us = 1e6 * (cpu_s(server.pid) - before) / max(answers.ok, 1)
        began = time.monotonic()
        outage.end(redis)
        with redis.client() as client:
            jobs_settled(client, [server])
            # A Redis that lost everything gets the last jobs from before the outage again. They do not count.
            return answers, jobs_since(client, first), time.monotonic() - began, cpu_us


_FIRST = 100_000
_AT_ONCE_S = 5


def memory(cores: Cores, *, requests: int, deadline_s: float) -> Section:
    """Measure RSS during many requests; the queue is emptied from time to time, as workers would."""
    wrk = Wrk(cores.load)
    steps: list[tuple[int, float, float]] = []
    problems: list[str] = []
    sent = 0
    with BenchRedis(cores.redis) as redis, Webhookd(cores.server, redis) as server:
        end = time.monotonic() + deadline_s
        while sent < requests and time.monotonic() < end:
            redis.empty()
            run = close_loop(wrk, redis, [server], Shape(_AT_ONCE_S))
            sent += run.jobs
            problems += run.problems
            steps.append((sent, run.rss_mb, rss_mb(server.pid)))
    if sent < requests:
        problems.append(f"only {sent:,} of {requests:,} requests within {deadline_s:g} s")
    first = next((step for step in steps if step[0] >= _FIRST), steps[-1])
    shown = [first, *(steps[len(steps) * part // 4] for part in (1, 2, 3)), steps[-1]]
    return Section(
        title="Memory",
        note="One replica in a closed loop with 32 connections and bodies of 3 kB.",
        header=["requests so far", "RSS MB, highest of the run", "RSS MB after it"],
        rows=[[number(count, 0), number(high, 1), number(rss, 1)] for count, high, rss in sorted(set(shown))],
        measured={Figure.RSS_MILLION: steps[-1][1] / first[1]},
        problems=problems,
    )

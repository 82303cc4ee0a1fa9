"""webhookd, Express and Fastify in turn: the same requests into the same Redis."""

from __future__ import annotations

import timeit
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

from attrs import frozen

from .figures import Figure, Section, Spread, ratios
from .load import Run, Shape, Wrk, close_loop, hashes_of_jobs, jobs_waiting
from .machine import Cores
from .servers import BenchRedis, Peer, Server, Webhookd

WEBHOOKD, EXPRESS, FASTIFY = "webhookd", "express", "fastify"


@frozen
class Column:
    """One column of the table: its name, its source, and its significant decimals."""

    name: str
    of: Callable[[Run], float]
    digits: int = 0


COLUMNS = (
    Column("requests/s", lambda run: run.per_second),
    Column("CPU µs per request", lambda run: run.cpu_us_per_request),
    Column("p50 ms", lambda run: run.answers.p50_ms, 1),
    Column("p95 ms", lambda run: run.answers.p95_ms, 1),
    Column("p99 ms", lambda run: run.answers.p99_ms, 1),
    Column("RSS MB", lambda run: run.rss_mb),
    Column("Redis CPU µs per job", lambda run: run.redis_cpu_us_per_job, 1),
    Column("script calls per job", lambda run: run.calls_per_job, 3),
)


def rounds(count: int, names: Sequence[str], measure: Callable[[str], Run]) -> Mapping[str, Sequence[Run]]:
    """Measure each once per round; each round begins with another, so that none is always the first."""
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for number in range(count):
        turn = number % len(names)
        for name in [*names[turn:], *names[:turn]]:
            runs[name].append(measure(name))
    return runs


def pooled(groups: Sequence[Mapping[str, Sequence[Run]]]) -> Mapping[str, Sequence[Run]]:
    """Merge the runs of several groups of servers, by name."""
    return {name: [run for group in groups for run in group[name]] for name in groups[0]}


def alone_us(work: Callable[[], object]) -> float:
    """Return the microseconds of one call in a loop that does nothing else."""
    return 1e6 * min(timeit.repeat(work, number=1000, repeat=5)) / 1000


def problems_of(runs: Mapping[str, Sequence[Run]]) -> list[str]:
    """Return the problems of all runs, each with the name of its server."""
    return [f"{name}: {problem}" for name, each in runs.items() for run in each for problem in run.problems]


def medians(name: str, runs: Sequence[Run], columns: Sequence[Column]) -> list[str]:
    """Return a row of the table: medians, with the extremes."""
    return [name, *(Spread.of([column.of(run) for run in runs]).text(column.digits) for column in columns)]


def compare(cores: Cores, *, count: int, duration_s: int) -> list[Section]:
    """Compare the three servers: first as ratios, then with the figures."""
    wrk = Wrk(cores.load)
    with ExitStack() as stack:
        redis = stack.enter_context(BenchRedis(cores.redis))
        servers: dict[str, Server] = {
            WEBHOOKD: stack.enter_context(Webhookd(cores.server, redis)),
            EXPRESS: stack.enter_context(Peer(EXPRESS, cores.server, redis)),
            FASTIFY: stack.enter_context(Peer(FASTIFY, cores.server, redis)),
        }
        problems: list[str] = []

        def measure(name: str) -> Run:
            redis.empty()
            run = close_loop(wrk, redis, [servers[name]], Shape(duration_s))
            with redis.client() as client:
                waiting, hashes = jobs_waiting(client), hashes_of_jobs(client)
            if hashes != waiting:
                problems.append(f"{name}: {waiting:,} jobs wait, and {hashes:,} have a hash")
            return run

        for server in servers.values():
            close_loop(wrk, redis, [server], Shape(duration_s))
        runs = rounds(count, list(servers), measure)
    problems += problems_of(runs)
    return [_ratio_table(runs, problems), _figures_table(runs, duration_s)]


def _ratio_table(runs: Mapping[str, Sequence[Run]], problems: Sequence[str]) -> Section:
    def against(peer: str, column: Column) -> Spread:
        return ratios([column.of(run) for run in runs[WEBHOOKD]], [column.of(run) for run in runs[peer]])

    rate, cpu, *_, rss, redis_cpu, calls = COLUMNS
    shown = (rate, cpu, COLUMNS[3], rss, redis_cpu)
    return Section(
        title="Against Express and Fastify with ioredis and BullMQ",
        note="webhookd's figure divided by the other's in the same round: the median of the rounds, with the "
        "extremes. Below 1 is better, except for requests/s.",
        header=["webhookd against", *(column.name for column in shown)],
        rows=[
            [f"{peer.capitalize()} + BullMQ", *(against(peer, column).text(2) for column in shown)]
            for peer in (FASTIFY, EXPRESS)
        ],
        measured={
            Figure.CPU_FASTIFY: against(FASTIFY, cpu).median,
            Figure.CPU_EXPRESS: against(EXPRESS, cpu).median,
            Figure.RATE_FASTIFY: against(FASTIFY, rate).median,
            Figure.RSS_LOAD: max(rss.of(run) for run in runs[WEBHOOKD]),
            Figure.CALLS: Spread.of([calls.of(run) for run in runs[WEBHOOKD]]).median,
        },
        problems=problems,
    )


def _figures_table(runs: Mapping[str, Sequence[Run]], duration_s: int) -> Section:
    jobs = sum(run.jobs for each in runs.values() for run in each)
    count = len(runs[WEBHOOKD])
    return Section(
        title="The figures behind the ratios",
        note=f"{count} rounds of {duration_s} s each, 32 connections, 3 kB per request: the median, with the "
        f"extremes. All {jobs:,} jobs were counted in the queue, as list entries and hashes, and match the "
        "requests answered with 2xx. The script calls of the peers do not include their SET.",
        header=["", *(column.name for column in COLUMNS)],
        rows=[medians(name, each, COLUMNS) for name, each in runs.items()],
    )

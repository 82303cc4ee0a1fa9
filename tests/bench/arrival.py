"""Open loops at a constant rate: the sender does not wait for the last answer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from .figures import Figure, Section, number
from .load import Shape, Wrk, close_loop, complaints, cpu_s, jobs_settled, open_loop
from .machine import Cores
from .outputs import Answers
from .servers import BenchRedis, Nginx, Server, Webhookd

_PER_SECOND = 1000
_WARM_S = 2


def arrive(cores: Cores, *, duration_s: int) -> Section:
    """Measure one replica, then three behind nginx."""
    rows, problems = [], []
    measured = {}
    for figure, replicas in ((Figure.P95_ONE, 1), (Figure.P95_THREE, 3)):
        answers, jobs, busy = _through(cores, replicas, duration_s)
        measured[figure] = answers.p95_ms
        name = "one replica" if replicas == 1 else f"{replicas} replicas behind nginx"
        rows.append([name, *latencies(answers), f"{number(jobs, 0)}", f"{number(100 * busy, 0)} %"])
        problems += [f"{name}: {problem}" for problem in complaints(answers, jobs, repeat=1, under_way=0)]
    return Section(
        title=f"At {_PER_SECOND:,} requests/s",
        note=f"An open loop for {duration_s} s: k6 starts a request each millisecond, however long "
        "answers take. The last column is the share of one core that all replicas together used.",
        header=["", *LATENCIES, "jobs", "CPU"],
        rows=rows,
        measured=measured,
        problems=problems,
    )


LATENCIES = ("p50 ms", "p95 ms", "p99 ms", "slowest ms")


def latencies(answers: Answers) -> list[str]:
    """Return the columns of `LATENCIES`."""
    values = (answers.p50_ms, answers.p95_ms, answers.p99_ms, answers.slowest_ms)
    return [number(value, 1) for value in values]


def _through(cores: Cores, replicas: int, duration_s: int) -> tuple[Answers, int, float]:
    """Return the answers, the jobs in the queue, and the cores that the replicas kept busy."""
    with ExitStack() as stack:
        redis = stack.enter_context(BenchRedis(cores.redis))
        servers: Sequence[Server] = [
            stack.enter_context(Webhookd(cores.server, redis)) for _ in range(replicas)
        ]
        for server in servers:
            close_loop(Wrk(cores.load), redis, [server], Shape(_WARM_S))
        redis.empty()
        front = servers[0] if replicas == 1 else stack.enter_context(Nginx(cores.load, servers))
        before = sum(cpu_s(server.pid) for server in servers)
        answers = open_loop(cores.load, front.port, _PER_SECOND, duration_s)
        busy = (sum(cpu_s(server.pid) for server in servers) - before) / answers.duration_s
        with redis.client() as client:
            return answers, jobs_settled(client, servers), busy

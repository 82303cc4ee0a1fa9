"""One run of load against a running server, and what is measured on the machine during the run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from attrs import field, frozen

from tests.support.process import find_tool, wait_until
from tests.support.webhooks import PATH

from .bodies import Request, first_id, sample_body
from .machine import pinned
from .outputs import Answers, read_cpu_ticks, read_k6, read_kilobytes, read_wrk
from .servers import QUEUE, BenchRedis, Server

_HERE = Path(__file__).parent
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_RSS_INTERVAL_S = 0.1
_SETTLE_S = 0.25
_DRAIN_S = 60.0
_SIGNATURES_PER_S = 25_000  # more than any server here can take

# With only two cores, k6 shares its core with Redis. Each time that Go collects the garbage of some hundred
# JavaScript machines, both stop, and the bench would measure k6.
_K6_ENVIRONMENT = {"GOGC": "off", "GOMEMLIMIT": "4GiB"}

ALWAYS_THE_SAME = 10**12
"""A ``repeat`` that no run reaches."""


@frozen
class Shape:
    """A closed loop: each connection sends a request when it has the answer to the last one.

    Each id is sent ``repeat`` times, to the source at ``path``. If ``signed``, the signatures are valid, not
    only of the right size.
    """

    duration_s: int
    connections: int = 32
    body: bytes = field(factory=sample_body)
    repeat: int = 1
    signed: bool = False
    path: str = PATH


@frozen
class Run:
    """The result of one run. CPU times are in microseconds, user and system, of whole processes."""

    answers: Answers
    jobs: int
    cpu_us_per_request: float
    redis_cpu_us_per_job: float
    calls_per_job: float
    rss_mb: float
    problems: Sequence[str]

    @property
    def per_second(self) -> float:
        """Answers of 2xx a second."""
        return self.answers.per_second


@frozen
class RedisUsage:
    """The work of Redis so far: CPU in microseconds, and script calls."""

    cpu_us: float
    calls: int

    @classmethod
    def of(cls, client: Any) -> RedisUsage:
        """Read it from ``INFO``."""
        cpu = client.info("cpu")
        commands = client.info("commandstats")
        scripts = ("cmdstat_eval", "cmdstat_evalsha", "cmdstat_fcall")
        return cls(
            cpu_us=1e6 * (cpu["used_cpu_user"] + cpu["used_cpu_sys"]),
            calls=sum(commands[name]["calls"] for name in scripts if name in commands),
        )


def cpu_s(pid: int) -> float:
    """Return user and system time of a process with all its threads."""
    return read_cpu_ticks(Path(f"/proc/{pid}/stat").read_text()) / _TICKS_PER_S


def rss_mb(pid: int) -> float:
    """Return the resident memory of a process, in MB of 10^6 bytes."""
    return read_kilobytes(Path(f"/proc/{pid}/status").read_text(), "VmRSS") * 1024 / 1e6


@frozen
class Wrk:
    """The load generator of the closed loops, on one core."""

    core: int

    def start(self, stack: ExitStack, port: int, shape: Shape, loop: int = 0) -> subprocess.Popen[str]:
        """Start one loop, perhaps of several; ``stack`` removes its files."""
        directory = Path(stack.enter_context(TemporaryDirectory(prefix="webhookd-bench-")))
        request, first = Request.of(shape.body, shape.path), first_id(loop)
        arguments = [str(request.write(directory)), str(first), str(shape.repeat)]
        if shape.signed:
            signatures = directory / "signatures"
            signatures.write_bytes(request.signatures(first, _SIGNATURES_PER_S * shape.duration_s))
            arguments.append(str(signatures))
        command = [
            find_tool("wrk", "it is in Debian's package wrk"),
            *("-t1", f"-c{shape.connections}", f"-d{shape.duration_s}s", "--timeout", "10s"),
            *("-s", str(_HERE / "wrk.lua"), f"http://127.0.0.1:{port}", "--", *arguments),
        ]
        process = subprocess.Popen(pinned(self.core, command), stdout=subprocess.PIPE, text=True)
        stack.callback(process.kill)
        return process

    def run(self, port: int, shape: Shape) -> Answers:
        """Run one loop to its end."""
        with ExitStack() as stack:
            return read_wrk(self.start(stack, port, shape).communicate()[0])


def close_loop(wrk: Wrk, redis: BenchRedis, servers: Sequence[Server], shape: Shape) -> Run:
    """Run one closed loop for each server, all at the same time, into one queue."""
    with redis.client() as client, ExitStack() as stack:
        waiting, usage, cpu = jobs_waiting(client), RedisUsage.of(client), _cpu_s(servers)
        processes = [wrk.start(stack, server.port, shape, loop) for loop, server in enumerate(servers)]
        rss = _highest_rss_mb(servers, processes)
        answers = together([read_wrk(process.communicate()[0]) for process in processes])
        jobs = jobs_settled(client, servers) - waiting
        used, cpu = RedisUsage.of(client), _cpu_s(servers) - cpu
    # wrk drops the requests in progress at its end: they may become jobs, and cost time, but are not counted.
    requests = max(jobs if shape.repeat == 1 else answers.ok, 1)
    return Run(
        answers=answers,
        jobs=jobs,
        cpu_us_per_request=1e6 * cpu / requests,
        redis_cpu_us_per_job=(used.cpu_us - usage.cpu_us) / requests,
        calls_per_job=(used.calls - usage.calls) / requests,
        rss_mb=rss,
        problems=complaints(answers, jobs, shape.repeat, shape.connections * len(servers)),
    )


def complaints(answers: Answers, jobs: int, repeat: int, under_way: int) -> list[str]:
    """Return why a run is invalid: each event that was answered with 2xx must be one job in the queue."""
    least, most = -(-answers.ok // repeat), -(-(answers.ok + under_way) // repeat)
    found = []
    if not least <= jobs <= most:
        found.append(f"{answers.ok:,} answers of 2xx, and {jobs:,} jobs instead of {least:,} to {most:,}")
    if answers.ok < answers.requests:
        found.append(f"{answers.requests - answers.ok:,} of {answers.requests:,} answers were not 2xx")
    if answers.unsent:
        found.append(f"{answers.unsent:,} requests failed, or were not sent in time")
    return found


def together(answers: Sequence[Answers]) -> Answers:
    """Combine the answers of several load generators; of each latency, take the worst."""
    return Answers(
        requests=sum(each.requests for each in answers),
        ok=sum(each.ok for each in answers),
        unsent=sum(each.unsent for each in answers),
        duration_s=max(each.duration_s for each in answers),
        p50_ms=max(each.p50_ms for each in answers),
        p95_ms=max(each.p95_ms for each in answers),
        p99_ms=max(each.p99_ms for each in answers),
        slowest_ms=max(each.slowest_ms for each in answers),
    )


def open_loop(core: int, port: int, per_second: int, duration_s: int) -> Answers:
    """Start ``per_second`` requests each second with k6; return when all are answered."""
    with TemporaryDirectory(prefix="webhookd-bench-") as directory:
        body = Path(directory) / "body.json"
        body.write_bytes(sample_body())
        values = {
            "URL": f"http://127.0.0.1:{port}{PATH}",
            "BODY": body,
            "FIRST_ID": first_id(),
            "RATE": per_second,
            "DURATION_S": duration_s,
        }
        settings = [part for name, value in values.items() for part in ("-e", f"{name}={value}")]
        k6 = find_tool(str(Path(sys.executable).with_name("k6")), "it is in tests/requirements.txt")
        command = [k6, "run", "--quiet", "--no-usage-report", *settings, str(_HERE / "k6.js")]
        done = subprocess.run(
            pinned(core, command),
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | _K6_ENVIRONMENT,
        )
    return read_k6(done.stdout or done.stderr)


def jobs_waiting(client: Any) -> int:
    """Return the number of waiting jobs."""
    return int(client.llen(f"bull:{QUEUE}:wait"))


def jobs_settled(client: Any, servers: Sequence[Server]) -> int:
    """Return the number of waiting jobs, once all spools are empty and no more jobs come."""
    wait_until(lambda: not any(server.holds_jobs() for server in servers), "the spools are empty", _DRAIN_S)
    before, now = -1, jobs_waiting(client)
    while now != before:
        time.sleep(_SETTLE_S)
        before, now = now, jobs_waiting(client)
    return now


def jobs_since(client: Any, first: int) -> int:
    """Return the number of webhookd's waiting jobs whose message has this id or a later one."""
    ids = client.lrange(f"bull:{QUEUE}:wait", 0, -1)
    return sum(int(job_id.rpartition(b".")[2]) >= first for job_id in ids)


def hashes_of_jobs(client: Any) -> int:
    """Return the number of jobs with a hash; the queue's only other hash is ``meta``."""
    return sum(1 for _ in client.scan_iter(f"bull:{QUEUE}:*", count=10_000, _type="hash")) - 1


def _cpu_s(servers: Sequence[Server]) -> float:
    return sum(cpu_s(server.pid) for server in servers)


def _highest_rss_mb(servers: Sequence[Server], processes: Sequence[subprocess.Popen[str]]) -> float:
    """Return the most memory that one server had while the processes ran."""
    highest = 0.0
    while any(process.poll() is None for process in processes):
        highest = max(highest, *(rss_mb(server.pid) for server in servers))
        time.sleep(_RSS_INTERVAL_S)
    return highest

"""Parsers for the output of the tools and the kernel. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from attrs import frozen

_WRK_MARK = "BENCH "
"""The prefix of wrk.lua's one line of JSON in the output of wrk."""


class Unreadable(Exception):
    """The output of a tool has not the expected form."""


@frozen
class Answers:
    """The result of a load generator: ``ok`` answers of 2xx; ``unsent`` requests failed or were late."""

    requests: int
    ok: int
    unsent: int
    duration_s: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    slowest_ms: float

    @property
    def per_second(self) -> float:
        """Answers of 2xx a second."""
        return self.ok / self.duration_s


def read_wrk(output: str) -> Answers:
    """Read the output of ``wrk -s wrk.lua``."""
    line = re.search(rf"^{_WRK_MARK}(.+)$", output, re.MULTILINE)
    if line is None:
        raise Unreadable(f"wrk gave no result:\n{output[-2000:]}")
    said: Mapping[str, int] = json.loads(line[1])
    return Answers(
        requests=said["requests"],
        ok=said["requests"] - said["bad_status"],
        unsent=said["socket_errors"] + said["timeouts"],
        duration_s=said["duration_us"] / 1e6,
        p50_ms=said["p50_us"] / 1e3,
        p95_ms=said["p95_us"] / 1e3,
        p99_ms=said["p99_us"] / 1e3,
        slowest_ms=said["max_us"] / 1e3,
    )


def read_k6(output: str) -> Answers:
    """Read the output of ``k6 run k6.js``: the metrics of its summary, as JSON."""
    try:
        metrics: Mapping[str, Any] = json.loads(output)
        latency = metrics["http_req_duration"]["values"]
        iterations = metrics["iterations"]["values"]
    except (ValueError, KeyError) as error:
        raise Unreadable(f"k6 gave no result: {error!r}\n{output[-2000:]}") from None
    # k6 leaves out a counter that nothing was added to.
    unsent = metrics["dropped_iterations"]["values"]["count"] if "dropped_iterations" in metrics else 0
    ok = metrics["answered_2xx"]["values"]["count"] if "answered_2xx" in metrics else 0
    return Answers(
        requests=iterations["count"],
        ok=ok,
        unsent=unsent,
        duration_s=iterations["count"] / iterations["rate"],
        p50_ms=latency["med"],
        p95_ms=latency["p(95)"],
        p99_ms=latency["p(99)"],
        slowest_ms=latency["max"],
    )


def read_cpu_ticks(stat: str) -> int:
    """Read user and system time of a process with all its threads, in clock ticks, from ``/proc/PID/stat``.

    The second field is the program's name in parentheses, which may contain spaces and parentheses.
    """
    fields = stat.rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def read_kilobytes(status: str, name: str) -> int:
    """Read one line such as ``VmRSS`` of ``/proc/PID/status`` or ``/proc/meminfo``."""
    line = re.search(rf"^{name}:\s+(\d+) kB$", status, re.MULTILINE)
    if line is None:
        raise Unreadable(f"no {name}")
    return int(line[1])


def read_redis_benchmark(output: str) -> float:
    """Read calls per second from ``redis-benchmark --csv``: the first of seven numbers after the command."""
    numbers = re.search(r',"([0-9.]+)"(,"[0-9.]+"){6}$', output.strip())
    if numbers is None:
        raise Unreadable(f"redis-benchmark gave no result:\n{output[-2000:]}")
    return float(numbers[1])

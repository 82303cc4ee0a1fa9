"""The table of results: its rows on the screen, and the page docs/faults.md."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.support.daemon import installed_twistd
from tests.support.servers import server_binary

from .bench import P95, P95_S, RATE, Result
from .load import DUPLICATES
from .oracle import SLOWEST_S

PATH = Path(__file__).parents[2] / "docs" / "faults.md"

_HEAD = f"""\
# Faults and their effects

`make faults` wrote this page. It starts real servers and replicas of the installed webhookd, sends {RATE:g}
requests a second to them from another process, and causes a fault. {DUPLICATES:.0%} of the requests repeat an
earlier event. At the end, it compares the answers that the sender received with the jobs in Redis and in the
spools. `make test` runs some of the rows with less load, and judges no times.

{{facts}}

In each row, the following must hold in addition to the expected result:

* each event that was acknowledged is one job in Redis (I1), and no event was added twice (I2);
* an event without an answer, or with an error, that is sent again at the end is one job (I3);
* no answer comes after {SLOWEST_S:g} s, and a 95th percentile (p95) in **bold** is below {P95_S * 1000:g} ms,
  or the row is *late* (I4);
* each creation lock has a time to live, and belongs to a job that was added (I6);
* at the end, each spool is empty, and each replica ends with exit code 0.

Latency counts from when a request was due, not from when it was sent. p95 is that of accepted requests. *Not
taken* are requests with an error or without an answer, such as those that find the daemon dead. A row that is
only late is run again, because another program may have used the processors.
"""

_TAIL = """
## What may be lost

* **R2, R11** Redis acknowledged events and lost them: the last second of its AOF, or what its replica had not
  received. webhookd sends the last 10 s again from memory. Without that memory (rows *off*), these events are
  lost: here at most {bound}, the load of 1.2 s.
* **R20** FLUSHALL deletes all queued jobs, with the memory and without. It is no restart, so nothing is sent
  again.
* No row shows a Redis that loses its last second and a daemon that is killed in the same second.

## What is not tested here

* P5: nothing restarts a daemon whose event loop is blocked. The row shows that it loses nothing.
* P6, memory limit: the kernel sends SIGKILL, as in P1 and M3.
* D2: a spool is one file, which includes its index. A checksum of each record finds the damage of these rows.
  SQLite's write-ahead log has its own checksums (`tests/unit/spool/test_salvage.py`). In the last commits, a
  flipped bit looks like the result of a crash, and these commits are lost.
* R19: MOVED needs a cluster of several nodes: `tests/integration/test_cluster.py`.

## Does the bench find defects?

`tests/integration/test_flawed_builds.py` runs builds with one defect each: acknowledge before commit, check
then add in two calls, lock before add, connection reused after a deadline, spool drained without the script,
lock without a time to live, spool drained backwards. The oracle must report each defect, and nothing without
the defect.
"""


def line_of(result: Result) -> str:
    """Return one row for the screen."""
    name = f"{result.row.name:<6}"
    if result.verdict is None:
        return f"{name} {'not run: ' + result.not_run if result.not_run else 'BROKEN'}"
    verdict = result.verdict
    return (
        f"{name} {_word(result):<6} {verdict.requests:>6} requests {verdict.acknowledged:>6} acknowledged "
        f"{verdict.refused:>5} not taken {len(verdict.lost):>4} lost {len(verdict.doubled):>4} doubled "
        f"p95 {_ms(verdict.p95_s):>5} slowest {_ms(verdict.slowest_s):>5} ms  {result.took_s:4.1f} s  "
        f"{'; '.join([result.row.fault, *result.notes])}"
    )


def _word(result: Result) -> str:
    if result.not_run:
        return "not run"
    if not result.holds:
        return "BROKEN"
    return "late" if result.is_late else "holds"


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f}"


def write_report(results: Sequence[Result]) -> None:
    """Write docs/faults.md."""
    bound = max(result.row.may_lose for result in results)
    parts = [_HEAD.format(facts=_facts(results)), "\n", *_table(results), _TAIL.format(bound=bound)]
    PATH.write_text("".join(parts))


def _facts(results: Sequence[Result]) -> str:
    redis = _first_line(server_binary("redis-7.0"), "--version").split(" sha=")[0]
    webhookd = _first_line(str(installed_twistd()), "webhookd", "--version")
    minutes = sum(result.took_s for result in results) / 60
    held = sum(_word(result) == "holds" for result in results)
    return (
        f"Last run: {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC, `make faults`, "
        f"{minutes:.0f} minutes; "
        f"{held} of {len(results)} rows hold.\\\n"
        f"{webhookd}; {redis}; Python {platform.python_version()}; Linux {platform.release().split('-')[0]}; "
        f"{_processors()} processors, shared by sender, daemons and Redis."
    )


def _processors() -> int:
    return Path("/proc/cpuinfo").read_text().count("processor\t:")


def _first_line(*command: str) -> str:
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return output.splitlines()[0]


def _table(results: Sequence[Result]) -> Iterator[str]:
    yield "| | fault | expected | requests | not taken | acknowledged | lost | doubled "
    yield "| p95 ms | slowest ms | |\n"
    yield "|---|---|---|--:|--:|--:|--:|--:|--:|--:|---|\n"
    for result in results:
        fault = "; ".join([result.row.fault, *result.notes])
        cells = [result.row.name, fault, result.row.expected, *_figures(result), _word(result)]
        yield f"| {' | '.join(cells)} |\n"


def _figures(result: Result) -> list[str]:
    verdict = result.verdict
    if verdict is None:
        return ["", "", "", "", "", "", result.not_run]
    p95 = _ms(verdict.p95_s)
    return [
        str(verdict.requests),
        str(verdict.refused),
        str(verdict.acknowledged),
        str(len(verdict.lost)),
        str(len(verdict.doubled)),
        f"**{p95}**" if P95 in result.row.demands else p95,
        _ms(verdict.slowest_s),
    ]

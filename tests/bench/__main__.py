"""The bench's command line: runs the sections one after another, prints the report, and judges it."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import webhookd
from tests.support.process import MissingTool, ProcessFailed

from . import arrival, comparison, degraded, floor, growth, machine, observed, report
from .figures import Section
from .machine import Cores
from .outputs import Unreadable

_Measure = Callable[[Cores], Sequence[Section]]

FULL: Mapping[str, _Measure] = {
    "comparison": lambda cores: comparison.compare(cores, count=7, duration_s=5),
    "arrival": lambda cores: [arrival.arrive(cores, duration_s=30)],
    "degraded": lambda cores: [degraded.spooling(cores, duration_s=20)],
    "signature": lambda cores: [growth.signature(cores, servers=3, count=20)],
    "observed": lambda cores: [
        observed.counting(cores, pairs=3, count=8),
        observed.scraped(cores, duration_s=10),
    ],
    "waiting": lambda cores: [growth.waiting_jobs(cores, count=5, duration_s=3)],
    "growth": lambda cores: [measure(cores) for measure in growth.SHORT],
    "memory": lambda cores: [degraded.memory(cores, requests=1_000_000, deadline_s=300)],
    "floor": lambda cores: [floor.floor(cores, duration_s=5)],
}
"""All sections, in the order of the report: at most 20 minutes in total."""

QUICK: Mapping[str, _Measure] = {
    "comparison": lambda cores: comparison.compare(cores, count=3, duration_s=2),
}
"""Enough to see the effect of a change: half a minute."""


def main(arguments: Sequence[str]) -> int:
    """Run the bench; return 1 if ``--check`` finds a missed "must" or invalid figures."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench")
    parser.add_argument("--quick", action="store_true", help="only the comparison, with short runs")
    parser.add_argument("--only", nargs="+", choices=FULL, default=FULL, help="only these sections")
    parser.add_argument("--check", action="store_true", help='exit with 1 if a "must" is missed')
    parser.add_argument("--output", type=Path, help="also write the report to this file")
    options = parser.parse_args(arguments)
    chosen = QUICK if options.quick else {name: FULL[name] for name in FULL if name in options.only}
    try:
        sections, facts = run(chosen)
    except MissingTool as error:
        parser.exit(2, f"{error}\n")
    text = report.render(sections, facts)
    print(text)
    if options.output:
        options.output.write_text(text)
    failed = report.problems_of(sections) or any(each.misses_must for each in report.judge(sections))
    return 1 if options.check and failed else 0


def run(chosen: Mapping[str, _Measure]) -> tuple[list[Section], Mapping[str, str]]:
    """Measure one section after another; return them with the facts about the whole run."""
    cores = machine.prepare()
    load = machine.describe_load()
    began = time.monotonic()
    sections: list[Section] = []
    for name, measure in chosen.items():
        print(f"{time.monotonic() - began:4.0f} s  {name}", file=sys.stderr, flush=True)
        try:
            sections += measure(cores)
        except (Unreadable, ProcessFailed, TimeoutError) as error:  # the other sections are still useful
            sections.append(Section(name, "Not measured.", [""], [], problems=[str(error)]))
    took_s = time.monotonic() - began
    facts = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}, in {took_s / 60:.0f} minutes; {load}",
        "machine": machine.describe_machine(),
        "cores": cores.text(),
        "versions": machine.describe_versions(webhookd.__version__),
    }
    return sections, facts


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

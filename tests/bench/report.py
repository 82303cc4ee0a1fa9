"""The report, as Markdown. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from attrs import frozen

from .figures import TARGETS, Bound, Figure, Section, Target


@frozen
class Verdict:
    """The measured value of a target, or None if it was not measured."""

    target: Target
    value: float | None

    @property
    def misses_must(self) -> bool:
        """True if this alone makes ``make bench-check`` fail."""
        return self.value is not None and not self.target.must.holds(self.value)

    def row(self) -> list[str]:
        """Return a row of the first table."""
        shown = "not measured" if self.value is None else self.target.shown(self.value)
        return [self.target.figure.value, shown, self._said(self.target.must), self._said(self.target.aim)]

    def _said(self, bound: Bound) -> str:
        wanted = self.target.wanted(bound)
        if self.value is None:
            return wanted
        if bound.holds(self.value):
            return f"reached: {wanted}"
        return f"**not reached**: {self.target.shown(self.value)}, wanted {wanted}"


def judge(sections: Sequence[Section]) -> list[Verdict]:
    """Compare each target with the figures of the sections."""
    measured: dict[Figure, float] = {}
    for section in sections:
        measured.update(section.measured)
    return [Verdict(target, measured.get(target.figure)) for target in TARGETS]


def problems_of(sections: Sequence[Section]) -> list[str]:
    """Return the problems that make figures invalid, each with its table."""
    return [f"{section.title}: {problem}" for section in sections for problem in section.problems]


def render(sections: Sequence[Section], facts: Mapping[str, str]) -> str:
    """Return the whole report: the targets and ratios first, the method last."""
    targets = _table(["", "measured", "must", "aim"], [verdict.row() for verdict in judge(sections)])
    problems = problems_of(sections)
    invalid = ["## Invalid figures", "\n".join(f"* {each}" for each in problems)] if problems else []
    tables = [
        block
        for section in sections
        for block in (f"## {section.title}", section.note, _table(section.header, section.rows))
    ]
    said = "\n".join(f"* {name}: {fact}" for name, fact in facts.items())
    blocks = [
        _HEAD,
        *invalid,
        "## Targets",
        targets,
        *tables,
        "## How it was measured",
        said,
        _METHOD,
    ]
    return "\n\n".join(blocks) + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


_HEAD = """\
# Benchmarks

Written by `make bench`: do not edit. All figures are from one run on one machine. On other machines the
figures differ, the ratios much less."""

_METHOD = """\
The peers are `tests/bench/peers/express.js` and `fastify.js`: what a user would write instead of webhookd,
with `SET lock NX PX 5000` and BullMQ's own `queue.add`, in production mode, with the same job options. They
parse the body and do nothing else: no signature, no limits except for the body, no spool, no health.

* All servers use one Redis, without persistence, and take turns; each round begins with another server. A
  ratio is computed within a round, and then the median of the rounds, so that a slow minute of the machine
  affects both sides.
* CPU is user and system time of the whole process with all its threads, from `/proc/PID/stat`, divided by the
  jobs that were then in the queue. Redis's is from `INFO cpu`, its script calls from `INFO commandstats`.
* The closed loops are wrk with one thread and 32 keep-alive connections, unless stated otherwise; the open
  loops are k6. A request is Chatwoot's `message_created` with Chatwoot's headers, and has a new message id.
* After each run the jobs in the queue are counted: every answer must be 2xx, and each must be one job. wrk
  drops the requests in progress when its time is over, so there may be one more job per connection.
* RSS is the highest value during the run. MB are 10^6 bytes."""

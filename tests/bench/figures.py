"""The arithmetic of the bench, its targets and its figures. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from operator import ge, le, lt
from statistics import median

from attrs import Factory, frozen


@frozen
class Spread:
    """The median of some runs, with the smallest and the largest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of at least one value."""
        return cls(median(values), min(values), max(values))

    def text(self, digits: int) -> str:
        """Return the median, followed by the extremes if they differ."""
        if self.low == self.high:
            return number(self.median, digits)
        return f"{number(self.median, digits)} ({number(self.low, digits)} to {number(self.high, digits)})"


def number(value: float, digits: int) -> str:
    """Format a number for people."""
    return f"{value:,.{digits}f}"


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Divide ours by theirs, round by round, so that a slow round cancels out."""
    return Spread.of([mine / other for mine, other in zip(ours, theirs, strict=True)])


def share(with_it: Sequence[float], without: Sequence[float]) -> Spread:
    """Return the share of a cost, in percent, that the other runs of each round saved."""
    return Spread.of([100 * (more - less) / more for more, less in zip(with_it, without, strict=True)])


class Figure(Enum):
    """The figures with a target; the value is the name in the report."""

    CPU_FASTIFY = "CPU per request, against Fastify+BullMQ"
    CPU_EXPRESS = "CPU per request, against Express+BullMQ"
    RATE_FASTIFY = "requests/s of one process, against Fastify+BullMQ"
    P95_ONE = "p95 at 1,000 requests/s, one replica"
    P95_THREE = "p95 at 1,000 requests/s, three replicas behind nginx"
    P95_SPOOLING = "p95 while spooling (Redis stopped), 500 requests/s"
    SIGNATURE = "signature check, its share of CPU"
    COUNTING = "counting for /metrics, its share of CPU"
    P95_SCRAPED = "p95 at 500 requests/s, /metrics fetched 50 times a second"
    CALLS = "Redis round trips per job under load"
    RSS_LOAD = "RSS of one replica under load"
    RSS_MILLION = "RSS after 1 million requests, against after 100,000"
    CPU_DEPTH = "CPU per request at 10^6 waiting jobs, against 0"


_SIGNS: Mapping[str, Callable[[float, float], bool]] = {"<": lt, "<=": le, ">=": ge}


@frozen
class Bound:
    """A limit for a figure, with one of ``<``, ``<=`` and ``>=``."""

    sign: str
    limit: float

    def holds(self, value: float) -> bool:
        """Return True if the value is on the right side."""
        return _SIGNS[self.sign](value, self.limit)


@frozen
class Target:
    """The bound that a figure must reach, and the one that it should."""

    figure: Figure
    must: Bound
    aim: Bound
    unit: str = ""
    digits: int = 2

    def shown(self, value: float) -> str:
        """Return a value of this figure with its unit."""
        return f"{number(value, self.digits)}{self.unit}"

    def wanted(self, bound: Bound) -> str:
        """Return a bound of this figure as the report shows it."""
        return f"{bound.sign} {self.shown(bound.limit)}"


TARGETS = (
    Target(Figure.CPU_FASTIFY, Bound("<=", 0.70), Bound("<=", 0.50)),
    Target(Figure.CPU_EXPRESS, Bound("<=", 0.33), Bound("<=", 0.25)),
    Target(Figure.RATE_FASTIFY, Bound(">=", 1.3), Bound(">=", 2.0)),
    Target(Figure.P95_ONE, Bound("<", 10), Bound("<", 3), " ms"),
    Target(Figure.P95_THREE, Bound("<", 20), Bound("<", 5), " ms"),
    Target(Figure.P95_SPOOLING, Bound("<", 50), Bound("<", 15), " ms"),
    Target(Figure.SIGNATURE, Bound("<", 8), Bound("<", 4), " %"),
    Target(Figure.COUNTING, Bound("<", 5), Bound("<", 3), " %"),
    Target(Figure.P95_SCRAPED, Bound("<", 50), Bound("<", 15), " ms"),
    Target(Figure.CALLS, Bound("<", 0.2), Bound("<", 0.05), digits=3),
    Target(Figure.RSS_LOAD, Bound("<", 90), Bound("<", 60), " MB", digits=1),
    # A flat curve still shows the noise of the allocator, and so does a ratio of 1.0.
    Target(Figure.RSS_MILLION, Bound("<", 1.05), Bound("<", 1.02)),
    Target(Figure.CPU_DEPTH, Bound("<", 1.1), Bound("<", 1.05)),
)
"""The targets of webhookd."""


@frozen
class Section:
    """One table of the report.

    ``measured`` has the figures with a target. ``problems`` are sentences that make its figures invalid: an
    event that was not found in the queue, a request that was never sent.
    """

    title: str
    note: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    measured: Mapping[Figure, float] = Factory(dict)
    problems: Sequence[str] = ()

"""The findings of checks, and the functions that run the checks of one part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import TypeAlias, TypeVar

from attrs import frozen


class Level(Enum):
    """The severity of a finding; the value is the printed word."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    SKIPPED = "skipped"


@frozen
class Finding:
    """The finding of a check, with advice if something is wrong."""

    level: Level
    detail: str
    advice: str = ""


def ok(detail: str) -> Finding:
    """Return a finding without a problem."""
    return Finding(Level.OK, detail)


def warn(detail: str, advice: str) -> Finding:
    """Return a finding about something that works but needs attention."""
    return Finding(Level.WARN, detail, advice)


def fail(detail: str, advice: str) -> Finding:
    """Return a finding about something that does not work, or loses events."""
    return Finding(Level.FAIL, detail, advice)


def skipped(why: str) -> Finding:
    """Return a finding without a result. ``why`` has at most 12 characters; another finding explains it."""
    return Finding(Level.SKIPPED, why)


@frozen
class Result:
    """The finding of one check of one part."""

    part: str
    check: str
    finding: Finding


_Facts = TypeVar("_Facts")

#: A check's name, of at most 12 characters, and the function that judges: from facts to a finding, no I/O.
Checks: TypeAlias = Sequence[tuple[str, Callable[[_Facts], Finding]]]


def run_checks(part: str, checks: Checks[_Facts], facts: _Facts) -> list[Result]:
    """Run all checks of a part."""
    return [Result(part, name, check(facts)) for name, check in checks]


def skip_checks(part: str, checks: Checks[_Facts], why: str) -> list[Result]:
    """Return the results of a part whose facts are unavailable."""
    return [Result(part, name, skipped(why)) for name, _ in checks]


def milliseconds(duration_s: float) -> str:
    """Format a duration."""
    return f"{duration_s * 1000:.3g} ms"


def mebibytes(size: int) -> str:
    """Format a size."""
    return f"{size / 2**20:.0f} MiB"

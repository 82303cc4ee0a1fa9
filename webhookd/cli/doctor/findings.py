"""What a check finds, and how the checks of one part are run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import TypeAlias, TypeVar

from attrs import frozen


class Level(Enum):
    """How bad it is; the value is the word that is printed."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    SKIPPED = "skipped"


@frozen
class Finding:
    """What is there, and where that is not well, what to do about it."""

    level: Level
    detail: str
    advice: str = ""


def ok(detail: str) -> Finding:
    """All is well."""
    return Finding(Level.OK, detail)


def warn(detail: str, advice: str) -> Finding:
    """It works, and there is something to know."""
    return Finding(Level.WARN, detail, advice)


def fail(detail: str, advice: str) -> Finding:
    """It does not work, or loses events."""
    return Finding(Level.FAIL, detail, advice)


def skipped(why: str) -> Finding:
    """It cannot be told, for a reason of at most 12 characters; what lacks has a finding of its own."""
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
    """The results of all checks of a part."""
    return [Result(part, name, check(facts)) for name, check in checks]


def skip_checks(part: str, checks: Checks[_Facts], why: str) -> list[Result]:
    """The results where the facts are not to be had."""
    return [Result(part, name, skipped(why)) for name, _ in checks]


def milliseconds(duration_s: float) -> str:
    """A duration for people."""
    return f"{duration_s * 1000:.3g} ms"


def mebibytes(size: int) -> str:
    """A size for people."""
    return f"{size / 2**20:.0f} MiB"

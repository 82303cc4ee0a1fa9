"""Builds with one defect each, and a short scenario that must catch it."""

from __future__ import annotations

from functools import partial

from attrs import frozen

from .bench import TRUTHFUL, Row
from .builds import (
    ACKNOWLEDGES_EARLY,
    CHECKS_THEN_ADDS,
    CRASHING,
    DRAINS_BACKWARDS,
    DRAINS_PLAINLY,
    LOCKS_FIRST,
    LOCKS_FOR_EVER,
    REUSES_CONNECTIONS,
    Build,
)
from .rows import ROWS
from .rows.redis import forgets_scripts, loses_one_right, replies_are_late_one_by_one, replies_are_lost


@frozen
class Flaw:
    """A defect, the row that a build without it passes, and the violation that it causes."""

    name: str
    build: Build
    row: Row
    violation: str


def _row(name: str, scenario: object) -> Row:
    return Row(name, "", "", scenario, demands=TRUTHFUL)  # type: ignore[arg-type]


FLAWS = (
    Flaw("acknowledge before commit", CRASHING + ACKNOWLEDGES_EARLY, ROWS["P1c"], "I1: lost"),
    Flaw("check then add in two calls", CHECKS_THEN_ADDS, ROWS["K2"], "I2: added twice"),
    Flaw("lock before add", LOCKS_FIRST, _row("one right", loses_one_right), "I1: lost"),
    Flaw(
        "connection reused after a deadline",
        REUSES_CONNECTIONS,
        _row("late replies", replies_are_late_one_by_one),
        "I1: lost",
    ),
    Flaw(
        "spool drained without the script",
        DRAINS_PLAINLY,
        _row("lost replies", partial(replies_are_lost, for_s=0.8)),
        "I2: added twice",
    ),
    Flaw(
        "lock without a time to live",
        LOCKS_FOR_EVER,
        _row("no fault", partial(forgets_scripts, for_s=0.6)),
        "I6: a lock without an end",
    ),
    Flaw("spool drained backwards", DRAINS_BACKWARDS, ROWS["R3"], "out of order"),
)

"""The table, as one reads it: on the screen while it grows, and in docs/faults.md at the end."""

from __future__ import annotations

from collections.abc import Sequence

from .bench import Result


def line_of(result: Result) -> str:
    """One row for the screen."""
    name = f"{result.row.name:<5}"
    if result.verdict is None:
        return f"{name} {'not run: ' + result.not_run if result.not_run else 'BROKEN'}"
    verdict = result.verdict
    return (
        f"{name} {_word(result):<6} {verdict.requests:>6} requests {verdict.acknowledged:>6} acknowledged "
        f"{verdict.refused:>5} not taken {len(verdict.lost):>4} lost {len(verdict.doubled):>4} doubled "
        f"p95 {_ms(verdict.p95_s):>5} slowest {_ms(verdict.slowest_s):>5} ms  {result.took_s:4.1f} s  "
        f"{result.row.fault} {'; '.join(result.notes)}"
    )


def _word(result: Result) -> str:
    if not result.holds:
        return "BROKEN"
    return "late" if result.is_late else "holds"


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f}"


def write_report(results: Sequence[Result]) -> None:
    """Keep the table."""

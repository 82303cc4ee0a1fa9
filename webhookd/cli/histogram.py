"""Latencies for the terminal: percentiles, and a histogram. Pure."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

#: The bounds of the bars within a decade.
_STEPS = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
_EIGHTHS = " ▏▎▍▌▋▊▉"
_WIDTH_OF_THE_REST = 27
_SMALLEST_MS = 0.01


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Return a percentile of values in ascending order, by the nearest-rank method."""
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def histogram(values_ms: Sequence[float], width: int) -> list[str]:
    """Return a line of at most ``width`` columns for each range from the smallest to the largest latency."""
    counts = Counter(_step_above(value) for value in values_ms)
    most = max(counts.values())
    room = width - _WIDTH_OF_THE_REST
    lines = []
    for step in range(min(counts), max(counts) + 1):
        bar = _bar(counts[step] / most * room, room)
        lines.append(f"{_bound(step - 1):>5} to {_bound(step):<5} ms  {bar} {counts[step]:>7}")
    return lines


def _step_above(value_ms: float) -> int:
    """Return the number of the step that ends the value's range, counted over all decades."""
    value_ms = max(value_ms, _SMALLEST_MS)
    decade = math.floor(math.log10(value_ms))
    return decade * len(_STEPS) + bisect_left(_STEPS, value_ms / 10**decade)


def _bound(step: int) -> str:
    decade, position = divmod(step, len(_STEPS))
    return f"{_STEPS[position] * 10**decade:g}"


def _bar(length: float, room: int) -> str:
    """Return a bar in eighths of a character. A length above zero is always visible."""
    eighths = max(round(length * 8), 1 if length else 0)
    return ("█" * (eighths // 8) + _EIGHTHS[eighths % 8]).strip().ljust(room)

"""Wall-clock time for what others read, monotonic time for every deadline."""

from __future__ import annotations

import time
from typing import Any


def wall_clock_ms() -> int:
    """Milliseconds since 1970, as BullMQ counts them: for what others read, and never for a deadline."""
    return time.time_ns() // 1_000_000


def run_on_monotonic_time(reactor: Any) -> None:
    """Keep every timer of the process from jumping with the wall clock.

    Twisted's reactors measure delays with ``time.time``: set back by an hour, a deadline of half a second
    would hold for an hour. Each of their timers asks ``reactor.seconds``.
    """
    reactor.seconds = time.monotonic

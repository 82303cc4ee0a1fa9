"""The wall clock, for what others read; deadlines use the reactor's, which is monotonic."""

from __future__ import annotations

import time


def wall_clock_ms() -> int:
    """Milliseconds since 1970, as BullMQ counts them: for what others read, and never for a deadline."""
    return time.time_ns() // 1_000_000

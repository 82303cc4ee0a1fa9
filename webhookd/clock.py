"""The wall clock. Deadlines use the reactor's clock, which is monotonic."""

from __future__ import annotations

import time


def wall_clock_ms() -> int:
    """Return the milliseconds since 1970, as BullMQ counts them; never for a deadline."""
    return time.time_ns() // 1_000_000

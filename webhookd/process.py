"""What is set for the process as a whole: its clock, its signals, and its limit of open files."""

from __future__ import annotations

import resource
import signal
import sys
import time
from contextlib import suppress
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


def end_on_signals(reactor: Any) -> None:
    """End with exit code 0 on SIGTERM and SIGINT, and only once however often they come.

    twistd would end with the signal again, which supervisors take for a failure.
    """
    stopping = False

    def stop(_signal: int, _frame: object) -> None:
        nonlocal stopping
        if not stopping:
            stopping = True
            reactor.callFromThread(reactor.stop)

    def install() -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)

    reactor.callWhenRunning(install)


def raise_descriptor_limit() -> int:
    """Have as many descriptors as the system allows this process; returns how many.

    Many systems start a program with 1,024 and let it raise that.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # a limit above the kernel's own is not granted
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft

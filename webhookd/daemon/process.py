"""What is set for the process as a whole: its signals, and its limit of open files."""

from __future__ import annotations

import resource
import signal
import sys
from contextlib import suppress

from webhookd.http import MAX_CONNECTIONS
from webhookd.reactor import IReactor

_OTHER_DESCRIPTORS = 200  # the connections of the ops endpoint and to Redis, the spool's files, logs


def end_on_signals(reactor: IReactor) -> None:
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


def max_connections(descriptors: int) -> int:
    """How many of them senders may take."""
    return min(MAX_CONNECTIONS, max(descriptors - _OTHER_DESCRIPTORS, descriptors // 2))

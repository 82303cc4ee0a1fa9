"""Settings of the whole process: its signals, and its limit of open files."""

from __future__ import annotations

import resource
import signal
import sys
from contextlib import suppress

from webhookd.http import MAX_CONNECTIONS
from webhookd.reactor import IReactor

_OTHER_DESCRIPTORS = 200  # connections of the ops endpoint and to Redis, files of the spool, logs


def end_on_signals(reactor: IReactor) -> None:
    """Stop the reactor on the first SIGTERM or SIGINT; the process then ends with exit code 0.

    twistd would raise the signal again at the end, and supervisors treat that as a failure.
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
    """Raise the limit of open descriptors to the hard limit, and return it.

    Many systems start a program with 1,024 and allow it to raise that.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # the kernel refuses a limit above its own
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def max_connections(descriptors: int) -> int:
    """Return how many of the descriptors senders may use."""
    return min(MAX_CONNECTIONS, max(descriptors - _OTHER_DESCRIPTORS, descriptors // 2))

"""Twisted's reactor as webhookd uses it: its type, and a clock that never jumps."""

from __future__ import annotations

import time
from typing import cast

from twisted.internet.interfaces import (
    IReactorCore,
    IReactorFromThreads,
    IReactorProcess,
    IReactorTCP,
    IReactorTime,
    IReactorUNIX,
)


class IReactor(IReactorCore, IReactorFromThreads, IReactorProcess, IReactorTCP, IReactorTime, IReactorUNIX):
    """The interfaces that each of Twisted's reactors provides on a UNIX system."""


def the_reactor() -> IReactor:
    """Return the reactor, which Twisted installs on the first import, and types as a module."""
    from twisted.internet import reactor

    return cast(IReactor, reactor)


def run_on_monotonic_time(reactor: IReactor) -> None:
    """Keep the timers of the process from jumping with the wall clock.

    Twisted's reactors measure delays with ``time.time``: if the clock is set back by an hour, a deadline of
    half a second lasts an hour. All their timers call ``reactor.seconds``.
    """
    reactor.seconds = time.monotonic  # type: ignore[method-assign]  # the only way to replace it

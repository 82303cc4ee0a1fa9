"""Run Twisted's reactor for one command."""

from __future__ import annotations

import sys
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import click
from twisted.internet.defer import Deferred
from twisted.logger import ILogObserver, LogEvent, LogLevel, formatEvent, globalLogBeginner
from twisted.python.failure import Failure
from zope.interface import provider

from webhookd.reactor import IReactor, run_on_monotonic_time, the_reactor

_T = TypeVar("_T")


def run(main: Callable[[IReactor], Coroutine[Deferred[Any], Any, _T]]) -> _T:
    """Run ``main`` in the reactor. Return its result, or raise its exception."""
    loop = the_reactor()
    run_on_monotonic_time(loop)
    results: list[_T | Failure] = []
    globalLogBeginner.beginLoggingTo([_show], discardBuffer=True, redirectStandardIO=False)

    def start() -> None:
        ended: Deferred[Any] = Deferred.fromCoroutine(main(loop))
        ended.addBoth(results.append).addBoth(lambda _: loop.stop())

    loop.callWhenRunning(start)
    loop.run()
    if not results:
        raise click.Abort  # Ctrl-C stopped the reactor
    (result,) = results
    if isinstance(result, Failure):
        result.raiseException()
    return result


@provider(ILogObserver)
def _show(event: LogEvent) -> None:
    """Write a warning of the daemon's modules to the standard error, as one line."""
    if event["log_level"] >= LogLevel.warn:
        sys.stderr.write(f"webhookd: {formatEvent(event)}\n")

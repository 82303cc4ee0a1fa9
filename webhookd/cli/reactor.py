"""Twisted's reactor for the length of one command."""

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
    """Run ``main`` with the reactor until it ends; return what it returns, or raise what it raises."""
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
        raise click.Abort  # by Ctrl-C
    (result,) = results
    if isinstance(result, Failure):
        result.raiseException()
    return result


@provider(ILogObserver)
def _show(event: LogEvent) -> None:
    """What the daemon's own modules warn of, a line each, where it does not mix with the output."""
    if event["log_level"] >= LogLevel.warn:
        sys.stderr.write(f"webhookd: {formatEvent(event)}\n")

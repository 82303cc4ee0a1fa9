"""Logging as configured: text for people or JSON for machines, from a level up."""

from __future__ import annotations

import sys

from twisted.logger import (
    FilteringLogObserver,
    ILogObserver,
    LogLevel,
    LogLevelFilterPredicate,
    jsonFileLogObserver,
    textFileLogObserver,
)


def make_observer(log_format: str, log_level: str) -> ILogObserver:
    """An observer that writes to stdout, where systemd and containers look for it."""
    if log_format == "json":
        observer = jsonFileLogObserver(sys.stdout, recordSeparator="")
    else:
        observer = textFileLogObserver(sys.stdout)
    level = LogLevel.levelWithName(log_level)
    predicate = LogLevelFilterPredicate(level)
    # One line for each attempt to connect, for as long as Redis is away; the pool itself says what changes.
    predicate.setLogLevelForNamespace("twisted.application._client_service", max(level, LogLevel.warn))
    return FilteringLogObserver(observer, [predicate])

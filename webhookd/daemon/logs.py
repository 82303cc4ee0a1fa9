"""The log: lines of text for people or of JSON for machines, from a level up, and few of one kind.

A JSON line holds the plain fields of its event, bounded in length. Text that may quote a request (that of an
unexpected exception, or a value of another type) is left out, and no value can begin a second line.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Hashable, Mapping
from datetime import datetime
from threading import Lock

from attrs import define
from twisted.application.internet import TimerService
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import (
    FileLogObserver,
    FilteringLogObserver,
    ILogObserver,
    LogEvent,
    LogLevel,
    LogLevelFilterPredicate,
    LogPublisher,
    formatEvent,
)
from twisted.python.failure import Failure
from zope.interface import implementer

from webhookd.model import WebhookdError
from webhookd.text import printable

#: The length of a window, and how many lines of a kind it writes before it only counts them.
WINDOW_S = 10.0
LINES_OF_A_KIND = 10
MAX_KINDS = 100

_MAX_MESSAGE = 2048
_MAX_VALUE = 256
_MAX_FRAMES = 20

# Twisted's older log adds these to the fields of an event.
_NOT_FIELDS = frozenset({"debugInfo", "failure", "format", "isError", "logLevel", "printed", "system", "why"})
# The text of any other exception may quote a value: int() and dict do.
_MAY_BE_QUOTED = (WebhookdError, OSError)


def make_observer(log_format: str, log_level: str) -> RepeatLimiter:
    """Return an observer that writes to stdout, where systemd and containers read logs."""
    level = LogLevel.levelWithName(log_level)
    predicate = LogLevelFilterPredicate(level)
    # It logs each attempt to connect while Redis is away; the pool logs the changes.
    predicate.setLogLevelForNamespace("twisted.application._client_service", max(level, LogLevel.warn))
    writer = FileLogObserver(sys.stdout, FORMATS[log_format])
    return RepeatLimiter(FilteringLogObserver(writer, [predicate]))


# -- lines --------------------------------------------------------------------------------------------------


def text_line(event: LogEvent) -> str:
    """Return time, level and message; a failure follows on lines that begin with a tab."""
    lines = [f"{_time(event)} {_level(event):5} {_message(event)}"]
    failure = _failure(event)
    if failure:
        lines += [*failure["error"].splitlines(), "Traceback (most recent call last):"]
        lines += failure["traceback"].splitlines()
    return "\n\t".join([printable(line) for line in lines]) + "\n"


def json_line(event: LogEvent) -> str:
    """Return one object: ``time``, ``level``, ``logger`` and ``message``, then the event's own fields."""
    ours = {
        "time": _time(event),
        "level": _level(event),
        "logger": event.get("log_namespace", "-"),
        "message": _message(event),
        **_failure(event),
    }
    return (
        json.dumps(ours | _fields(event) | ours) + "\n"
    )  # ours come first, and replace fields of these names


#: By the value of the option ``log_format``.
FORMATS: Mapping[str, Callable[[LogEvent], str]] = {"text": text_line, "json": json_line}


def _time(event: LogEvent) -> str:
    return datetime.fromtimestamp(event.get("log_time", 0)).astimezone().isoformat(timespec="milliseconds")


def _level(event: LogEvent) -> str:
    return str(event.get("log_level", LogLevel.info).name)


def _message(event: LogEvent) -> str:
    text = formatEvent(event)
    if _failure_of(event) is not None:
        text = text.partition("\n")[0]  # Twisted's older log appends the traceback
    return _bounded(text.strip(), _MAX_MESSAGE)


def _fields(event: LogEvent) -> dict[str, object]:
    return {
        name: _bounded(value, _MAX_VALUE) if isinstance(value, str) else value
        for name, value in event.items()
        if _is_plain(value) and not name.startswith("log_") and name not in _NOT_FIELDS
    }


def _is_plain(value: object) -> bool:
    return type(value) in (str, int, bool) or (type(value) is float and math.isfinite(value))


def _failure_of(event: LogEvent) -> Failure | None:
    """Return the failure of an event; Twisted's older log has it under another name."""
    failure: Failure | None = event.get("log_failure", event.get("failure"))
    return failure if isinstance(failure, Failure) else None


def _failure(event: LogEvent) -> dict[str, str]:
    """Return a failure's type, its text if that cannot quote a request, and its traceback."""
    failure = _failure_of(event)
    if failure is None:
        return {}
    error = type(failure.value).__qualname__
    if isinstance(failure.value, _MAY_BE_QUOTED):
        error = _bounded(f"{error}: {failure.value}", _MAX_VALUE)
    frames = [f"{path}:{line} in {function}" for function, path, line, *_ in failure.frames[-_MAX_FRAMES:]]
    return {"error": error, "traceback": "\n".join(frames)}


def _bounded(text: str, maximum: int) -> str:
    return text if len(text) <= maximum else f"{text[:maximum]}…"


# -- floods -------------------------------------------------------------------------------------------------


@define
class _Kind:
    """The lines of one kind in this window: their number, and the last that was not written."""

    lines: int = 0
    last: LogEvent | None = None


@implementer(ILogObserver)
class RepeatLimiter:
    """Writes the first lines of a kind, then counts them, and reports the number when the window ends.

    Only refusals, which have a ``code``, and failures come in floods. Only they are limited: a change of
    state is always written. A kind is what the single request does not change. Senders can invent sources, so
    the number of kinds is limited, too; all later ones count as one kind. Threads may call it.
    """

    def __init__(self, observer: ILogObserver) -> None:
        self._observer = observer
        self._kinds: dict[Hashable, _Kind] = {}
        self._lock = Lock()

    def __call__(self, event: LogEvent) -> None:
        """Write an event, or count it."""
        name = _kind(event)
        if name is None or self._admits(name, event):
            self._observer(event)

    def _admits(self, name: Hashable, event: LogEvent) -> bool:
        with self._lock:
            if name not in self._kinds and len(self._kinds) >= MAX_KINDS:
                name = None
            kind = self._kinds.setdefault(name, _Kind())
            kind.lines += 1
            if kind.lines > LINES_OF_A_KIND:
                kind.last = event
            return kind.last is None

    def end_window(self) -> None:
        """Report the lines that were only counted, and start a new window."""
        write = LogPublisher(self._observer)  # an observer that fails must not end the timer
        with self._lock:
            kinds, self._kinds = self._kinds, {}
        for name, kind in kinds.items():
            if kind.last is not None:
                fields = ("status", "code", "source") if name is not None else ()
                write(_summary(kind.last, kind.lines - LINES_OF_A_KIND, fields))


def _kind(event: LogEvent) -> Hashable:
    failure = _failure_of(event)
    if failure is None and "code" not in event:
        return None
    what = event.get("code") if failure is None else type(failure.value)
    return event.get("log_namespace"), event.get("log_format"), what, event.get("source")


def _summary(last: LogEvent, repeated: int, fields: tuple[str, ...]) -> LogEvent:
    common = ("log_time", "log_level", "log_namespace", *fields)
    return {
        **{name: last[name] for name in common if name in last},
        "log_format": "{repeated} more lines like this one: {log_last}",
        "log_last": _message(last),
        "repeated": repeated,
    }


class LogWindows(TimerService):
    """Ends the windows of a limiter on time, and the last one when the daemon stops."""

    def __init__(self, clock: IReactorTime, limiter: RepeatLimiter) -> None:
        super().__init__(WINDOW_S, limiter.end_window)
        self.clock = clock
        self._limiter = limiter

    def stopService(self) -> Deferred[None]:
        """End the last window."""
        self._limiter.end_window()
        stopped: Deferred[None] = super().stopService()
        return stopped

"""Job options: validated as BullMQ documents them, encoded as BullMQ stores them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import cast

from attrs import frozen

from webhookd.bullmq.keys import check_job_id

MAX_PRIORITY = 2_097_151
"""BullMQ's PRIORITY_LIMIT: a priority takes the upper 21 of the 53 bits of a score."""

_Check = Callable[[str, object], object]
"""Takes an option's name and its value as configured; returns the value as stored, or raises ValueError."""


def _boolean(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"job option {name} must be true or false")
    return value


def _integer(minimum: int, maximum: int = 2**53 - 1) -> _Check:
    # JavaScript and the scores of sorted sets hold integers exactly up to 2**53.
    def check(name: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise ValueError(f"job option {name} must be an integer from {minimum} to {maximum}")
        return value

    return check


def _ratio(name: str, value: object) -> float:
    # NaN is not between any two numbers.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"job option {name} must be a number from 0 to 1")
    return value


def _text(name: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"job option {name} must be a non-empty string")
    return value


def _table(name: str, value: object, checks: Mapping[str, _Check]) -> dict[str, object]:
    if not isinstance(value, Mapping):
        raise ValueError(f"job option {name} must be a table of {', '.join(checks)}")
    for key in value:
        if key not in checks:
            raise ValueError(f"job option {name} has no {key!r}: it has {', '.join(checks)}")
    return {key: checks[key](f"{name}.{key}", item) for key, item in value.items()}


_BACKOFF: Mapping[str, _Check] = {"type": _text, "delay": _integer(0), "jitter": _ratio}


def _backoff(name: str, value: object) -> dict[str, object]:
    """Check a backoff: a number means a fixed delay in ms, and workers may define more types."""
    if isinstance(value, Mapping):
        backoff = _table(name, value, _BACKOFF)
        if "type" not in backoff:
            raise ValueError(f"job option {name} must have a type")
        if backoff["type"] in ("fixed", "exponential") and "delay" not in backoff:
            raise ValueError(f"job option {name} of type {backoff['type']} must have a delay")
        return backoff
    return {"type": "fixed", "delay": _integer(0)(name, value)}


# A count of -1 keeps all. BullMQ takes the age in seconds.
_KEEP: Mapping[str, _Check] = {"age": _integer(0), "count": _integer(-1), "limit": _integer(1)}


def _keep(name: str, value: object) -> object:
    """Check which finished jobs to keep: none (true), all (false), a count, or a table."""
    if isinstance(value, bool):
        return value
    if isinstance(value, Mapping):
        return _table(name, value, _KEEP)
    return _integer(-1)(name, value)


# For each option, the name that it is stored under, and its check.
_OPTIONS: Mapping[str, tuple[str, _Check]] = {
    "attempts": ("attempts", _integer(0)),
    "backoff": ("backoff", _backoff),
    "removeOnComplete": ("removeOnComplete", _keep),
    "removeOnFail": ("removeOnFail", _keep),
    "priority": ("priority", _integer(0, MAX_PRIORITY)),
    "delay": ("delay", _integer(0)),
    "lifo": ("lifo", _boolean),
    "keepLogs": ("kl", _integer(0)),
    "stackTraceLimit": ("stackTraceLimit", _integer(0)),
    "sizeLimit": ("sizeLimit", _integer(0)),
}

_FLOW = "an event has no parent job"
_REFUSED: Mapping[str, str] = {
    "jobId": "the event gives the id",
    "timestamp": "the time of receipt is the timestamp",
    "repeat": "an event happens once",
    "deduplication": "every job would share its id; webhookd deduplicates by job id",
    "debounce": "every job would share its id; webhookd deduplicates by job id",
    "telemetry": "webhookd writes it",
    "parent": _FLOW,
    "failParentOnFailure": _FLOW,
    "continueParentOnFailure": _FLOW,
    "ignoreDependencyOnFailure": _FLOW,
    "removeDependencyOnFailure": _FLOW,
}


def _stored(options: Mapping[str, object]) -> dict[str, object]:
    """Return the options as BullMQ stores them, without the job's id."""
    stored: dict[str, object] = {"attempts": 0}
    for name, value in options.items():
        if name in _REFUSED:
            raise ValueError(f"job option {name} cannot be set: {_REFUSED[name]}")
        if name not in _OPTIONS:
            raise ValueError(f"unknown job option {name!r}")
        stored_name, check = _OPTIONS[name]
        stored[stored_name] = check(name, value)
    return stored


@frozen
class JobOptions:
    """The BullMQ options of a source's jobs, validated; ``priority`` and ``delay_ms`` are 0 by default.

    ``sizeLimit`` is stored but not enforced: BullMQ's own producer would throw the job away.
    """

    priority: int
    delay_ms: int
    lifo: bool
    _head: bytes

    @classmethod
    def from_mapping(cls, options: Mapping[str, object]) -> JobOptions:
        """Validate options, which have the names that BullMQ documents.

        :raises ValueError: an option is unknown, makes no sense here, or has a bad value; one line names it.
        """
        stored = _stored(options)
        head = json.dumps({**stored, "jobId": ""}, ensure_ascii=False, separators=(",", ":"))
        return cls(
            priority=cast(int, stored.get("priority", 0)),
            delay_ms=cast(int, stored.get("delay", 0)),
            lifo=cast(bool, stored.get("lifo", False)),
            head=head.removesuffix('"}').encode(),
        )

    def encode(self, job_id: str) -> bytes:
        """Return the options of one job as JSON.

        :raises ValueError: see `check_job_id`; an id that passed needs no escapes.
        """
        check_job_id(job_id)
        return self._head + job_id.encode() + b'"}'


def with_telemetry(options: bytes, metadata: Mapping[str, str]) -> bytes:
    """Return a job's options, extended by what BullMQ's telemetry hands from a producer to a worker.

    It is stored as ``tm``, a string that holds JSON: a worker with telemetry accepts nothing else.
    """
    text = json.dumps(json.dumps(metadata, separators=(",", ":")))
    return b'%b,"tm":%b}' % (options.removesuffix(b"}"), text.encode())

"""BullMQ's wire format: what a producer that is not BullMQ must write, so that its workers cannot tell.

Layer 1, pure: key names, the encoding of options, the rules for job ids, and the arguments and the reply of
L{ADD_JOBS}, the one script that puts jobs into a queue. The facts are those of the BullMQ packages 5.81 and
6.7, and the differential tests hold this module and the script against both.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from enum import Enum, IntEnum
from importlib.resources import files
from typing import cast

from attrs import Attribute, Factory, field, frozen

from webhookd.model import Job


class Wire(Enum):
    """Which BullMQ a queue's workers run; C{AUTO} goes by the C{version} that Node queues leave in C{meta}.

    It matters only while a queue is paused and empty: 5 keeps its jobs in C{paused}, 6 in C{wait}.
    """

    AUTO = "auto"
    V5 = "5"
    V6 = "6"


# Keys


def _check_prefix(_keys: QueueKeys, _attribute: Attribute[str], prefix: str) -> None:
    if not prefix:
        raise ValueError("the prefix must not be empty")


def _check_queue(_keys: QueueKeys, _attribute: Attribute[str], queue: str) -> None:
    if not queue or ":" in queue:
        raise ValueError("the queue's name must not be empty or contain ':'")


def _key(suffix: str) -> str:
    """An attribute that holds the name of one of the queue's own keys."""
    name = Factory(lambda keys: keys.job(suffix), takes_self=True)
    return cast(str, field(init=False, repr=False, eq=False, default=name))


@frozen
class QueueKeys:
    """The names of a queue's keys: C{<prefix>:<queue>:<suffix>}.

    @raise ValueError: the prefix is empty, or the queue's name is empty or contains C{:}.
    """

    prefix: str = field(validator=_check_prefix)
    queue: str = field(validator=_check_queue)
    wait: str = _key("wait")
    paused: str = _key("paused")
    meta: str = _key("meta")
    id: str = _key("id")
    delayed: str = _key("delayed")
    active: str = _key("active")
    prioritized: str = _key("prioritized")
    failed: str = _key("failed")
    pc: str = _key("pc")
    events: str = _key("events")
    marker: str = _key("marker")

    def job(self, job_id: str) -> str:
        """The key of a job's hash."""
        return f"{self.prefix}:{self.queue}:{job_id}"

    def create_lock(self, job_id: str) -> str:
        """The key of a job's creation lock, webhookd's own; no job has it, since no job id contains C{:}."""
        return f"{self.prefix}:{self.queue}:create-lock:{job_id}"

    @property
    def is_hash_tagged(self) -> bool:
        """Whether all keys share a slot of a Redis Cluster, as a script needs: C{{bull}:q} or C{bull:{q}}."""
        _, _, tail = f"{self.prefix}:{self.queue}".partition("{")
        tag, brace, _ = tail.partition("}")
        return bool(tag and brace)


# Job ids

_OWN_SUFFIXES = frozenset(
    {
        "active",
        "completed",
        "delayed",
        "events",
        "failed",
        "id",
        "limiter",
        "marker",
        "meta",
        "paused",
        "pc",
        "prioritized",
        "repeat",
        "stalled",
        "stalled-check",
        "wait",
        "waiting-children",
    }
)
_JOB_ID = re.compile(r"(?!-?[0-9]+\Z)[A-Za-z0-9._-]{1,255}")


def check_job_id(job_id: str) -> None:
    """Refuse an id that is no safe job id.

    BullMQ refuses integers and C{:} in its clients alone, and nobody refuses the suffix of one of the queue's
    own keys: a job C{meta} is swallowed, a job C{completed} breaks the queue.

    @raise ValueError: not 1 to 255 of C{[A-Za-z0-9._-]}, or an integer, or such a suffix.
    """
    if not _JOB_ID.fullmatch(job_id) or job_id in _OWN_SUFFIXES:
        raise ValueError(f"{job_id!r} cannot be a job id")


# Options

MAX_PRIORITY = 2_097_151
"""BullMQ's PRIORITY_LIMIT: a priority takes the upper 21 of the 53 bits of a score."""

_Check = Callable[[str, object], object]
"""Takes an option's name and its value as configured, returns it as stored, raises ValueError."""


def _boolean(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"job option {name} must be true or false")
    return value


def _integer(minimum: int, maximum: int = 2**53 - 1) -> _Check:
    # What JavaScript and a sorted set's score hold exactly ends at 2**53.
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
        raise ValueError(f"job option {name} must be a text that is not empty")
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
    """A number is short for a fixed delay, in ms; the workers may know types of their own."""
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
    """Which finished jobs to keep: none (true), all (false), a count, or a table."""
    if isinstance(value, bool):
        return value
    if isinstance(value, Mapping):
        return _table(name, value, _KEEP)
    return _integer(-1)(name, value)


# How each option is checked, and the name that it is stored under.
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
    """The options as BullMQ stores them, but for the job's id."""
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
    """The BullMQ options of a source's jobs, validated: C{priority} and C{delay_ms} are 0 where not given.

    C{sizeLimit} is stored but not enforced: BullMQ's own producer would throw the job away.
    """

    priority: int
    delay_ms: int
    lifo: bool
    _head: bytes

    @classmethod
    def from_mapping(cls, options: Mapping[str, object]) -> JobOptions:
        """Options by the names that BullMQ documents.

        @raise ValueError: an option is unknown, makes no sense here, or has a bad value; one line names it.
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
        """The options of one job, as JSON.

        @raise ValueError: see L{check_job_id}; an id that passed needs no escapes.
        """
        check_job_id(job_id)
        return self._head + job_id.encode() + b'"}'


def with_telemetry(options: bytes, metadata: Mapping[str, str]) -> bytes:
    """A job's options, and in them what BullMQ's telemetry hands from a producer to a worker.

    It is stored as C{tm}, a string that holds JSON; a worker whose telemetry is on cannot take anything else.
    """
    text = json.dumps(json.dumps(metadata, separators=(",", ":")))
    return b'%b,"tm":%b}' % (options.removesuffix(b"}"), text.encode())


# The script


@frozen
class Script:
    """A Lua script, and the name that EVALSHA knows it by."""

    text: bytes
    sha1: str = field(init=False)

    @sha1.default
    def _digest(self) -> str:
        return hashlib.sha1(self.text, usedforsecurity=False).hexdigest()


ADD_JOBS = Script(files(__package__).joinpath("lua", "add_jobs.lua").read_bytes())
"""Adds a batch of jobs to one queue, each once. Its head documents KEYS, ARGV and the reply."""


def add_jobs_arguments(
    keys: QueueKeys, jobs: Sequence[Job], *, lock_ttl_ms: int, wire: Wire, set_by: str
) -> tuple[list[str | bytes], list[str | bytes]]:
    """KEYS and ARGV of one call of L{ADD_JOBS}, every one a string.

    C{set_by} is what the creation locks hold, and C{lock_ttl_ms}, at least 1, how long they live.

    @raise ValueError: there is no job, or one of another queue, or no time to live.
    """
    if not jobs or any(job.queue != keys.queue for job in jobs):
        raise ValueError(f"the jobs of one call must all be of the queue {keys.queue!r}, and at least one")
    if lock_ttl_ms < 1:
        raise ValueError("a creation lock must live for at least 1 ms")
    names: list[str | bytes] = [
        keys.wait,
        keys.paused,
        keys.meta,
        keys.id,
        keys.delayed,
        keys.active,
        keys.prioritized,
        keys.pc,
        keys.events,
        keys.marker,
    ]
    values: list[str | bytes] = [set_by, str(lock_ttl_ms), wire.value]
    for job in jobs:
        names += keys.job(job.id), keys.create_lock(job.id)
        values += (
            job.id,
            job.name,
            job.data,
            job.options,
            str(job.timestamp_ms),
            str(job.delay_ms),
            str(job.priority),
            "1" if job.lifo else "0",
        )
    return names, values


class Answer(IntEnum):
    """What L{ADD_JOBS} did with a job; the values are its return codes."""

    ADDED = 1
    LOCK_HELD = 2
    JOB_EXISTS = 3


@frozen
class Refused:
    """Redis did not take this one job, and kept nothing of it.

    The first word of C{reason} is the error's code: C{WRONGTYPE} where something else is in the job's place,
    which repeating does not cure, or what Redis gives for a whole call, such as C{NOPERM}.
    """

    reason: str


def read_reply(reply: object, count: int) -> list[Answer | Refused]:
    """What became of each of C{count} jobs, in order.

    @raise ValueError: the reply is not one of L{ADD_JOBS} to that many jobs.
    """
    if not isinstance(reply, list | tuple) or len(reply) != count:
        raise ValueError(f"the reply is not an answer to each of {count} jobs")
    return [_read_answer(answer) for answer in reply]


_ANSWERS: Mapping[object, Answer] = {answer.value: answer for answer in Answer}


def _read_answer(answer: object) -> Answer | Refused:
    if isinstance(answer, int) and answer in _ANSWERS:
        return _ANSWERS[answer]
    if isinstance(answer, bytes):
        return Refused(answer.decode(errors="replace"))
    if isinstance(answer, str):
        return Refused(answer)
    raise ValueError("an answer is neither a code nor an error")

"""``add_jobs.lua``, the one script that adds jobs to a queue: its arguments and its reply."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from enum import Enum, IntEnum
from importlib.resources import files

from attrs import field, frozen

from webhookd.bullmq.keys import QueueKeys
from webhookd.model import Job


class Wire(Enum):
    """The BullMQ version of the workers; ``AUTO`` reads the ``version`` that Node queues leave in ``meta``.

    It matters only while a queue is paused and empty: 5 keeps its jobs in ``paused``, 6 in ``wait``.
    """

    AUTO = "auto"
    V5 = "5"
    V6 = "6"


@frozen
class Script:
    """A Lua script, and its SHA1 digest, which EVALSHA takes."""

    text: bytes
    sha1: str = field(init=False)

    @sha1.default
    def _digest(self) -> str:
        return hashlib.sha1(self.text, usedforsecurity=False).hexdigest()


ADD_JOBS = Script(files(__package__).joinpath("add_jobs.lua").read_bytes())
"""Adds a batch of jobs to one queue, each once. Its head documents KEYS, ARGV and the reply."""


def add_jobs_arguments(
    keys: QueueKeys, jobs: Sequence[Job], *, lock_ttl_ms: int, wire: Wire, set_by: str
) -> tuple[list[str | bytes], list[str | bytes]]:
    """Return KEYS and ARGV of one call of `ADD_JOBS`, all of them strings.

    ``set_by`` is what the creation locks hold, and ``lock_ttl_ms``, at least 1, is how long they live.

    :raises ValueError: there is no job, or a job of another queue, or no time to live.
    """
    if not jobs or any(job.queue != keys.queue for job in jobs):
        raise ValueError(f"a call is for one or more jobs, all of the queue {keys.queue!r}")
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


class AddResult(IntEnum):
    """The result of `ADD_JOBS` for a job; the values are its return codes."""

    ADDED = 1
    LOCK_HELD = 2
    JOB_EXISTS = 3


@frozen
class AddError:
    """Redis did not add this one job, and kept nothing of it.

    The first word of ``reason`` is the error's code: ``WRONGTYPE`` if something else has the job's key, so
    that repeating is useless, or a code that Redis also gives to whole calls, such as ``NOPERM``.
    """

    reason: str


_RESULTS: Mapping[object, AddResult] = {result.value: result for result in AddResult}


def read_reply(reply: object, count: int) -> list[AddResult | AddError]:
    """Return the result for each of ``count`` jobs, in order.

    :raises ValueError: this is no reply of `ADD_JOBS` to that many jobs.
    """
    if not isinstance(reply, list | tuple) or len(reply) != count:
        raise ValueError(f"the reply is not an answer to each of {count} jobs")
    return [_read_one(item) for item in reply]


def _read_one(item: object) -> AddResult | AddError:
    if isinstance(item, int) and item in _RESULTS:
        return _RESULTS[item]
    if isinstance(item, bytes):
        return AddError(item.decode(errors="replace"))
    raise ValueError("an answer is neither a code nor an error")

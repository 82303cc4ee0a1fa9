"""The names of a queue's keys, and the rules for job ids."""

from __future__ import annotations

import re
from typing import cast

from attrs import Attribute, Factory, field, frozen


def _check_prefix(_keys: QueueKeys, _attribute: Attribute[str], prefix: str) -> None:
    if not prefix:
        raise ValueError("the prefix must not be empty")


def _check_queue(_keys: QueueKeys, _attribute: Attribute[str], queue: str) -> None:
    if not queue or ":" in queue:
        raise ValueError("the queue's name must not be empty or contain ':'")


def _key(suffix: str) -> str:
    """Return an attribute that holds the name of one of the queue's own keys."""
    name = Factory(lambda keys: keys.job(suffix), takes_self=True)
    return cast(str, field(init=False, repr=False, eq=False, default=name))


@frozen
class QueueKeys:
    """The names of a queue's keys: ``<prefix>:<queue>:<suffix>``.

    :raises ValueError: the prefix is empty, or the queue's name is empty or contains ``:``.
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
        """Return the key of a job's hash."""
        return f"{self.prefix}:{self.queue}:{job_id}"

    def create_lock(self, job_id: str) -> str:
        """Return the key of a job's creation lock. It is no job's key, because no job id contains ``:``."""
        return f"{self.prefix}:{self.queue}:create-lock:{job_id}"

    @property
    def is_hash_tagged(self) -> bool:
        """True if all keys share a slot of a Redis Cluster, as a script needs: ``{bull}:q``, ``bull:{q}``."""
        _, _, tail = f"{self.prefix}:{self.queue}".partition("{")
        tag, brace, _ = tail.partition("}")
        return bool(tag and brace)


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
    """Refuse an id that is not safe as a job id.

    BullMQ refuses integers and ``:`` only in its clients, and it accepts the suffix of one of the queue's own
    keys: a job ``meta`` is swallowed, a job ``completed`` breaks the queue.

    :raises ValueError: not 1 to 255 of ``[A-Za-z0-9._-]``, or an integer, or such a suffix.
    """
    if not _JOB_ID.fullmatch(job_id) or job_id in _OWN_SUFFIXES:
        raise ValueError(f"{job_id!r} cannot be a job id")

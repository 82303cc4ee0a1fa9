"""The settings of a queue, without Twisted: the configuration makes them."""

from __future__ import annotations

from collections.abc import Callable

from attrs import frozen

from webhookd.bullmq.script import Wire


@frozen
class QueueSettings:
    """The rules by which jobs are added.

    ``set_by`` returns what a creation lock holds: when and by which replica it was set. ``replicas`` is how
    many of Redis' replicas must have a job before it counts as added.
    """

    prefix: str
    wire: Wire
    lock_ttl_ms: int
    set_by: Callable[[], str]
    replicas: int = 0

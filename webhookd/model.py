"""The values that flow through webhookd, its words for failure, and its two interfaces.

Layer 0: everything may import this module, and it imports nothing of ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, StrEnum
from typing import TYPE_CHECKING

from attrs import frozen
from msgspec import Struct
from zope.interface import Attribute, Interface

if TYPE_CHECKING:  # so that `webhookd health`, which containers start every few seconds, needs no Twisted
    from twisted.internet.defer import Deferred

# The values that each event makes are structs, which take a quarter of the time of attrs' frozen classes.
# They hold no containers, so the garbage collector need not look at them.


class Delivery(Struct, frozen=True, gc=False):
    """One HTTP request of a source, as it was received.

    ``delivery_id`` is the sender's ``X-Chatwoot-Delivery`` header as sent, or None. ``request_id`` names the
    request in its answer and in the log: letters, digits, and ``._-``.
    """

    source: str
    body: bytes
    delivery_id: str | None
    received_at_ms: int
    request_id: bytes = b""

    def __repr__(self) -> str:
        return f"<Delivery {self.delivery_id!r} of {self.source}, {len(self.body)} bytes>"


class Event(Struct, frozen=True, gc=False):
    """What a delivery says happened: the event's name as sent, and the id that its job gets."""

    name: str
    job_id: str


class Job(Struct, frozen=True, gc=False):
    """What the workers get: one BullMQ job, encoded as it will be stored.

    ``data`` and ``options`` are JSON texts; ``timestamp_ms`` is the time of receipt.
    A ``delay_ms`` above zero wins over ``priority``, which wins over ``lifo``, as in BullMQ.
    """

    queue: str
    id: str
    name: str
    data: bytes
    options: bytes
    timestamp_ms: int
    delay_ms: int = 0
    priority: int = 0
    lifo: bool = False

    def __repr__(self) -> str:
        return f"<Job {self.id} in {self.queue}, {len(self.data)} bytes>"

    @property
    def size_bytes(self) -> int:
        """About how much room the job takes on the wire and on disk."""
        return len(self.data) + len(self.options) + len(self.name) + len(self.id)


class Outcome(StrEnum):
    """What became of an event; the value is what the sender reads as ``status``."""

    QUEUED = "queued"
    ALREADY_QUEUED = "already_queued"
    SPOOLED = "spooled"
    IGNORED = "ignored"


class Receipt(Struct, frozen=True, gc=False):
    """The answer to an event that was taken, or that nobody wants."""

    outcome: Outcome
    job_id: str
    event: str


class WebhookdError(Exception):
    """The root of webhookd's own errors."""


class ConfigError(WebhookdError):
    """The configuration cannot be used; the message is one line, for the operator."""


class Refusal(WebhookdError):
    """A request that is not taken.

    ``code`` is a stable word for machines, from a closed set; the message is for people and repeats
    nothing of the request.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class BadRequest(Refusal):
    """The body cannot become an event."""


class Unauthorized(Refusal):
    """The request shows no valid credential."""


class UnknownSource(Refusal):
    """No source of that name is configured."""


class UnsupportedMedia(Refusal):
    """The body says of itself that it is something else than JSON."""


class TooMany(Refusal):
    """Too much is under way at once; the same request may be taken a little later."""


class RedisErrorKind(Enum):
    """Why Redis did not take a job: the kinds of its error replies, and two of our own."""

    DISCONNECTED = "disconnected"
    TIMEOUT = "timeout"
    READONLY = "readonly"
    LOADING = "loading"
    MASTERDOWN = "masterdown"
    NOREPLICAS = "noreplicas"
    OOM = "oom"
    MISCONF = "misconf"
    BUSY = "busy"
    NOAUTH = "noauth"
    NOPERM = "noperm"
    CLUSTER = "cluster"
    WRONGTYPE = "wrongtype"
    OTHER = "other"


class QueueUnavailable(WebhookdError):
    """Redis could not take the job now.

    ``unknown`` is true where the command was sent and its outcome is not known: the job may have
    been added. Repeating it is safe, because the script adds a job id once.
    """

    def __init__(self, kind: RedisErrorKind, message: str, *, unknown: bool = False) -> None:
        super().__init__(message)
        self.kind = kind
        self.unknown = unknown


class JobRefused(WebhookdError):
    """Redis refused this one job for its own sake; repeating it will not help."""


class SpoolUnavailable(WebhookdError):
    """The spool could not take the job: off, full or broken."""


class IJobSink(Interface):
    """Where jobs go."""

    def add(job: Job) -> Deferred[Receipt]:
        """Add one job, once.

        Fires with a receipt of ``QUEUED`` or ``ALREADY_QUEUED``; fails with `QueueUnavailable`
        or `JobRefused`. Cancelling the Deferred does not take the job back.
        """


@frozen
class SpoolRecord:
    """One job in a spool; ``sequence`` gives its place in the order of arrival."""

    sequence: int
    job: Job


@frozen
class SpoolStats:
    """What a spool holds: live records, their bytes, the receipt time of the first, and what was set aside.

    ``problem`` says why the next append would fail, as far as is known: None, or the message of a
    `SpoolUnavailable`.
    """

    records: int
    bytes: int
    oldest_received_at_ms: int | None
    dead_records: int
    corrupt_records: int
    problem: str | None = None


class ISpool(Interface):
    """A durable, bounded FIFO of jobs on local disk, unique by queue and job id."""

    stats: SpoolStats = Attribute("What the spool holds now; cheap to read, no I/O.")
    is_empty: bool = Attribute("Whether no job is in it or on its way into it, so that none is overtaken.")

    def until_open() -> Deferred[None] | None:
        """Fires once it is known what the spool holds, or that there is none; None where it is by now."""

    def append(job: Job) -> Deferred[Receipt]:
        """Put a job at the end.

        Fires only after the commit is on disk: ``SPOOLED``, or ``ALREADY_QUEUED`` where the spool
        already holds that job id. Fails with `SpoolUnavailable`.
        """

    def first(limit: int, max_bytes: int) -> Deferred[Sequence[SpoolRecord]]:
        """The oldest records, in order: at most ``limit``, and at most ``max_bytes`` but for the first."""

    def remove(sequences: Sequence[int]) -> Deferred[None]:
        """Forget records that are safe elsewhere now; unknown ones are passed over."""

    def bury(sequence: int, reason: str) -> Deferred[None]:
        """Move a record that can never be queued to the dead letters."""

    def check() -> Deferred[None]:
        """Write something and fsync it, for health; fails with `SpoolUnavailable` where no append can."""

    def expire_dead() -> Deferred[int]:
        """Delete what was set aside longer ago than its age limit; fires with the number of records."""

    def close() -> Deferred[None]:
        """Finish what waits, close the files and let go of the directory.

        From then on all else fails with `SpoolUnavailable`.
        """

"""The values that flow through webhookd, its errors, and its two interfaces.

Every module may import this one. It imports no other module of webhookd.
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

# The values that every event creates are structs: they take a quarter of the time of attrs' frozen classes.
# They hold no containers, so the garbage collector need not track them.


class Delivery(Struct, frozen=True, gc=False):
    """One HTTP request of a source, as it was received.

    ``delivery_id`` is the value of the ``X-Chatwoot-Delivery`` header, or None. ``request_id`` identifies the
    request in its answer and in the log. It consists of letters, digits, and ``._-``.
    """

    source: str
    body: bytes
    delivery_id: str | None
    received_at_ms: int
    request_id: bytes = b""

    def __repr__(self) -> str:
        return f"<Delivery {self.delivery_id!r} of {self.source}, {len(self.body)} bytes>"


class Event(Struct, frozen=True, gc=False):
    """An event that a delivery reports: its name as sent, and the id of its job."""

    name: str
    job_id: str


class Job(Struct, frozen=True, gc=False):
    """One BullMQ job for the workers, encoded as Redis will store it.

    ``data`` and ``options`` are JSON texts. ``timestamp_ms`` is the time of receipt.
    As in BullMQ, a ``delay_ms`` above zero overrides ``priority``, which overrides ``lifo``.
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
        """Approximate size of the job on the wire and on disk."""
        return len(self.data) + len(self.options) + len(self.name) + len(self.id)


class Outcome(StrEnum):
    """The outcome of an event; its value is the ``status`` in the answer to the sender."""

    QUEUED = "queued"
    ALREADY_QUEUED = "already_queued"
    SPOOLED = "spooled"
    IGNORED = "ignored"


class Receipt(Struct, frozen=True, gc=False):
    """The result for an event that was accepted, or ignored by configuration."""

    outcome: Outcome
    job_id: str
    event: str


class WebhookdError(Exception):
    """The base class of webhookd's errors."""


class ConfigError(WebhookdError):
    """The configuration is invalid; the message is one line, for the operator."""


class Refusal(WebhookdError):
    """A request that is refused.

    ``code`` is a stable identifier for programs, from a closed set. The message is for people, and repeats
    nothing from the request.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class BadRequest(Refusal):
    """The body is not a valid event."""


class Unauthorized(Refusal):
    """The request has no valid credential."""


class UnknownSource(Refusal):
    """No source with this name is configured."""


class UnsupportedMedia(Refusal):
    """The declared content type is not JSON."""


class TooMany(Refusal):
    """Too many requests are in progress; the same request may be accepted a little later."""


class RedisErrorKind(Enum):
    """Reasons why Redis did not accept a job: its error replies, or ``DISCONNECTED`` and ``TIMEOUT``."""

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
    """Redis cannot accept the job now.

    ``unknown`` is true if the command was sent but its outcome is unknown: Redis may have added the job.
    Repeating the command is safe, because the script adds each job id once.
    """

    def __init__(self, kind: RedisErrorKind, message: str, *, unknown: bool = False) -> None:
        super().__init__(message)
        self.kind = kind
        self.unknown = unknown


class JobRefused(WebhookdError):
    """Redis refused this job because of the job itself; repeating it will not help."""


class SpoolUnavailable(WebhookdError):
    """The spool cannot accept the job: it is off, full or broken."""


class IJobSink(Interface):
    """A destination for jobs."""

    def add(job: Job) -> Deferred[Receipt]:
        """Add one job, once.

        Fires with a receipt of ``QUEUED`` or ``ALREADY_QUEUED``. Fails with `QueueUnavailable`
        or `JobRefused`. Cancelling the Deferred does not withdraw the job.
        """


@frozen
class SpoolRecord:
    """One job in a spool; ``sequence`` is its position in order of arrival."""

    sequence: int
    job: Job


@frozen
class SpoolStats:
    """The contents of a spool.

    ``records``, ``bytes`` and ``oldest_received_at_ms`` describe the live records. ``dead_records`` and
    ``corrupt_records`` count those that were set aside. ``problem`` is the reason why the next append is
    expected to fail (the message of a `SpoolUnavailable`), or None.
    """

    records: int
    bytes: int
    oldest_received_at_ms: int | None
    dead_records: int
    corrupt_records: int
    problem: str | None = None


class ISpool(Interface):
    """A durable, bounded FIFO of jobs on local disk, unique by queue and job id."""

    stats: SpoolStats = Attribute("The current contents of the spool; reading it does no I/O.")
    is_empty: bool = Attribute("True if no job is in the spool or about to enter it, so none is overtaken.")

    def until_open() -> Deferred[None] | None:
        """Return None if the spool has opened or failed to open; else a Deferred that fires when it has."""

    def append(job: Job) -> Deferred[Receipt]:
        """Add a job at the end.

        Fires only after the commit is on disk: with ``SPOOLED``, or with ``ALREADY_QUEUED`` if the spool
        already holds that job id. Fails with `SpoolUnavailable`.
        """

    def first(limit: int, max_bytes: int) -> Deferred[Sequence[SpoolRecord]]:
        """Read the oldest records, in order: at most ``limit`` of them.

        Together they have at most ``max_bytes``, unless the first alone has more.
        """

    def remove(sequences: Sequence[int]) -> Deferred[None]:
        """Delete records that are now safe elsewhere; unknown sequences are ignored."""

    def bury(sequence: int, reason: str) -> Deferred[None]:
        """Move a record that can never be queued to the dead letters."""

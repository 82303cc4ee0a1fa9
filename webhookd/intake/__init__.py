"""From a delivery and its credentials to a receipt: authenticate, parse, filter, encode, deliver."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import TypeAlias

import msgspec
from attrs import field, frozen
from twisted.internet.defer import Deferred, succeed
from twisted.logger import Logger

from webhookd.bullmq.options import JobOptions
from webhookd.chatwoot.payload import Fallback, parse
from webhookd.intake.auth import Authenticator, Credentials
from webhookd.model import Delivery, Event, Job, Outcome, Receipt, Unauthorized, UnknownSource

Accept: TypeAlias = Callable[[Delivery, Credentials], Deferred[Receipt]]

#: Encodes a delivery as a job's data.
Encoder: TypeAlias = Callable[[Delivery], bytes]

_log = Logger()


@frozen
class SourcePolicy:
    """The rules for one source; ``events`` are the names of the wanted events, and None means all."""

    authenticator: Authenticator
    events: frozenset[str] | None
    queue: str
    options: JobOptions


@frozen
class Intake:
    """Accepts the deliveries of all sources.

    ``signature_failures`` counts by source and code; ``secrets_used`` counts by source and position.
    """

    sources: Mapping[str, SourcePolicy]
    encode: Encoder
    fallback: Fallback
    deliver: Callable[[Job], Deferred[Receipt]]
    signature_failures: Counter[tuple[str, str]] = field(factory=Counter)
    secrets_used: Counter[tuple[str, int]] = field(factory=Counter)

    def accept(self, delivery: Delivery, credentials: Credentials) -> Deferred[Receipt]:
        """Accept one delivery.

        Raises a `webhookd.model.Refusal` at once. The Deferred fires with a receipt, or fails as ``deliver``
        does.
        """
        source = self.sources.get(delivery.source)
        if source is None:
            raise UnknownSource("unknown_source", "no source of this name is configured")
        self._authenticate(source, delivery, credentials)
        event = parse(delivery, self.fallback)
        if source.events is not None and event.name not in source.events:
            return succeed(Receipt(Outcome.IGNORED, event.job_id, event.name))
        return self.deliver(self._job(source, delivery, event))

    def _authenticate(self, source: SourcePolicy, delivery: Delivery, credentials: Credentials) -> None:
        now_s = delivery.received_at_ms / 1000
        try:
            position = source.authenticator.verify(credentials, delivery.body, now_s)
        except Unauthorized as error:
            self.signature_failures[delivery.source, error.code] += 1
            raise
        if position is not None:
            self.secrets_used[delivery.source, position] += 1

    def _job(self, source: SourcePolicy, delivery: Delivery, event: Event) -> Job:
        options = source.options
        return Job(
            queue=source.queue,
            id=event.job_id,
            name=event.name,
            data=self.encode(delivery),
            options=options.encode(event.job_id),
            timestamp_ms=delivery.received_at_ms,
            delay_ms=options.delay_ms,
            priority=options.priority,
            lifo=options.lifo,
        )


def log_deliveries(accept: Accept, seconds: Callable[[], float]) -> Accept:
    """Return a function like ``accept`` that also logs each accepted delivery; ``seconds`` is the clock."""

    def accept_and_log(delivery: Delivery, credentials: Credentials) -> Deferred[Receipt]:
        began_s = seconds()

        def log(receipt: Receipt) -> Receipt:
            _log.debug(
                "{outcome} {job_id} of {source} in {duration_ms} ms, request {request_id}",
                outcome=receipt.outcome.value,
                event=receipt.event,
                job_id=receipt.job_id,
                source=delivery.source,
                request_id=delivery.request_id.decode(),
                duration_ms=round((seconds() - began_s) * 1000, 3),
            )
            return receipt

        return accept(delivery, credentials).addCallback(log)

    return accept_and_log


def payload(delivery: Delivery) -> bytes:
    """Return the body, byte for byte as it was sent and signed."""
    return delivery.body


def envelope(delivery: Delivery) -> bytes:
    """Return an object with the same bytes under ``payload``, next to what only the receiver knows.

    The sender chooses the delivery id, so it is escaped. A source's name and a request id need no escapes.
    """
    delivery_id = msgspec.json.encode(delivery.delivery_id)
    head = b'{"source":"%b","deliveryId":%b,"requestId":"%b","receivedAt":%d,"payload":' % (
        delivery.source.encode(),
        delivery_id,
        delivery.request_id,
        delivery.received_at_ms,
    )
    return head + delivery.body + b"}"


#: The encoders by value of the option ``job_data``.
ENCODERS: Mapping[str, Encoder] = {"payload": payload, "envelope": envelope}

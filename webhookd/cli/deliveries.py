"""Deliveries like those of Chatwoot: distinct events, and the headers of their requests. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from uuid import UUID

from webhookd.chatwoot.payload import hash_of_body, parse
from webhookd.config import Source
from webhookd.intake.auth import sign
from webhookd.model import BadRequest, Delivery

_PARTS_OF_AN_UPDATE = 5  # of its job id; the last one is the delivery id


def event_numbers(count: int, duplicates_percent: float) -> Iterator[int]:
    """Yield a number for each request: a new one, or for this percentage the previous one again."""
    number = 0
    for position in range(count):
        repeats = int((position + 1) * duplicates_percent / 100) > int(position * duplicates_percent / 100)
        if position and not repeats:
            number += 1
        yield number


def renumbered(body: bytes, number: int) -> bytes:
    """Return the event with another message, conversation or contact id, if that makes it another event.

    If only another delivery id does, or if the body is not an event, return the body unchanged.
    """
    try:
        event = parse(Delivery("x", body, None, 0), hash_of_body)
    except BadRequest:
        return body
    parts = event.job_id.split(".")
    if len(parts) == _PARTS_OF_AN_UPDATE:
        return body
    return re.sub(rb'("id"\s*:\s*)%s\b' % parts[-1].encode(), rb"\g<1>%d" % number, body)


def delivery_id(number: int) -> str:
    """Return the value of ``X-Chatwoot-Delivery`` for a number; equal numbers have equal values."""
    return str(UUID(int=number))


def signature_headers(secret: str, body: bytes, now_s: int) -> dict[str, str]:
    """Return the headers that sign a body at this second."""
    timestamp = str(now_s)
    return {
        "X-Chatwoot-Timestamp": timestamp,
        "X-Chatwoot-Signature": sign(secret.encode(), timestamp.encode(), body).decode(),
    }


def headers(source: Source, body: bytes, number: int, now_s: int) -> Mapping[str, str]:
    """Return all headers of a request: signed if the source has a secret, else with its token if any."""
    fields = {
        "Content-Type": "application/json",
        "Accept": "application/json",
        "X-Chatwoot-Delivery": delivery_id(number),
    }
    if source.secrets:
        return fields | signature_headers(source.secrets[0], body, now_s)
    if source.tokens:
        return fields | {"Authorization": f"Bearer {source.tokens[0]}"}
    return fields

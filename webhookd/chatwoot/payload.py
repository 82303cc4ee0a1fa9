"""Chatwoot's payloads, pure: from raw bytes to an event and its deterministic job id.

The scheme of the ids follows Chatwoot 4.15's listeners and presenters: message ids are unique in an
installation, conversation ids only in an account, and one record has many updates.

A job id reads ``SOURCE.EVENT.SCOPE.ENTITY`` or ``SOURCE.EVENT.SCOPE.ENTITY.DISCRIMINATOR``:

* SCOPE: the inbox id, or ``a`` and the account id if a payload has no inbox;
* ENTITY: the id of the message, conversation, contact, … that the event is about;
* DISCRIMINATOR, absent on ``*_created`` of messages, conversations and contacts, which happen once: the
  sender's delivery id, which is new for each event and the same for each repeat of one event.

An id has only ``[A-Za-z0-9._-]`` and starts with a letter, so BullMQ accepts it, and it never equals another
key of the queue.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from hashlib import sha256
from secrets import token_hex
from typing import Any, TypeAlias

import msgspec

from webhookd.model import BadRequest, Delivery, Event

#: The events of Chatwoot 4.17. Other names are events too, under their own name.
EVENTS = frozenset(
    {
        "message_created",
        "message_updated",
        "conversation_created",
        "conversation_updated",
        "conversation_status_changed",
        "conversation_opened",
        "conversation_resolved",
        "conversation_typing_on",
        "conversation_typing_off",
        "contact_created",
        "contact_updated",
        "webwidget_triggered",
        "inbox_created",
        "inbox_updated",
        "account_created",
        "automation_event.conversation_created",
        "automation_event.conversation_updated",
        "automation_event.conversation_opened",
        "automation_event.conversation_resolved",
        "automation_event.message_created",
        "macro.executed",
    }
)

#: Makes a discriminator from the raw body, for a delivery without a delivery id.
Fallback: TypeAlias = Callable[[bytes], str]

_MAX_EVENT_NAME = 64
_MAX_ID = 2**63 - 1  # PostgreSQL's bigint: no id of Chatwoot's is larger
_MAX_TOLERATED_BYTES = 1_048_576  # json.loads takes 30 times as much memory, and a second for 16 MiB

_NOT_IN_AN_EVENT_NAME = re.compile(r"[^a-z0-9_]")
_DELIVERY_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class _Entity(msgspec.Struct):
    id: int | None = None


class _Conversation(msgspec.Struct):
    id: int | None = None
    inbox_id: int | None = None
    account: _Entity | None = None


class _Payload(msgspec.Struct):
    """The fields that make a job id; msgspec checks the syntax of all others and skips them."""

    event: str
    id: int | None = None
    inbox_id: int | None = None
    account: _Entity | None = None
    inbox: _Entity | None = None
    conversation: _Conversation | None = None
    channel: _Entity | None = None


_decode = msgspec.json.Decoder(_Payload).decode


def parse(delivery: Delivery, fallback: Fallback) -> Event:
    """Read a delivery's body.

    Raises `BadRequest` with the code ``not_utf8``, ``not_json``, ``not_an_object`` or ``no_event``.
    """
    payload = _read(delivery.body)
    scope, entity, happens_once = _identify(payload)
    parts = [delivery.source, _event_part(payload.event[:_MAX_EVENT_NAME]), scope, entity]
    if not happens_once:
        parts.append(_discriminator(delivery, fallback))
    return Event(name=payload.event, job_id=".".join(parts))


def hash_of_body(body: bytes) -> str:
    """Return a hash: repeats are dropped, and so is a later event with an equal body."""
    return "h" + sha256(body).hexdigest()[:32]


def random_id(_body: bytes) -> str:
    """Return a random id: no event is dropped, and a repeat becomes a second job."""
    return "r" + token_hex(16)


#: The fallbacks by value of the option ``id_fallback``.
FALLBACKS: Mapping[str, Fallback] = {"hash": hash_of_body, "none": random_id}


def _discriminator(delivery: Delivery, fallback: Fallback) -> str:
    delivery_id = (delivery.delivery_id or "").lower()
    return delivery_id if _DELIVERY_ID.fullmatch(delivery_id) else fallback(delivery.body)


@lru_cache(maxsize=256)
def _event_part(name: str) -> str:
    return _NOT_IN_AN_EVENT_NAME.sub("_", name)


# -- ids ----------------------------------------------------------------------------------------------------

_HAPPEN_ONCE = frozenset({"message_created", "conversation_created", "contact_created"})
_OF_AN_ACCOUNT = frozenset({"contact_created", "contact_updated"})


def _identify(payload: _Payload) -> tuple[str, str, bool]:
    """Return the scope, the entity, and whether these two identify the event."""
    event = payload.event
    if event.startswith("inbox_"):
        channel_id = _positive(payload.channel and payload.channel.id)
        return _account(payload), f"ch{channel_id}" if channel_id else "0", False
    if event.startswith("conversation_typing_"):
        entity = _positive(payload.conversation and payload.conversation.id)
    else:
        entity = _positive(payload.id)
    inbox = 0 if event in _OF_AN_ACCOUNT else _inbox(payload)
    scope = str(inbox) if inbox else _account(payload)
    complete = bool(entity) and (inbox or (event in _OF_AN_ACCOUNT and scope != "a0"))
    return scope, str(entity), bool(event in _HAPPEN_ONCE and complete)


def _inbox(payload: _Payload) -> int:
    return (
        _positive(payload.inbox_id)
        or _positive(payload.inbox and payload.inbox.id)
        or _positive(payload.conversation and payload.conversation.inbox_id)
    )


def _account(payload: _Payload) -> str:
    of_conversation = payload.conversation and payload.conversation.account
    account_id = _positive(payload.account and payload.account.id) or _positive(
        of_conversation and of_conversation.id
    )
    return f"a{account_id}"


def _positive(value: object) -> int:
    """Return a positive JSON integer unchanged, and 0 for all else, such as ``true``, ``1.0`` and ``"1"``."""
    if type(value) is int and 0 < value <= _MAX_ID:
        return value
    return 0


# -- reading ------------------------------------------------------------------------------------------------


def _read(body: bytes) -> _Payload:
    try:
        text = body.decode()
    except UnicodeDecodeError:
        raise BadRequest("not_utf8", "the body is not UTF-8") from None
    try:
        payload = _decode(body)
    except (msgspec.DecodeError, RecursionError):
        if len(body) > _MAX_TOLERATED_BYTES:
            raise BadRequest("not_json", "the body is not JSON, or too irregular for its size") from None
        payload = _read_tolerantly(text)
    if not payload.event:
        raise BadRequest("no_event", "the body names no event")
    return payload


def _read_tolerantly(text: str) -> _Payload:
    """Read what msgspec rejects: fields of unexpected types, lone surrogates, numbers out of range.

    JSON.parse in a worker accepts all of these, so a refusal would lose an event without need.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_int=_parse_int)
    except (ValueError, RecursionError):
        raise BadRequest("not_json", "the body is not JSON") from None
    if not isinstance(value, dict):
        raise BadRequest("not_an_object", "the body is not a JSON object")
    event = value.get("event")
    if not isinstance(event, str):
        raise BadRequest("no_event", "the body names no event")
    conversation = _object(value, "conversation")
    return _Payload(
        event=event.encode("utf-8", "replace").decode(),
        id=value.get("id"),
        inbox_id=value.get("inbox_id"),
        account=_Entity(_object(value, "account").get("id")),
        inbox=_Entity(_object(value, "inbox").get("id")),
        conversation=_Conversation(
            conversation.get("id"),
            conversation.get("inbox_id"),
            _Entity(_object(conversation, "account").get("id")),
        ),
        channel=_Entity(_object(value, "channel").get("id")),
    )


def _object(value: dict[str, Any], key: str) -> dict[str, Any]:
    inner = value.get(key)
    return inner if isinstance(inner, dict) else {}


def _refuse_constant(name: str) -> object:
    raise ValueError(name)  # NaN and Infinity are not JSON


def _parse_int(digits: str) -> int | float:
    """Return a float for a long integer, as JSON.parse does: Python limits the digits of an int."""
    return int(digits) if len(digits) < 20 else float(digits)

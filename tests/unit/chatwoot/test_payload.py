"""From raw bytes to an event: each row of the scheme of job ids, and bodies that are not events."""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from webhookd.bullmq.keys import check_job_id
from webhookd.chatwoot.payload import FALLBACKS, _decode, _Payload, _read_tolerantly, hash_of_body, parse
from webhookd.model import BadRequest, Delivery, Event
from webhookd.samples import SAMPLES, Sample

DELIVERY_ID = "587b7988-4119-4eae-865f-daed46efd912"
JOB_ID = re.compile(
    r"[a-z][a-z0-9_-]{0,31}\.[a-z0-9_]{1,64}\.a?[0-9]{1,19}\.(ch)?[0-9]{1,19}(\.[0-9a-z-]{33,36})?"
)
LONGEST_SOURCE = "a" + 31 * "b"
JSON_SPACE = b" \t\r\n"


def body(event: object, **fields: object) -> bytes:
    return json.dumps({**fields, "event": event}).encode()


def read(content: bytes, delivery_id: str | None = DELIVERY_ID, source: str = "chatwoot") -> Event:
    return parse(Delivery(source, content, delivery_id, 0), hash_of_body)


def read_sample(sample: Sample) -> Event:
    return read(sample.body, sample.headers.get("X-Chatwoot-Delivery"))


class SampleTests(SynchronousTestCase):
    def test_every_sample_gets_its_event_and_job_id(self) -> None:
        self.assertTrue(SAMPLES)
        for sample in SAMPLES.values():
            with self.subTest(sample.name):
                self.assertEqual(read_sample(sample), Event(sample.event, sample.job_id))

    def test_message_412_and_conversation_412_of_one_inbox_are_two_jobs(self) -> None:
        message = read_sample(SAMPLES["message_created.id_collides_with_conversation"])
        conversation = read_sample(SAMPLES["conversation_created"])

        self.assertEqual(message.job_id, "chatwoot.message_created.7.412")
        self.assertEqual(conversation.job_id, "chatwoot.conversation_created.7.412")

    def test_two_updates_with_the_same_bytes_are_two_jobs(self) -> None:
        delivered = SAMPLES["message_updated.old_message_delivered"]
        was_read = SAMPLES["message_updated.old_message_read"]

        self.assertEqual(delivered.body, was_read.body)
        self.assertNotEqual(read_sample(delivered).job_id, read_sample(was_read).job_id)

    def test_two_updates_with_the_same_bytes_and_no_delivery_id_are_one_job(self) -> None:
        content = SAMPLES["message_updated.old_message_read"].body

        self.assertEqual(read(content, None), read(content, None))


class JobIdTests(SynchronousTestCase):
    def assert_job_id(self, expected: str, event: object, **fields: object) -> None:
        self.assertEqual(read(body(event, **fields)).job_id, f"chatwoot.{expected}")

    def test_each_kind_of_event_has_its_scope_and_entity_and_discriminator(self) -> None:
        message = {
            "id": 98765,
            "inbox": {"id": 7},
            "account": {"id": 1},
            "conversation": {"id": 412, "inbox_id": 7},
        }
        conversation = {
            "id": 412,
            "inbox_id": 7,
            "account": {"id": 1},
            "messages": [{"id": 98765, "inbox_id": 9}],
        }
        contact = {"id": 555, "account": {"id": 1}}
        widget = {"id": 31, "inbox": {"id": 7}, "account": {"id": 1}, "current_conversation": {"id": 412}}
        typing = {"conversation": {"id": 412, "inbox_id": 7, "account": {"id": 1}}, "user": {"id": 3}}
        inbox = {"channel": {"id": 12}, "account": {"id": 1}, "working_hours": [{"inbox_id": 7}]}
        rows: list[tuple[str, dict[str, Any], str, bool]] = [
            ("message_created", message, "7.98765", True),
            ("message_updated", message, "7.98765", False),
            ("conversation_created", conversation, "7.412", True),
            ("conversation_updated", conversation, "7.412", False),
            ("conversation_status_changed", conversation, "7.412", False),
            ("conversation_opened", conversation, "7.412", False),
            ("conversation_resolved", conversation, "7.412", False),
            ("automation_event.conversation_created", conversation, "7.412", False),
            ("automation_event.conversation_updated", conversation, "7.412", False),
            ("automation_event.conversation_opened", conversation, "7.412", False),
            ("automation_event.conversation_resolved", conversation, "7.412", False),
            ("automation_event.message_created", conversation, "7.412", False),
            ("macro.executed", conversation, "7.412", False),
            ("contact_created", contact, "a1.555", True),
            ("contact_updated", contact, "a1.555", False),
            ("webwidget_triggered", widget, "7.31", False),
            ("conversation_typing_on", typing, "7.412", False),
            ("conversation_typing_off", typing, "7.412", False),
            ("inbox_created", inbox, "a1.ch12", False),
            ("inbox_updated", inbox, "a1.ch12", False),
            ("account_created", {"id": 1}, "a0.1", False),
            ("something_new", {"id": 8, "inbox_id": 7}, "7.8", False),
            ("something_new", {"id": 8, "inbox": {"id": 7}}, "7.8", False),
            ("something_new", {"id": 8, "conversation": {"inbox_id": 7}}, "7.8", False),
            ("something_new", {"id": 8, "account": {"id": 1}}, "a1.8", False),
            ("something_new", {"account": {"id": 1}}, "a1.0", False),
            ("something_new", {}, "a0.0", False),
        ]
        for event, fields, identity, happens_once in rows:
            with self.subTest(f"{event} {identity}"):
                ending = "" if happens_once else f".{DELIVERY_ID}"
                self.assert_job_id(f"{event.replace('.', '_')}.{identity}{ending}", event, **fields)

    def test_a_contact_is_never_scoped_by_an_inbox(self) -> None:
        self.assert_job_id("contact_created.a1.5", "contact_created", id=5, account={"id": 1}, inbox_id=7)

    def test_an_event_that_happens_once_gets_a_discriminator_if_an_id_is_missing(self) -> None:
        rows: list[tuple[str, dict[str, Any], str]] = [
            ("message_created", {"inbox": {"id": 7}}, "7.0"),
            ("message_created", {"id": 5, "account": {"id": 1}}, "a1.5"),
            ("message_created", {"id": 5}, "a0.5"),
            ("conversation_created", {"inbox_id": 7}, "7.0"),
            ("conversation_created", {"id": 5, "account": {"id": 1}}, "a1.5"),
            ("contact_created", {"account": {"id": 1}}, "a1.0"),
            ("contact_created", {"id": 5}, "a0.5"),
            ("contact_created", {"id": 5, "inbox_id": 7}, "a0.5"),
        ]
        for event, fields, identity in rows:
            with self.subTest(f"{event} {fields}"):
                self.assert_job_id(f"{event}.{identity}.{DELIVERY_ID}", event, **fields)

    def test_only_a_positive_integer_of_postgresql_is_an_id(self) -> None:
        no_ids = [None, True, False, 0, -5, 1.0, 1.5, 1e30, "5", "", [], [5], {}, {"id": 5}]
        no_ids += [2**63, 2**64, 10**5000]
        for value in no_ids:
            raw = b'{"event":"message_created","inbox":{"id":7},"id":%b}' % (
                b"1" + 5000 * b"0" if value == 10**5000 else json.dumps(value).encode()
            )
            with self.subTest(raw[:80]):
                self.assertEqual(read(raw).job_id, f"chatwoot.message_created.7.0.{DELIVERY_ID}")

    def test_the_largest_id(self) -> None:
        self.assert_job_id(f"message_created.7.{2**63 - 1}", "message_created", id=2**63 - 1, inbox={"id": 7})

    def test_objects_that_are_something_else_have_no_ids(self) -> None:
        for value in (None, True, 5, 1.5, "inbox", [{"id": 7}]):
            fields = dict.fromkeys(("inbox", "account", "conversation", "channel"), value)
            for event, identity in (("message_created", "a0.5"), ("inbox_created", "a0.0")):
                with self.subTest(f"{event} {value}"):
                    self.assert_job_id(f"{event}.{identity}.{DELIVERY_ID}", event, id=5, **fields)

    def test_an_id_of_another_type_spoils_no_other_id(self) -> None:
        self.assert_job_id(
            f"conversation_typing_on.7.412.{DELIVERY_ID}",
            "conversation_typing_on",
            id="x",
            conversation={"id": 412, "inbox_id": 7, "account": "none"},
        )

    def test_a_delivery_id_counts_in_upper_case_and_in_lower_case_alike(self) -> None:
        content = body("message_updated", id=5, inbox={"id": 7})

        self.assertEqual(read(content, DELIVERY_ID.upper()), read(content, DELIVERY_ID))

    def test_anything_but_a_uuid_is_no_delivery_id(self) -> None:
        content = body("message_updated", id=5, inbox={"id": 7})
        by_hash = f"chatwoot.message_updated.7.5.{hash_of_body(content)}"
        for delivery_id in (
            None,
            "",
            "1",
            DELIVERY_ID[:-1],
            f"{DELIVERY_ID}0",
            f" {DELIVERY_ID}",
            f"{DELIVERY_ID}\n",
            DELIVERY_ID.replace("-", ""),
            f"{{{DELIVERY_ID}}}",
            DELIVERY_ID.replace("5", "g"),
            DELIVERY_ID.replace("-", ":"),
            DELIVERY_ID.replace("1", "١"),  # noqa: RUF001  # a digit, but not of hexadecimal
        ):
            with self.subTest(repr(delivery_id)):
                self.assertEqual(read(content, delivery_id).job_id, by_hash)

    def test_without_a_delivery_id_the_configured_fallback_makes_the_discriminator(self) -> None:
        content = body("message_updated", id=5, inbox={"id": 7})
        delivery = Delivery("chatwoot", content, None, 0)

        self.assertEqual(parse(delivery, FALLBACKS["hash"]), parse(delivery, FALLBACKS["hash"]))
        self.assertNotEqual(parse(delivery, FALLBACKS["none"]), parse(delivery, FALLBACKS["none"]))
        for fallback in FALLBACKS.values():
            self.assertRegex(parse(delivery, fallback).job_id, JOB_ID)

    def test_the_hash_is_that_of_the_raw_body(self) -> None:
        self.assertEqual(hash_of_body(b"abc"), "hba7816bf8f01cfea414140de5dae2223")

    def test_two_sources_never_share_a_job(self) -> None:
        content = body("message_created", id=5, inbox={"id": 7})

        self.assertEqual(read(content, source="other").job_id, "other.message_created.7.5")


class EventNameTests(SynchronousTestCase):
    def test_the_event_keeps_its_name_and_the_job_id_only_what_is_safe_in_it(self) -> None:
        for name, part in (
            ("macro.executed", "macro_executed"),
            ("Message_Created", "_essage__reated"),
            ("a:b-c d/é", "a_b_c_d__"),
            ("line\r\nbreak\x00\x1b[31m", "line__break___31m"),
            ("😀", "_"),
            ("9", "9"),
            (64 * "x" + "y", 64 * "x"),
            (10_000 * "é", 64 * "_"),
        ):
            with self.subTest(part):
                event = read(body(name))
                self.assertEqual(event.name, name)
                self.assertEqual(event.job_id, f"chatwoot.{part}.a0.0.{DELIVERY_ID}")

    def test_a_name_with_a_lone_surrogate_is_still_utf8(self) -> None:
        self.assertEqual(read(rb'{"event":"x\ud800"}').name, "x?")


class BodyTests(SynchronousTestCase):
    def assert_refused(self, code: str, *bodies: bytes) -> None:
        for content in bodies:
            with self.subTest(content[:40]):
                error = self.assertRaises(BadRequest, read, content)
                self.assertEqual(error.code, code)
                self.assertNotIn("5e17", str(error))

    def test_not_utf8(self) -> None:
        text = '{"event":"é"}'
        self.assert_refused(
            "not_utf8",
            text.encode("latin-1"),
            text.encode("utf-16"),
            b'{"event":"x","5e17":"\xff"}',
            b'{"event":"x","y":"\xed\xa0\x80"}',  # a surrogate in UTF-8
            b'{"event":"x","y":"\xc0\xaf"}',  # "/" in two bytes
            b"\x1f\x8b\x08\x00",  # gzip
        )

    def test_not_json(self) -> None:
        self.assert_refused(
            "not_json",
            b"",
            b" ",
            b"event=message_created&5e17=1",
            b"{",
            b'{"event":"x"',
            b'{"event":"x",}',
            b'{"event":"x"}}',
            b'{"event":"x"}{"event":"y"}',
            b'{"event":"x"}\x00',
            b"\xef\xbb\xbf" + b'{"event":"x"}',  # a byte order mark
            '{"event":"x"}'.encode("utf-16-le"),
            b'{"event":"x","n":NaN}',
            b'{"event":"x","n":Infinity}',
            b'{"event":"x","n":-Infinity}',
            b'{"event":"x","n":[NaN]}',
            b'{"event":"x","n":01}',
            b'{"event":"x","n":1.}',
            b"{'event':'x'}",
            b'{"event":"x","n":"\n"}',
            b'{"event":"x\x01"}',
            b'{"event":"x","n":"\\q"}',
            b'{"event":"x"/* 5e17 */}',
        )

    def test_endless_nesting(self) -> None:
        self.assert_refused(
            "not_json",
            100_000 * b"[",
            100_000 * b"[" + 100_000 * b"]",
            b'{"event":"x","n":' + 100_000 * b"[" + 100_000 * b"]" + b"}",
            100_000 * b'{"event":' + b"1" + 100_000 * b"}",
        )

    def test_not_an_object(self) -> None:
        self.assert_refused(
            "not_an_object", b"[]", b'["event"]', b'"event"', b"5", b"1e999", b"true", b"null"
        )

    def test_no_event(self) -> None:
        self.assert_refused(
            "no_event",
            b"{}",
            b'{"id":5}',
            b'{"event":""}',
            b'{"event":null}',
            b'{"event":5}',
            b'{"event":true}',
            b'{"event":["message_created"]}',
            b'{"event":{"event":"message_created"}}',
            b'{"Event":"message_created"}',
        )

    def test_a_body_that_a_worker_can_parse_is_accepted(self) -> None:
        for content in (
            b'{"event":"x"}',
            b' \t\r\n{ "event" : "x" } \n',
            rb'{"event":"x","y":"\ud800"}',
            rb'{"event":"x","\udfff":1}',
            rb'{"event":"x","y":"\ud83d\ude00"}',
            rb'{"\u0065vent":"x"}',
            b'{"event":"x","y":"\x7f"}',
            b'{"event":"x","n":1e999}',
            b'{"event":"x","n":%b}' % (5000 * b"9"),
            b'{"event":"x","n":-%b}' % (5000 * b"9"),
            b'{"event":"x","id":%b}' % (5000 * b"9"),
            b'{"event":"x","":{}}',
        ):
            with self.subTest(content[:40]):
                self.assertEqual(read(content).name, "x")

    def test_the_last_of_repeated_keys_counts_as_in_json_parse(self) -> None:
        event = read(
            b'{"event":"a","id":1,"event":"message_created","inbox":{"id":9},"inbox":{"id":7},"id":5}'
        )

        self.assertEqual(event, Event("message_created", "chatwoot.message_created.7.5"))


numbers = st.one_of(st.integers(), st.integers(-2, 2**64), st.floats(allow_nan=False, allow_infinity=False))
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)
ids = st.one_of(numbers, values)
objects = st.one_of(
    st.fixed_dictionaries({}, optional={"id": ids, "inbox_id": ids, "account": ids, "x": values}), values
)
known_events = sorted({sample.event for sample in SAMPLES.values()})
payloads = st.fixed_dictionaries(
    {},
    optional={
        "event": st.one_of(st.sampled_from(known_events), st.text(), values),
        "id": ids,
        "inbox_id": ids,
        "account": objects,
        "inbox": objects,
        "channel": objects,
        "conversation": st.one_of(
            st.fixed_dictionaries({}, optional={"id": ids, "inbox_id": ids, "account": objects}), objects
        ),
        "content": values,
    },
)
valid_bodies = st.one_of(
    st.builds(lambda value, ascii_: json.dumps(value, ensure_ascii=ascii_).encode(), payloads, st.booleans()),
    st.builds(lambda value: json.dumps(value).encode(), values),
    st.sampled_from([sample.body for sample in SAMPLES.values()]),
)
json_pieces = st.sampled_from([b"null", b"\\u", *(bytes([byte]) for byte in b'"{}[],:1-.e\\ \xff\x00')])


@st.composite
def damaged_bodies(draw: st.DrawFn) -> bytes:
    """A body with a random deletion, insertion or replacement."""
    content = draw(valid_bodies)
    start = draw(st.integers(0, len(content)))
    end = draw(st.integers(start, min(len(content), start + 4)))
    return content[:start] + draw(st.one_of(st.just(b""), json_pieces, st.binary(max_size=3))) + content[end:]


bodies = st.one_of(
    valid_bodies, damaged_bodies(), st.binary(max_size=40), st.lists(json_pieces).map(b"".join)
)
delivery_ids = st.one_of(st.none(), st.text(max_size=40), st.uuids().map(str))


def ids_of(payload: _Payload) -> tuple[object, ...]:
    """The result of a reader; an absent object equals an empty one."""
    account = payload.conversation and payload.conversation.account
    found = (
        payload.id,
        payload.inbox_id,
        payload.account and payload.account.id,
        payload.inbox and payload.inbox.id,
        payload.channel and payload.channel.id,
        payload.conversation and payload.conversation.id,
        payload.conversation and payload.conversation.inbox_id,
        account and account.id,
    )
    return tuple(value if type(value) is int and 0 < value < 2**63 else 0 for value in found)


class PropertyTests(SynchronousTestCase):
    @given(
        bodies,
        delivery_ids,
        st.sampled_from(["chatwoot", LONGEST_SOURCE]),
        st.sampled_from(sorted(FALLBACKS)),
    )
    def test_a_body_gets_a_job_id_that_bullmq_accepts_or_is_refused(
        self, content: bytes, delivery_id: str | None, source: str, fallback: str
    ) -> None:
        try:
            event = parse(Delivery(source, content, delivery_id, 0), FALLBACKS[fallback])
        except BadRequest:
            return
        self.assertRegex(event.job_id, rf"\A{JOB_ID.pattern}\Z")
        self.assertTrue(event.job_id.startswith(f"{source}."))
        self.assertLessEqual(len(event.job_id), 190)
        check_job_id(event.job_id)
        event.name.encode()
        self.assertEqual(json.loads(content)["event"].encode("utf-8", "replace").decode(), event.name)

    @given(bodies)
    def test_both_readers_agree_on_what_both_accept(self, content: bytes) -> None:
        try:
            fast, tolerant = _decode(content), _read_tolerantly(content.decode())
        except (msgspec.DecodeError, UnicodeDecodeError, BadRequest):
            return
        self.assertEqual(fast.event, tolerant.event)
        self.assertEqual(ids_of(fast), ids_of(tolerant))

    @given(valid_bodies)
    def test_what_json_writes_is_never_called_not_json(self, content: bytes) -> None:
        try:
            read(content)
        except BadRequest as error:
            self.assertIn(error.code, ("not_an_object", "no_event"))

    @given(valid_bodies, st.integers(0, 3), st.sampled_from(list(JSON_SPACE)))
    def test_white_space_around_a_body_changes_nothing(self, content: bytes, count: int, space: int) -> None:
        blanks = bytes([space]) * count

        def outcome(candidate: bytes) -> object:
            try:
                return read(candidate)
            except BadRequest as error:
                return error.code

        self.assertEqual(outcome(blanks + content + blanks), outcome(content))

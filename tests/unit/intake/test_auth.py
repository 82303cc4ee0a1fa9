"""Authentication: Chatwoot's signatures, look-alikes of them, and tokens."""

from __future__ import annotations

import hmac
from base64 import b64encode
from typing import Any

from hypothesis import assume, given
from hypothesis import strategies as st
from msgspec.structs import replace
from twisted.trial.unittest import SynchronousTestCase

from webhookd.intake.auth import REASONS, Authenticator, Credentials, sign
from webhookd.model import Unauthorized
from webhookd.samples import SAMPLES, SECRET, SIGNED_AT_S

TOLERANCE_S = 300
BODY = SAMPLES["message_created"].body
TIMESTAMP = str(SIGNED_AT_S).encode()


def signed(secret: str = SECRET, timestamp: bytes = TIMESTAMP, body: bytes = BODY) -> Credentials:
    """The credentials of Chatwoot, computed without the module under test."""
    digest = hmac.new(secret.encode(), timestamp + b"." + body, "sha256").hexdigest()
    return Credentials(signature=b"sha256=" + digest.encode(), timestamp=timestamp)


def basic(user_and_password: bytes) -> bytes:
    return b"Basic " + b64encode(user_and_password)


class AuthenticatorCase(SynchronousTestCase):
    def authenticator(self, *secrets: str, tokens: tuple[str, ...] = ()) -> Authenticator:
        return Authenticator(secrets, tokens, TOLERANCE_S)

    def assert_refused(
        self,
        code: str,
        credentials: Credentials,
        *,
        body: bytes = BODY,
        now_s: float = SIGNED_AT_S,
        rule: Authenticator | None = None,
    ) -> None:
        rule = rule or self.authenticator(SECRET)
        error = self.assertRaises(Unauthorized, rule.verify, credentials, body, now_s)
        self.assertEqual((error.code, str(error)), (code, REASONS[code]))


class SignatureTests(AuthenticatorCase):
    def test_every_sample_verifies(self) -> None:
        rule = self.authenticator(SECRET)
        samples = [one for one in SAMPLES.values() if "X-Chatwoot-Signature" in one.headers]
        self.assertTrue(samples)
        for sample in samples:
            with self.subTest(sample.name):
                credentials = Credentials(
                    signature=sample.headers["X-Chatwoot-Signature"].encode(),
                    timestamp=sample.headers["X-Chatwoot-Timestamp"].encode(),
                )
                self.assertEqual(rule.verify(credentials, sample.body, SIGNED_AT_S), 0)

    def test_samples_that_are_not_signed_are_refused(self) -> None:
        samples = [one for one in SAMPLES.values() if "X-Chatwoot-Signature" not in one.headers]
        self.assertTrue(samples)
        for sample in samples:
            with self.subTest(sample.name):
                self.assert_refused("missing_signature", Credentials(), body=sample.body)

    def test_a_published_vector(self) -> None:
        self.assertEqual(
            sign(SECRET.encode(), TIMESTAMP, BODY),
            b"sha256=1ec8fe50e14496563211f550165967d4c3ec0a8355e58a0b03c418c3274706db",
        )

    def test_signatures_that_only_look_like_one(self) -> None:
        good = signed().signature or b""
        for signature in (
            b"",
            b"sha256=",
            b"sha256=" + 64 * b"0",
            good[:-1],
            good + b"0",
            good + b" ",
            b" " + good,
            good.upper(),
            b"sha256=" + good.removeprefix(b"sha256=").upper(),
            b"SHA256=" + good.removeprefix(b"sha256="),
            good.removeprefix(b"sha256="),
            b"sha1=" + good.removeprefix(b"sha256="),
            b"sha256=\xff\xfe",
            "sha256=é".encode(),
            b"sha256=" + bytes.fromhex(good.removeprefix(b"sha256=").decode()),
            good + b"," + good,
            good + b"\x00",
            100_000 * b"a",
        ):
            with self.subTest(signature[:80]):
                self.assert_refused("wrong_signature", replace(signed(), signature=signature))

    def test_no_signature(self) -> None:
        self.assert_refused("missing_signature", Credentials())
        self.assert_refused("missing_signature", Credentials(timestamp=TIMESTAMP))

    def test_a_signature_by_another_key(self) -> None:
        for secret in ("other", SECRET.lower(), SECRET[:-1], f"{SECRET}\n", ""):
            with self.subTest(secret):
                self.assert_refused("wrong_signature", signed(secret))

    def test_a_signature_of_another_body(self) -> None:
        for body in (BODY + b" ", BODY[:-1], b"", BODY.replace(b"98765", b"98766"), BODY.swapcase()):
            with self.subTest(body[:40]):
                self.assert_refused("wrong_signature", signed(), body=body)

    def test_a_signature_of_the_body_alone(self) -> None:
        alone = b"sha256=" + hmac.new(SECRET.encode(), BODY, "sha256").hexdigest().encode()
        self.assert_refused("wrong_signature", Credentials(signature=alone, timestamp=TIMESTAMP))

    def test_the_timestamp_is_part_of_what_is_signed(self) -> None:
        for timestamp in (str(SIGNED_AT_S + 1).encode(), b"0" + TIMESTAMP):
            with self.subTest(timestamp):
                self.assert_refused("wrong_signature", replace(signed(), timestamp=timestamp))

    def test_a_timestamp_within_the_tolerance_either_way(self) -> None:
        rule = self.authenticator(SECRET)
        for now_s in (SIGNED_AT_S - TOLERANCE_S, SIGNED_AT_S + 0.5, SIGNED_AT_S + TOLERANCE_S):
            with self.subTest(now_s):
                self.assertEqual(rule.verify(signed(), BODY, now_s), 0)

    def test_a_timestamp_beyond_the_tolerance_either_way(self) -> None:
        for now_s in (SIGNED_AT_S - TOLERANCE_S - 1, SIGNED_AT_S + TOLERANCE_S + 0.001, 0, 1e12):
            with self.subTest(now_s):
                self.assert_refused("stale_signature", signed(), now_s=now_s)

    def test_a_wrong_signature_does_not_learn_whether_it_is_stale(self) -> None:
        self.assert_refused("wrong_signature", signed("other"), now_s=0)

    def test_timestamps_that_are_no_number_of_seconds_although_they_are_signed(self) -> None:
        for timestamp in (
            b"",
            b"NaN",
            b"1e99",
            b"inf",
            b"-1",
            b"+" + TIMESTAMP,
            b" " + TIMESTAMP,
            TIMESTAMP + b" ",
            TIMESTAMP + b"\n",
            TIMESTAMP + b".0",
            b"0x6a9",
            b"1_788_264_005",
            "١٧٨٨٢٦٤٠٠٥".encode(),
            b"\xb2",
            b"9" * 13,
            b"9" * 10_000,
            b"0" * 3 + TIMESTAMP,
        ):
            with self.subTest(timestamp[:40]):
                self.assert_refused("malformed_signature", signed(timestamp=timestamp))
        self.assert_refused("malformed_signature", replace(signed(), timestamp=None))

    def test_the_largest_timestamp_is_only_stale(self) -> None:
        self.assert_refused("stale_signature", signed(timestamp=12 * b"9"))

    def test_the_position_of_the_secret_that_matched(self) -> None:
        rule = self.authenticator("new", "old", "bot")
        for position, secret in enumerate(("new", "old", "bot")):
            self.assertEqual(rule.verify(signed(secret), BODY, SIGNED_AT_S), position)
        self.assert_refused("wrong_signature", signed("older"), rule=rule)

    def test_of_two_equal_secrets_the_first_one_matched(self) -> None:
        self.assertEqual(self.authenticator("x", "x").verify(signed("x"), BODY, SIGNED_AT_S), 0)

    def test_a_secret_beyond_ascii_signs_with_its_utf8(self) -> None:
        self.assertEqual(self.authenticator("gehéim").verify(signed("gehéim"), BODY, SIGNED_AT_S), 0)


class TokenTests(AuthenticatorCase):
    def verify(self, rule: Authenticator, **shown: Any) -> int | None:
        return rule.verify(Credentials(**shown), BODY, SIGNED_AT_S)

    def test_the_three_ways_to_show_a_token(self) -> None:
        rule = self.authenticator(tokens=("old", "new:one"))
        for shown in (
            {"token": b"new:one"},
            {"token": b"old"},
            {"authorization": b"Bearer new:one"},
            {"authorization": b"bearer  new:one "},
            {"authorization": basic(b"anybody:new:one")},
            {"authorization": basic(b":old")},
            {"authorization": b"BASIC " + b64encode(b"x:old")},
            {"token": b"wrong", "authorization": b"Bearer old"},
            {"token": b"old", "authorization": b"Bearer wrong"},
            {"token": b"old", "signature": b"sha256=wrong"},
        ):
            with self.subTest(shown):
                self.assertIsNone(self.verify(rule, **shown))

    def test_wrong_tokens(self) -> None:
        rule = self.authenticator(tokens=("token",))
        rows: tuple[dict[str, Any], ...] = (
            {"token": b""},
            {"token": b"Token"},
            {"token": b"token "},
            {"token": b"\xff"},
            {"authorization": b""},
            {"authorization": b"token"},
            {"authorization": b"Bearer"},
            {"authorization": b"Bearer wrong"},
            {"authorization": b"Digest token"},
            {"authorization": b"Basic token"},
            {"authorization": b"Basic"},
            {"authorization": b"Basic " + b64encode(b"token")},
            {"authorization": b"Basic \xff\xff"},
            {"authorization": b"Basic dG9rZW4"},
            {"authorization": basic(b"token:")},
            {"authorization": basic(b"token:wrong")},
        )
        for shown in rows:
            with self.subTest(shown):
                self.assert_refused("bad_token", Credentials(**shown), rule=rule)

    def test_a_signature_is_ignored_if_only_tokens_are_configured(self) -> None:
        self.assert_refused("wrong_signature", signed(""), rule=self.authenticator(tokens=("token",)))

    def test_a_token_is_ignored_if_only_secrets_are_configured(self) -> None:
        self.assert_refused("missing_signature", Credentials(token=SECRET.encode()))
        self.assert_refused("missing_signature", Credentials(authorization=b"Bearer " + SECRET.encode()))

    def test_either_is_enough_if_both_are_configured(self) -> None:
        rule = self.authenticator(SECRET, tokens=("token",))

        self.assertIsNone(self.verify(rule, token=b"token"))
        self.assertEqual(rule.verify(signed(), BODY, SIGNED_AT_S), 0)
        self.assertEqual(rule.verify(replace(signed(), token=b"wrong"), BODY, SIGNED_AT_S), 0)
        self.assert_refused("wrong_signature", replace(signed("x"), token=b"wrong"), rule=rule)
        self.assert_refused("bad_token", Credentials(token=b"wrong"), rule=rule)
        self.assert_refused("missing_signature", Credentials(), rule=rule)


class OpenTests(AuthenticatorCase):
    def test_a_source_with_neither_is_open(self) -> None:
        rule = self.authenticator()

        self.assertTrue(rule.is_open)
        for credentials in (
            Credentials(),
            signed(),
            replace(signed(), signature=b"wrong"),
            Credentials(token=b"x"),
        ):
            self.assertIsNone(rule.verify(credentials, BODY, 0))

    def test_a_source_with_either_is_not_open(self) -> None:
        self.assertFalse(self.authenticator("x").is_open)
        self.assertFalse(self.authenticator(tokens=("x",)).is_open)


secrets = st.text(min_size=1, max_size=12, alphabet=st.characters(exclude_categories=["Cs"]))
timestamps = st.integers(0, 10**12 - 1)
bodies = st.binary(max_size=40)


class PropertyTests(AuthenticatorCase):
    @given(st.lists(secrets, min_size=1, max_size=3, unique=True), timestamps, bodies, st.data())
    def test_the_right_secret_timestamp_and_body_verify(
        self, configured: list[str], timestamp: int, body: bytes, data: st.DataObject
    ) -> None:
        position = data.draw(st.integers(0, len(configured) - 1))
        now_s = timestamp + data.draw(st.integers(-TOLERANCE_S, TOLERANCE_S))
        credentials = signed(configured[position], str(timestamp).encode(), body)

        self.assertEqual(self.authenticator(*configured).verify(credentials, body, now_s), position)

    @given(secrets, secrets, timestamps, timestamps, bodies, bodies)
    def test_any_other_does_not(
        self,
        secret: str,
        other_secret: str,
        timestamp: int,
        other_timestamp: int,
        body: bytes,
        other_body: bytes,
    ) -> None:
        assume((secret, timestamp, body) != (other_secret, other_timestamp, other_body))
        shown = replace(
            signed(other_secret, str(other_timestamp).encode(), other_body), timestamp=str(timestamp).encode()
        )

        self.assert_refused(
            "wrong_signature", shown, body=body, now_s=timestamp, rule=self.authenticator(secret)
        )

    @given(
        st.one_of(st.none(), st.binary(max_size=80)),
        st.one_of(st.none(), st.binary(max_size=14)),
        st.one_of(st.none(), st.binary(max_size=40), st.binary(max_size=40).map(basic)),
        st.one_of(st.none(), st.binary(max_size=20)),
        bodies,
    )
    def test_rubbish_is_refused_with_a_known_word(
        self,
        signature: bytes | None,
        timestamp: bytes | None,
        authorization: bytes | None,
        token: bytes | None,
        body: bytes,
    ) -> None:
        rule = self.authenticator(SECRET, tokens=("a token that is hard to guess",))
        credentials = Credentials(signature, timestamp, authorization, token)

        error = self.assertRaises(Unauthorized, rule.verify, credentials, body, float(SIGNED_AT_S))

        self.assertIn(error.code, REASONS)

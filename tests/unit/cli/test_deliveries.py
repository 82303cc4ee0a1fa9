"""The requests of ``webhookd send``, and its histogram: neither needs a socket."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from webhookd.chatwoot.payload import hash_of_body, parse
from webhookd.cli.deliveries import delivery_id, event_numbers, headers, renumbered
from webhookd.cli.histogram import histogram, percentile
from webhookd.config import Source, resolve
from webhookd.intake.auth import Authenticator, Credentials
from webhookd.model import Delivery
from webhookd.samples import SAMPLES

NUMBER = 1_795_508_295_180_875
NOW_S = 1_795_508_295


def job_id(body: bytes, number: int) -> str:
    return parse(Delivery("chatwoot", body, delivery_id(number), 0), hash_of_body).job_id


def source(**options: list[str]) -> Source:
    return resolve(options, {}).sources["chatwoot"]


class NumberTests(SynchronousTestCase):
    def test_each_is_new(self) -> None:
        self.assertEqual(list(event_numbers(4, 0)), [0, 1, 2, 3])

    def test_some_are_the_one_before(self) -> None:
        self.assertEqual(list(event_numbers(8, 25)), [0, 1, 2, 2, 3, 4, 5, 5])
        self.assertEqual(list(event_numbers(3, 100)), [0, 0, 0])
        self.assertEqual(list(event_numbers(1, 100)), [0])

    @given(st.integers(1, 500), st.floats(0, 100))
    def test_as_many_as_were_asked_for(self, count: int, percent: float) -> None:
        numbers = list(event_numbers(count, percent))

        self.assertEqual(len(numbers), count)
        self.assertLessEqual(abs(count - len(set(numbers)) - count * percent / 100), 1)


class EventTests(SynchronousTestCase):
    def test_each_number_of_each_sample_is_a_job_of_its_own(self) -> None:
        for sample in SAMPLES.values():
            with self.subTest(sample.name):
                ids = {job_id(renumbered(sample.body, number), number) for number in (NUMBER, NUMBER + 1)}
                self.assertEqual(len(ids), 2)
                self.assertNotIn(sample.job_id, ids)

    def test_the_same_number_is_the_same_job(self) -> None:
        for sample in SAMPLES.values():
            ids = {job_id(renumbered(sample.body, NUMBER), NUMBER) for _ in range(2)}
            self.assertEqual(len(ids), 1)

    def test_other_spelling_of_the_same(self) -> None:
        body = b'{ "event": "message_created", "id" : 5, "inbox": {"id": 55}, "conversation": {"id": 5} }'

        self.assertEqual(job_id(renumbered(body, 9), 1), "chatwoot.message_created.55.9")

    def test_what_is_no_event_stays_as_it_is(self) -> None:
        for body in (b"", b"no", b"[]", b"{}", b"\xff"):
            self.assertEqual(renumbered(body, 1), body)


class HeaderTests(SynchronousTestCase):
    def test_signed_by_the_first_secret(self) -> None:
        body = SAMPLES["message_created"].body
        own = source(secret=["new", "old"], token=["t"])
        shown = headers(own, body, NUMBER, NOW_S)

        credentials = Credentials(
            signature=shown["X-Chatwoot-Signature"].encode(),
            timestamp=shown["X-Chatwoot-Timestamp"].encode(),
        )
        self.assertEqual(Authenticator(own.secrets, (), 300).verify(credentials, body, NOW_S), 0)
        self.assertNotIn("Authorization", shown)

    def test_or_else_a_token(self) -> None:
        shown = headers(source(token=["t", "u"]), b"{}", NUMBER, NOW_S)

        credentials = Credentials(authorization=shown["Authorization"].encode())
        self.assertIsNone(Authenticator((), ("t",), 300).verify(credentials, b"{}", NOW_S))

    def test_or_nothing(self) -> None:
        self.assertEqual(
            headers(source(), b"{}", 1, NOW_S),
            {
                "Content-Type": "application/json",
                "Accept": "application/json",
                "X-Chatwoot-Delivery": "00000000-0000-0000-0000-000000000001",
            },
        )


class LatencyTests(SynchronousTestCase):
    def test_percentiles(self) -> None:
        values = [float(value) for value in range(1, 201)]

        for percent, value in ((0, 1), (50, 100), (99, 198), (99.9, 200), (100, 200)):
            self.assertEqual(percentile(values, percent), value)
        self.assertEqual(percentile([7.0], 50), 7.0)

    def test_a_histogram(self) -> None:
        self.assertEqual(
            histogram([0.9, *[1.2] * 4, 2.5, 2.5], width=35),
            [
                "  0.7 to 1     ms  ██             1",
                "    1 to 1.5   ms  ████████       4",
                "  1.5 to 2     ms                 0",
                "    2 to 3     ms  ████           2",
            ],
        )

    @given(st.lists(st.floats(0, 60_000), min_size=1, max_size=50))
    def test_each_latency_is_in_a_line_that_fits(self, values: list[float]) -> None:
        lines = histogram(values, 80)

        self.assertLessEqual(max(map(len, lines)), 80)
        self.assertEqual(sum(int(line.split()[-1]) for line in lines), len(values))
        for line in lines:
            self.assertEqual(line[19] in "█▉▊▋▌▍▎▏", int(line.split()[-1]) > 0, line)

    @given(st.floats(0.01, 60_000))
    def test_the_line_of_a_latency_has_it_between_its_bounds(self, value: float) -> None:
        (line,) = histogram([value], 80)
        low, _to, high, *_rest = line.split()

        self.assertLessEqual(float(low) * 0.999, value)
        self.assertGreaterEqual(float(high) * 1.001, value)

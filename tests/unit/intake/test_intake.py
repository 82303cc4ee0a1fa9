"""From a delivery and its credentials to a job or a refusal."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock
from twisted.logger import LogLevel, capturedLogs, formatEvent
from twisted.trial.unittest import SynchronousTestCase

from webhookd.bullmq.options import JobOptions
from webhookd.chatwoot.payload import hash_of_body
from webhookd.intake import ENCODERS, Intake, SourcePolicy, envelope, log_deliveries
from webhookd.intake.auth import Authenticator, Credentials
from webhookd.model import (
    BadRequest,
    Delivery,
    Job,
    Outcome,
    QueueUnavailable,
    Receipt,
    RedisErrorKind,
    Unauthorized,
    UnknownSource,
)
from webhookd.samples import SAMPLES

SAMPLE = SAMPLES["message_created"]
NOW_MS = 1_788_264_005_123
PLAIN = JobOptions.from_mapping({"attempts": 3})


class Jobs:
    """Accepts each job and remembers it."""

    def __init__(self) -> None:
        self.taken: list[Job] = []

    def deliver(self, job: Job) -> Deferred[Receipt]:
        self.taken.append(job)
        return succeed(Receipt(Outcome.QUEUED, job.id, job.name))


def source(
    *,
    secrets: tuple[str, ...] = (),
    tolerance_s: int = 300,
    events: frozenset[str] | None = None,
    queue: str = "chatwoot",
    options: JobOptions = PLAIN,
) -> SourcePolicy:
    return SourcePolicy(Authenticator(secrets, (), tolerance_s), events, queue, options)


def delivery(body: bytes = SAMPLE.body, name: str = "chatwoot", delivery_id: str | None = None) -> Delivery:
    return Delivery(name, body, delivery_id, NOW_MS)


class IntakeTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.jobs = Jobs()

    def intake(self, encoder: str = "payload", **sources: SourcePolicy) -> Intake:
        return Intake(sources or {"chatwoot": source()}, ENCODERS[encoder], hash_of_body, self.jobs.deliver)

    def test_a_delivery_becomes_a_job(self) -> None:
        receipt = self.successResultOf(self.intake().accept(delivery(), Credentials()))

        self.assertEqual(receipt, Receipt(Outcome.QUEUED, SAMPLE.job_id, "message_created"))
        self.assertEqual(
            self.jobs.taken,
            [
                Job(
                    queue="chatwoot",
                    id=SAMPLE.job_id,
                    name="message_created",
                    data=SAMPLE.body,
                    options=b'{"attempts":3,"jobId":"%b"}' % SAMPLE.job_id.encode(),
                    timestamp_ms=NOW_MS,
                )
            ],
        )

    def test_each_source_has_its_own_queue_and_options(self) -> None:
        options = JobOptions.from_mapping({"delay": 1500, "priority": 7, "lifo": True})
        intake = self.intake(chatwoot=source(), other=source(queue="urgent", options=options))

        self.successResultOf(intake.accept(delivery(name="other"), Credentials()))

        [job] = self.jobs.taken
        self.assertEqual((job.queue, job.delay_ms, job.priority, job.lifo), ("urgent", 1500, 7, True))
        self.assertEqual(job.id, SAMPLE.job_id.replace("chatwoot.", "other.", 1))

    def test_a_source_that_is_not_configured(self) -> None:
        intake = self.intake()
        error = self.assertRaises(UnknownSource, intake.accept, delivery(name="other"), Credentials())

        self.assertEqual(error.code, "unknown_source")
        self.assertNotIn("other", str(error))

    def test_an_unauthorized_sender_does_not_learn_whether_the_body_is_good(self) -> None:
        intake = self.intake(chatwoot=source(secrets=("secret",)))

        self.assertRaises(Unauthorized, intake.accept, delivery(b"not json"), Credentials())

    def test_the_time_of_receipt_decides_whether_a_signature_is_stale(self) -> None:
        credentials = Credentials(
            signature=SAMPLE.headers["X-Chatwoot-Signature"].encode(),
            timestamp=SAMPLE.headers["X-Chatwoot-Timestamp"].encode(),
        )
        secret = "kZ9m7Yb2c1d4e5f6g7h8i9jk"
        intake = self.intake(chatwoot=source(secrets=(secret,), tolerance_s=1))
        self.successResultOf(intake.accept(delivery(), credentials))
        late = Delivery("chatwoot", SAMPLE.body, None, NOW_MS + 1000)

        self.assertRaises(Unauthorized, intake.accept, late, credentials)
        self.assertEqual(len(self.jobs.taken), 1)

    def test_a_body_that_is_no_event(self) -> None:
        self.assertRaises(BadRequest, self.intake().accept, delivery(b"[]"), Credentials())
        self.assertEqual(self.jobs.taken, [])

    def test_an_event_that_is_filtered_out_is_no_job(self) -> None:
        intake = self.intake(chatwoot=source(events=frozenset({"conversation_created"})))

        receipt = self.successResultOf(intake.accept(delivery(), Credentials()))

        self.assertEqual(receipt, Receipt(Outcome.IGNORED, SAMPLE.job_id, "message_created"))
        self.assertEqual(self.jobs.taken, [])

    def test_an_event_that_is_wanted_by_name(self) -> None:
        intake = self.intake(chatwoot=source(events=frozenset({"message_created"})))

        self.successResultOf(intake.accept(delivery(), Credentials()))

        self.assertEqual(len(self.jobs.taken), 1)

    def test_a_job_that_cannot_be_delivered(self) -> None:
        error = QueueUnavailable(RedisErrorKind.TIMEOUT, "late", unknown=True)
        intake = Intake({"chatwoot": source()}, ENCODERS["payload"], hash_of_body, lambda job: fail(error))

        self.assertIs(
            self.failureResultOf(intake.accept(delivery(), Credentials()), QueueUnavailable).value, error
        )

    def test_the_envelope_of_a_job(self) -> None:
        self.successResultOf(
            self.intake("envelope").accept(
                Delivery("chatwoot", b'{ "event":"x" }', "abc", NOW_MS, b"name-1"), Credentials()
            )
        )

        self.assertEqual(
            self.jobs.taken[0].data,
            b'{"source":"chatwoot","deliveryId":"abc","requestId":"name-1","receivedAt":%d,'
            b'"payload":{ "event":"x" }}' % NOW_MS,
        )

    def test_a_line_for_each_accepted_event(self) -> None:
        clock = Clock()
        waiting: Deferred[Receipt] = Deferred()
        accept = log_deliveries(lambda _delivery, _credentials: waiting, clock.seconds)
        with capturedLogs() as lines:
            taken = accept(Delivery("branch", SAMPLE.body, None, NOW_MS, b"name-1"), Credentials())
            clock.advance(0.0125)
            waiting.callback(Receipt(Outcome.SPOOLED, SAMPLE.job_id, SAMPLE.event))

        self.assertEqual(self.successResultOf(taken).outcome, Outcome.SPOOLED)
        [line] = lines
        self.assertIs(line["log_level"], LogLevel.debug)
        self.assertEqual(formatEvent(line), f"spooled {SAMPLE.job_id} of branch in 12.5 ms, request name-1")
        self.assertEqual((line["event"], line["duration_ms"]), (SAMPLE.event, 12.5))

    def test_no_line_for_a_refused_event(self) -> None:
        with capturedLogs() as lines:
            accept = log_deliveries(lambda _delivery, _credentials: fail(ValueError()), Clock().seconds)
            self.failureResultOf(accept(delivery(), Credentials()), ValueError)

        self.assertEqual(lines, [])

    @given(st.one_of(st.none(), st.text(alphabet=st.characters(exclude_categories=["Cs"]))))
    def test_an_envelope_is_json_for_any_delivery_id(self, delivery_id: str | None) -> None:
        self.assertEqual(
            json.loads(envelope(delivery(delivery_id=delivery_id))),
            {
                "source": "chatwoot",
                "deliveryId": delivery_id,
                "requestId": "",
                "receivedAt": NOW_MS,
                "payload": json.loads(SAMPLE.body),
            },
        )

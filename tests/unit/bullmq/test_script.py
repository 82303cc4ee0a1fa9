"""The arguments of the script that adds jobs, and its reply."""

from __future__ import annotations

import hashlib

from twisted.trial.unittest import SynchronousTestCase

from webhookd.bullmq.keys import QueueKeys
from webhookd.bullmq.script import ADD_JOBS, AddError, AddResult, Wire, add_jobs_arguments, read_reply
from webhookd.model import Job


def a_job(job_id: str, **changes: object) -> Job:
    values: dict[str, object] = {
        "queue": "q",
        "id": job_id,
        "name": "created",
        "data": b'{"n":1}',
        "options": b"{}",
        "timestamp_ms": 1_700_000_000_000,
        **changes,
    }
    return Job(**values)  # type: ignore[arg-type]


class ScriptTests(SynchronousTestCase):
    def test_the_name_is_the_digest_of_the_text(self) -> None:
        self.assertEqual(ADD_JOBS.sha1, hashlib.sha1(ADD_JOBS.text, usedforsecurity=False).hexdigest())
        self.assertIn(b"redis.pcall", ADD_JOBS.text)


class AddJobsArgumentsTests(SynchronousTestCase):
    keys = QueueKeys("bull", "q")

    def test_keys_and_arguments(self) -> None:
        jobs = [a_job("a.1"), a_job("a.2", name="naïve", delay_ms=300_000_000, priority=5, lifo=True)]
        keys, argv = add_jobs_arguments(self.keys, jobs, lock_ttl_ms=5000, wire=Wire.V6, set_by="replica-1")
        fixed = "wait paused meta id delayed active prioritized pc events marker"
        self.assertEqual(
            keys,
            [
                *(f"bull:q:{suffix}" for suffix in fixed.split()),
                *("bull:q:a.1", "bull:q:create-lock:a.1"),
                *("bull:q:a.2", "bull:q:create-lock:a.2"),
            ],
        )
        self.assertEqual(
            argv,
            [
                *("replica-1", "5000", "6"),
                *("a.1", "created", b'{"n":1}', b"{}", "1700000000000", "0", "0", "0"),
                *("a.2", "naïve", b'{"n":1}', b"{}", "1700000000000", "300000000", "5", "1"),
            ],
        )

    def test_refuses(self) -> None:
        for jobs, lock_ttl_ms in [([], 1), ([a_job("a.1", queue="other")], 1), ([a_job("a.1")], 0)]:
            with self.assertRaises(ValueError):
                add_jobs_arguments(self.keys, jobs, lock_ttl_ms=lock_ttl_ms, wire=Wire.AUTO, set_by="x")


class ReadReplyTests(SynchronousTestCase):
    def test_each_answer(self) -> None:
        self.assertEqual(
            read_reply([1, 2, 3, b"WRONGTYPE x"], 4),
            [
                AddResult.ADDED,
                AddResult.LOCK_HELD,
                AddResult.JOB_EXISTS,
                AddError("WRONGTYPE x"),
            ],
        )

    def test_a_reason_that_is_not_utf8(self) -> None:
        self.assertEqual(read_reply([b"ERR \xff"], 1), [AddError("ERR \ufffd")])

    def test_malformed(self) -> None:
        for reply, count in [
            (None, 1),
            (b"OK", 2),
            ("OK", 2),
            ([], 1),
            ([1, 1], 1),
            ([0], 1),
            ([4], 1),
            ([None], 1),
            (["OK"], 1),
            ([[1]], 1),
        ]:
            with self.assertRaises(ValueError, msg=repr(reply)):
                read_reply(reply, count)

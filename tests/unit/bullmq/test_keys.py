"""The names of a queue's keys, and what may be a job id."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from webhookd.bullmq.keys import QueueKeys, check_job_id

job_ids = st.from_regex(r"[a-z][A-Za-z0-9._-]{0,60}\.[A-Za-z0-9._-]{1,60}", fullmatch=True)


class QueueKeysTests(SynchronousTestCase):
    def test_names(self) -> None:
        keys = QueueKeys("bull", "chatwoot")
        self.assertEqual(keys.wait, "bull:chatwoot:wait")
        self.assertEqual(keys.events, "bull:chatwoot:events")
        self.assertEqual(keys.job("a.1"), "bull:chatwoot:a.1")
        self.assertEqual(keys.create_lock("a.1"), "bull:chatwoot:create-lock:a.1")

    def test_refuses_what_bullmq_refuses(self) -> None:
        for prefix, queue in [("", "q"), ("bull", ""), ("bull", "a:b")]:
            self.assertRaises(ValueError, QueueKeys, prefix, queue)

    def test_hash_tag(self) -> None:
        for prefix, queue, expected in [
            ("{bull}", "q", True),
            ("bull", "{q}", True),
            ("bull", "a{b}c", True),
            ("bull", "q", False),
            ("{}", "q", False),  # Redis hashes the whole key if a tag is empty
            ("{}", "{q}", False),  # the first brace counts
            ("bull", "q{", False),
            ("}bull{", "q", False),
        ]:
            self.assertIs(QueueKeys(prefix, queue).is_hash_tagged, expected, (prefix, queue))


class JobIdTests(SynchronousTestCase):
    def test_accepts(self) -> None:
        for job_id in ["chatwoot.message_created.7.98765", "a", "1e3", "A-_.9", "-", "x" * 255]:
            check_job_id(job_id)

    def test_refuses(self) -> None:
        bad = ["", "0", "007", "-5", "a:b", "a b", "é", "a\n", "x" * 256, "meta", "completed", "wait"]
        for job_id in bad:
            with self.assertRaises(ValueError, msg=job_id):
                check_job_id(job_id)

    @given(job_ids)
    def test_two_parts_are_always_accepted(self, job_id: str) -> None:
        check_job_id(job_id)

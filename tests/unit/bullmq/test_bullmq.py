from __future__ import annotations

import hashlib
import json

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from webhookd.bullmq.keys import QueueKeys, check_job_id
from webhookd.bullmq.options import MAX_PRIORITY, JobOptions, with_telemetry
from webhookd.bullmq.script import ADD_JOBS, Answer, Refused, Wire, add_jobs_arguments, read_reply
from webhookd.model import Job

job_ids = st.from_regex(r"[a-z][A-Za-z0-9._-]{0,60}\.[A-Za-z0-9._-]{1,60}", fullmatch=True)

keeps = st.one_of(
    st.booleans(),
    st.integers(-1, 10_000),
    st.fixed_dictionaries(
        {}, optional={"age": st.integers(0), "count": st.integers(-1), "limit": st.integers(1)}
    ).filter(lambda keep: all(value < 2**53 for value in keep.values())),
)
backoffs = st.one_of(
    st.integers(0, 2**31),
    st.fixed_dictionaries(
        {"type": st.sampled_from(["fixed", "exponential"]), "delay": st.integers(0, 2**31)},
        optional={"jitter": st.floats(0, 1)},
    ),
)
valid_options = st.fixed_dictionaries(
    {},
    optional={
        "attempts": st.integers(0, 100),
        "backoff": backoffs,
        "removeOnComplete": keeps,
        "removeOnFail": keeps,
        "priority": st.integers(0, MAX_PRIORITY),
        "delay": st.integers(0, 2**40),
        "lifo": st.booleans(),
        "keepLogs": st.integers(0, 1000),
        "stackTraceLimit": st.integers(0, 1000),
        "sizeLimit": st.integers(0, 2**30),
    },
)


class QueueKeysTests(SynchronousTestCase):
    def test_names(self) -> None:
        keys = QueueKeys("bull", "chatwoot")
        self.assertEqual(keys.wait, "bull:chatwoot:wait")
        self.assertEqual(keys.events, "bull:chatwoot:events")
        self.assertEqual(keys.job("a.1"), "bull:chatwoot:a.1")
        self.assertEqual(keys.create_lock("a.1"), "bull:chatwoot:create-lock:a.1")

    def test_equal_names_are_equal_keys(self) -> None:
        self.assertEqual(QueueKeys("bull", "q"), QueueKeys("bull", "q"))
        self.assertNotEqual(QueueKeys("bull", "q"), QueueKeys("bull", "p"))

    def test_refuses_what_bullmq_refuses(self) -> None:
        for prefix, queue in [("", "q"), ("bull", ""), ("bull", "a:b")]:
            self.assertRaises(ValueError, QueueKeys, prefix, queue)

    def test_hash_tag(self) -> None:
        for prefix, queue, expected in [
            ("{bull}", "q", True),
            ("bull", "{q}", True),
            ("bull", "a{b}c", True),
            ("bull", "q", False),
            ("{}", "q", False),  # Redis hashes the whole key where a tag is empty
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
        for job_id in [
            "",
            "0",
            "007",
            "-5",
            "a:b",
            "a b",
            "é",
            "a\n",
            "x" * 256,
            "meta",
            "completed",
            "wait",
        ]:
            with self.assertRaises(ValueError, msg=job_id):
                check_job_id(job_id)

    @given(job_ids)
    def test_two_parts_are_always_accepted(self, job_id: str) -> None:
        check_job_id(job_id)


class JobOptionsTests(SynchronousTestCase):
    def assertStored(self, options: dict[str, object], stored: dict[str, object]) -> None:
        encoded = JobOptions.from_mapping(options).encode("a.1")
        self.assertEqual(json.loads(encoded), {"attempts": 0, **stored, "jobId": "a.1"})

    def assertRefused(self, options: dict[str, object], *words: str) -> None:
        error = self.assertRaises(ValueError, JobOptions.from_mapping, options)
        message = str(error)
        self.assertNotIn("\n", message)
        for word in words:
            self.assertIn(word, message)

    def test_defaults_are_bullmqs(self) -> None:
        self.assertEqual(JobOptions.from_mapping({}).encode("a.1"), b'{"attempts":0,"jobId":"a.1"}')

    def test_a_number_is_a_fixed_backoff(self) -> None:
        self.assertStored({"backoff": 0}, {"backoff": {"type": "fixed", "delay": 0}})
        self.assertStored({"backoff": 2000}, {"backoff": {"type": "fixed", "delay": 2000}})

    def test_keep_logs_has_a_short_name(self) -> None:
        self.assertStored({"keepLogs": 10}, {"kl": 10})

    def test_a_strategy_of_the_workers_needs_no_delay(self) -> None:
        self.assertStored({"backoff": {"type": "ours"}}, {"backoff": {"type": "ours"}})

    def test_what_the_script_needs_to_know(self) -> None:
        options = JobOptions.from_mapping({"priority": 5, "delay": 100, "lifo": True})
        self.assertEqual((options.priority, options.delay_ms, options.lifo), (5, 100, True))
        options = JobOptions.from_mapping({"attempts": 1})
        self.assertEqual((options.priority, options.delay_ms, options.lifo), (0, 0, False))

    @given(valid_options, job_ids)
    def test_all_is_stored_as_given(self, options: dict[str, object], job_id: str) -> None:
        stored = json.loads(JobOptions.from_mapping(options).encode(job_id))
        self.assertEqual(stored.pop("jobId"), job_id)
        expected: dict[str, object] = {"attempts": 0, **options}
        if "keepLogs" in expected:
            expected["kl"] = expected.pop("keepLogs")
        if isinstance(expected.get("backoff"), int):
            expected["backoff"] = {"type": "fixed", "delay": expected["backoff"]}
        self.assertEqual(stored, expected)

    def test_text_is_utf8(self) -> None:
        encoded = JobOptions.from_mapping({"backoff": {"type": "naïve"}}).encode("a.1")
        self.assertIn('"type":"naïve"'.encode(), encoded)

    def test_an_unsafe_id_is_not_spliced_in(self) -> None:
        self.assertRaises(ValueError, JobOptions.from_mapping({}).encode, 'a","attempts":99,"x":"')

    def test_bad_values(self) -> None:
        bad: dict[str, list[object]] = {
            "attempts": [-1, 1.5, "3", True, None, 2**53],
            "priority": [-1, MAX_PRIORITY + 1, 1.0, "1", False],
            "delay": [-1, 0.5, "100", True],
            "lifo": [0, 1, "true", None],
            "keepLogs": [-1, "1"],
            "stackTraceLimit": [-1],
            "sizeLimit": [-1],
            "backoff": [-1, 1.5, "fixed", True, [], {}, {"delay": 1}, {"type": ""}, {"type": "fixed"}],
            "removeOnComplete": [
                -2,
                1.5,
                "1",
                None,
                {"age": -1},
                {"age": True},
                {"count": 1.5},
                {"limit": 0},
            ],
            "removeOnFail": [-2, {"keep": 1}],
        }
        for name, values in bad.items():
            for value in values:
                self.assertRefused({name: value}, "job option", name)

    def test_bad_backoffs(self) -> None:
        good = {"type": "exponential", "delay": 1}
        for key, value in [
            ("jitter", -0.1),
            ("jitter", 1.1),
            ("jitter", float("nan")),
            ("jitter", True),
            ("delay", -1),
            ("factor", 2),
        ]:
            self.assertRefused({"backoff": {**good, key: value}}, "backoff", key)

    def test_what_makes_no_sense_here(self) -> None:
        for name, word in {
            "jobId": "id",
            "timestamp": "receipt",
            "parent": "parent",
            "failParentOnFailure": "parent",
            "continueParentOnFailure": "parent",
            "ignoreDependencyOnFailure": "parent",
            "removeDependencyOnFailure": "parent",
            "repeat": "once",
            "deduplication": "share",
            "debounce": "share",
            "telemetry": "webhookd",
        }.items():
            self.assertRefused({name: "x"}, name, "cannot be set", word)

    def test_unknown(self) -> None:
        for name in ["attempt", "kl", "de", "removeonfail", ""]:
            self.assertRefused({name: 1}, "unknown", repr(name))


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


class TelemetryTests(SynchronousTestCase):
    @given(st.dictionaries(st.text(), st.text()))
    def test_it_is_a_string_that_holds_json_beside_the_other_options(self, metadata: dict[str, str]) -> None:
        options = JobOptions.from_mapping({"attempts": 3, "backoff": {"type": "fixed", "delay": 5}})
        stored = json.loads(with_telemetry(options.encode("job-1"), metadata))

        self.assertEqual(json.loads(stored.pop("tm")), metadata)
        self.assertEqual(stored, json.loads(options.encode("job-1")))


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

    def test_all_are_strings(self) -> None:
        for values in add_jobs_arguments(
            self.keys, [a_job("a.1")], lock_ttl_ms=1, wire=Wire.AUTO, set_by="x"
        ):
            self.assertTrue(all(isinstance(value, str | bytes) for value in values))

    def test_refuses(self) -> None:
        for jobs, lock_ttl_ms in [([], 1), ([a_job("a.1", queue="other")], 1), ([a_job("a.1")], 0)]:
            with self.assertRaises(ValueError):
                add_jobs_arguments(self.keys, jobs, lock_ttl_ms=lock_ttl_ms, wire=Wire.AUTO, set_by="x")


class ReadReplyTests(SynchronousTestCase):
    def test_each_answer(self) -> None:
        self.assertEqual(
            read_reply([1, 2, 3, b"WRONGTYPE x", "NOPERM y"], 5),
            [
                Answer.ADDED,
                Answer.LOCK_HELD,
                Answer.JOB_EXISTS,
                Refused("WRONGTYPE x"),
                Refused("NOPERM y"),
            ],
        )

    def test_a_reason_that_is_not_utf8(self) -> None:
        self.assertEqual(read_reply([b"ERR \xff"], 1), [Refused("ERR \ufffd")])

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
            ([[1]], 1),
        ]:
            with self.assertRaises(ValueError, msg=repr(reply)):
                read_reply(reply, count)

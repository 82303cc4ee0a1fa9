"""Job options: what is stored, and what is refused."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from webhookd.bullmq.options import MAX_PRIORITY, JobOptions, with_telemetry

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


class TelemetryTests(SynchronousTestCase):
    @given(st.dictionaries(st.text(), st.text()))
    def test_it_is_a_string_that_holds_json_beside_the_other_options(self, metadata: dict[str, str]) -> None:
        options = JobOptions.from_mapping({"attempts": 3, "backoff": {"type": "fixed", "delay": 5}})
        stored = json.loads(with_telemetry(options.encode("job-1"), metadata))

        self.assertEqual(json.loads(stored.pop("tm")), metadata)
        self.assertEqual(stored, json.loads(options.encode("job-1")))

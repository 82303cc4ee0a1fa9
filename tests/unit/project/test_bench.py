"""The bench's own arithmetic, and what it reads out of other programs. No load, and no time is asserted."""

from __future__ import annotations

import json
from typing import Any

from attrs import evolve
from twisted.trial.unittest import SynchronousTestCase

from tests.bench.bodies import ID_DIGITS, ID_MARK, SIGNATURE_MARK, Request, body_of, first_id, sample_body
from tests.bench.comparison import rounds
from tests.bench.figures import TARGETS, Bound, Figure, Section, Spread, ratios, share
from tests.bench.load import ALWAYS_THE_SAME, Run, complaints, together
from tests.bench.machine import Cores
from tests.bench.outputs import (
    Answers,
    Unreadable,
    read_cpu_ticks,
    read_k6,
    read_kilobytes,
    read_redis_benchmark,
    read_wrk,
)
from tests.bench.report import judge, problems_of, render
from tests.support.process import MissingTool
from webhookd.intake.auth import Authenticator, Credentials
from webhookd.samples import SAMPLES, SECRET

ANSWERS = Answers(
    requests=1000,
    ok=1000,
    unsent=0,
    duration_s=2.0,
    p50_ms=1.0,
    p95_ms=2.0,
    p99_ms=3.0,
    slowest_ms=4.0,
)


class SpreadTests(SynchronousTestCase):
    def test_it_is_the_median_and_the_extremes(self) -> None:
        self.assertEqual(Spread.of([5.0, 1.0, 2.0]), Spread(2.0, 1.0, 5.0))
        self.assertEqual(Spread.of([4.0, 1.0, 2.0, 3.0]).median, 2.5)

    def test_its_text_has_the_extremes_where_there_are_any(self) -> None:
        self.assertEqual(Spread.of([1000.0, 3000.0, 1999.96]).text(1), "2,000.0 (1,000.0 to 3,000.0)")
        self.assertEqual(Spread.of([1.0, 1.0]).text(3), "1.000")

    def test_a_ratio_is_taken_within_each_round(self) -> None:
        # The second round was ten times slower for both, and the ratio does not show it.
        self.assertEqual(ratios([1.0, 10.0, 3.0], [2.0, 20.0, 4.0]), Spread(0.5, 0.5, 0.75))

    def test_rounds_of_different_length_have_no_ratio(self) -> None:
        self.assertRaises(ValueError, ratios, [1.0, 2.0], [1.0])

    def test_a_share_is_what_the_others_did_without(self) -> None:
        self.assertEqual(share([100.0, 200.0], [90.0, 190.0]), Spread(7.5, 5.0, 10.0))


class RoundsTests(SynchronousTestCase):
    def test_each_is_measured_once_a_round_and_each_round_begins_with_another(self) -> None:
        order: list[str] = []

        def measure(name: str) -> Run:
            order.append(name)
            return Run(ANSWERS, len(order), 1.0, 1.0, 1.0, 1.0, [])

        runs = rounds(3, ["a", "b", "c"], measure)
        self.assertEqual("".join(order), "abcbcacab")
        self.assertEqual([run.jobs for run in runs["a"]], [1, 6, 8])


class TargetTests(SynchronousTestCase):
    def judge(self, measured: dict[Figure, float], figure: Figure) -> tuple[bool, list[str]]:
        section = Section("T", "", [], [], measured)
        (verdict,) = [each for each in judge([section]) if each.target.figure is figure]
        return verdict.misses_must, verdict.row()

    def test_bounds(self) -> None:
        self.assertTrue(Bound("<=", 0.7).holds(0.7))
        self.assertFalse(Bound("<", 0.7).holds(0.7))
        self.assertTrue(Bound(">=", 1.3).holds(1.3))
        self.assertFalse(Bound(">=", 1.3).holds(1.29))

    def test_each_figure_has_one_target(self) -> None:
        self.assertEqual([target.figure for target in TARGETS], list(Figure))

    def test_an_aim_is_never_easier_than_its_must(self) -> None:
        for target in TARGETS:
            self.assertTrue(target.must.holds(target.aim.limit), target.figure)

    def test_a_missed_must_says_what_was_wanted(self) -> None:
        missed, row = self.judge({Figure.CPU_FASTIFY: 0.8}, Figure.CPU_FASTIFY)
        self.assertTrue(missed)
        self.assertEqual(row[1:3], ["0.80", "**not reached**: 0.80, wanted <= 0.70"])

    def test_a_missed_aim_is_no_missed_must(self) -> None:
        missed, row = self.judge({Figure.CPU_FASTIFY: 0.6}, Figure.CPU_FASTIFY)
        self.assertFalse(missed)
        self.assertEqual(row[2:], ["reached: <= 0.70", "**not reached**: 0.60, wanted <= 0.50"])

    def test_what_was_not_measured_is_not_missed(self) -> None:
        missed, row = self.judge({}, Figure.P95_ONE)
        self.assertFalse(missed)
        self.assertEqual(row[1:], ["not measured", "< 10.00 ms", "< 3.00 ms"])


class ComplaintsTests(SynchronousTestCase):
    def test_every_answer_is_one_job(self) -> None:
        self.assertEqual(complaints(ANSWERS, 1000, repeat=1, under_way=0), [])

    def test_what_was_under_way_at_the_end_may_be_a_job(self) -> None:
        self.assertEqual(complaints(ANSWERS, 1032, repeat=1, under_way=32), [])
        self.assertEqual(len(complaints(ANSWERS, 1033, repeat=1, under_way=32)), 1)

    def test_a_lost_job_is_found(self) -> None:
        (complaint,) = complaints(ANSWERS, 999, repeat=1, under_way=32)
        self.assertEqual(complaint, "1,000 answers of 2xx, and 999 jobs instead of 1,000 to 1,032")

    def test_duplicates_are_no_jobs(self) -> None:
        self.assertEqual(complaints(ANSWERS, 500, repeat=2, under_way=0), [])
        self.assertEqual(len(complaints(ANSWERS, 501, repeat=2, under_way=0)), 1)
        self.assertEqual(complaints(ANSWERS, 1, repeat=ALWAYS_THE_SAME, under_way=32), [])

    def test_refusals_and_requests_that_failed_are_found(self) -> None:
        answers = evolve(ANSWERS, ok=990, unsent=3)
        self.assertEqual(
            complaints(answers, 990, repeat=1, under_way=0),
            ["10 of 1,000 answers were not 2xx", "3 requests failed, or were not sent in time"],
        )


class TogetherTests(SynchronousTestCase):
    def test_counts_are_added_and_latencies_are_the_worst(self) -> None:
        slower = evolve(ANSWERS, ok=999, unsent=1, duration_s=4.0, p95_ms=7.0)
        total = together([ANSWERS, slower])
        self.assertEqual((total.requests, total.ok, total.unsent, total.p95_ms), (2000, 1999, 1, 7.0))
        self.assertEqual(total.per_second, 1999 / 4.0)


class WrkTests(SynchronousTestCase):
    OUTPUT = (
        "Running 5s test @ http://127.0.0.1:3001/webhook/chatwoot\n"
        "  1 threads and 32 connections\n"
        "  Thread Stats   Avg      Stdev     Max   +/- Stdev\n"
        "    Latency     5.10ms    1.02ms  43.88ms   90.00%\n"
        "Requests/sec:   5154.12\n"
        'BENCH {"requests":15495,"bad_status":5,"socket_errors":2,"timeouts":1,"duration_us":3006353,'
        '"p50_us":5102,"p95_us":22811,"p99_us":35198,"max_us":43884}\n'
    )

    def test_the_script_s_line_is_read(self) -> None:
        answers = read_wrk(self.OUTPUT)
        self.assertEqual((answers.requests, answers.ok, answers.unsent), (15495, 15490, 3))
        self.assertEqual((answers.p50_ms, answers.p95_ms, answers.p99_ms), (5.102, 22.811, 35.198))
        self.assertEqual((answers.slowest_ms, answers.duration_s), (43.884, 3.006353))

    def test_no_result_is_an_error(self) -> None:
        error = self.assertRaises(Unreadable, read_wrk, "unable to connect to 127.0.0.1:1")
        self.assertIn("unable to connect", str(error))


class K6Tests(SynchronousTestCase):
    def output(self, **more: Any) -> str:
        metrics = {
            "http_req_duration": {"values": {"med": 0.5, "p(95)": 4.25, "p(99)": 11.0, "max": 27.0}},
            "iterations": {"values": {"count": 2500, "rate": 500.0}},
            **more,
        }
        return json.dumps(metrics)

    def test_the_summary_is_read(self) -> None:
        answers = read_k6(self.output(answered_2xx={"values": {"count": 2499}}))
        self.assertEqual((answers.requests, answers.ok, answers.unsent), (2500, 2499, 0))
        self.assertEqual(
            (answers.p50_ms, answers.p95_ms, answers.p99_ms, answers.slowest_ms), (0.5, 4.25, 11.0, 27.0)
        )
        self.assertEqual(answers.duration_s, 5.0)

    def test_requests_that_were_not_sent_in_time_are_counted(self) -> None:
        self.assertEqual(read_k6(self.output(dropped_iterations={"values": {"count": 7}})).unsent, 7)

    def test_no_2xx_at_all_is_zero(self) -> None:
        self.assertEqual(read_k6(self.output()).ok, 0)

    def test_no_result_is_an_error(self) -> None:
        self.assertRaises(Unreadable, read_k6, "level=error msg=...")
        self.assertRaises(Unreadable, read_k6, "{}")


class KernelTests(SynchronousTestCase):
    def test_cpu_is_user_and_system_time_whatever_the_program_is_called(self) -> None:
        stat = "4711 (a) b (c) S 1 4711 4711 0 -1 4194304 900 0 1 0 150 25 7 8 20 0 12 0 123456 99 88"
        self.assertEqual(read_cpu_ticks(stat), 175)

    def test_memory(self) -> None:
        self.assertEqual(read_kilobytes("VmHWM:\t  200 kB\nVmRSS:\t  123 kB\n", "VmRSS"), 123)
        self.assertRaises(Unreadable, read_kilobytes, "VmHWM:\t  200 kB\n", "VmRSS")


class RedisBenchmarkTests(SynchronousTestCase):
    HEADER = '"test","rps","avg_latency_ms","min_latency_ms"\n'
    NUMBERS = '"11640.00","0.651","0.144","0.655","0.975","1.311","6.583"'

    def test_calls_a_second_stand_behind_the_command(self) -> None:
        command = '"evalsha 77 12 {"browser_version":"139.0.0.0","n":"1"}"'
        self.assertEqual(read_redis_benchmark(f"{self.HEADER}{command},{self.NUMBERS}\n"), 11640.0)

    def test_no_result_is_an_error(self) -> None:
        self.assertRaises(Unreadable, read_redis_benchmark, "Could not connect to Redis")


class CoresTests(SynchronousTestCase):
    def test_with_two_the_server_has_one_alone(self) -> None:
        self.assertEqual(Cores.of([0, 1]), Cores(server=0, redis=1, load=1, second_server=1))

    def test_with_more_each_part_has_one(self) -> None:
        self.assertEqual(Cores.of([2, 3, 5]), Cores(server=2, redis=3, load=5, second_server=3))
        self.assertEqual(Cores.of(range(8)), Cores(server=0, redis=1, load=2, second_server=3))

    def test_one_is_not_enough(self) -> None:
        self.assertRaises(MissingTool, Cores.of, [0])


class RequestTests(SynchronousTestCase):
    def sent(self, request: Request, number: int, signature: bytes) -> tuple[bytes, bytes]:
        """The head and the body, as wrk.lua fills the template."""
        filled = request.template().replace(SIGNATURE_MARK, signature).replace(ID_MARK, b"%d" % number)
        head, _, body = filled.partition(b"\r\n\r\n")
        return head, body

    def test_the_sample_has_its_message_s_id_replaced_and_nothing_else(self) -> None:
        self.assertEqual(sample_body().count(ID_MARK), 1)
        self.assertEqual(sample_body().replace(ID_MARK, b"98765"), SAMPLES["message_created"].body)

    def test_the_length_is_that_of_the_body(self) -> None:
        head, body = self.sent(Request.of(sample_body()), first_id(), b"0" * 64)
        self.assertIn(b"\r\nContent-Length: %d" % len(body), head)
        self.assertEqual(len(str(first_id())), ID_DIGITS)

    def test_every_signature_is_valid_for_its_body(self) -> None:
        request = Request.of(sample_body())
        first = first_id()
        signatures = request.signatures(first, 3)
        authenticator = Authenticator([SECRET], [], 300)
        for n in range(3):
            signature = signatures[64 * n : 64 * n + 64]
            _, body = self.sent(request, first + n, signature)
            credentials = Credentials(signature=b"sha256=" + signature, timestamp=b"%d" % request.timestamp_s)
            self.assertEqual(authenticator.verify(credentials, body, request.timestamp_s), 0)

    def test_bodies_have_about_their_size_and_are_json(self) -> None:
        for size in (1_000, 22_000, 300_000, 5_000_000):
            body = body_of(size).replace(ID_MARK, b"1" * ID_DIGITS)
            self.assertEqual(json.loads(body)["id"], int("1" * ID_DIGITS))
            self.assertLess(abs(len(body) - size), 200, size)


class ReportTests(SynchronousTestCase):
    def test_problems_come_before_all_figures(self) -> None:
        section = Section("Speed", "As fast as can be.", ["", "a"], [["b", "1"]], problems=["a job was lost"])
        text = render([section], {"machine": "2 cores"})
        self.assertEqual(problems_of([section]), ["Speed: a job was lost"])
        self.assertLess(text.index("* Speed: a job was lost"), text.index("not measured"))
        self.assertIn("## Speed\n\nAs fast as can be.\n\n|  | a |\n| --- | ---: |\n| b | 1 |\n", text)
        self.assertIn("* machine: 2 cores\n", text)

    def test_without_problems_nothing_is_void(self) -> None:
        self.assertNotIn("Invalid", render([Section("Speed", "", [""], [])], {}))

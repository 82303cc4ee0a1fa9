"""Jobs into Redis: the calls that they travel in, and what the end of a call means for each job."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import LogLevel

from tests.support.redis_wire import Command, Line, PoolCase, array, bulk, error, integer
from tests.support.spools import job_number, make_job
from webhookd.bullmq.keys import QueueKeys
from webhookd.bullmq.script import ADD_JOBS, Wire, add_jobs_arguments
from webhookd.model import (
    Job,
    JobRefused,
    Outcome,
    QueueUnavailable,
    Receipt,
    RedisErrorKind,
)
from webhookd.redis.breaker import BreakerPolicy, CallOutcome, CircuitBreaker, State
from webhookd.redis.queue import RedisQueue
from webhookd.redis.settings import QueueSettings

_DEADLINE_S = 0.5
_ADDED, _LOCK_HELD, _JOB_EXISTS = integer(1), integer(2), integer(3)
_NOSCRIPT = error("NOSCRIPT No matching script. Please use EVAL.")


def added(count: int) -> bytes:
    """Return the reply to a call whose jobs are all new."""
    return array(*[_ADDED] * count)


def numbers_of(call: Command) -> list[int]:
    """Return the numbers of the jobs of an EVALSHA or EVAL."""
    arguments = call[3 + int(call[2]) :]
    return [int(job_id.rpartition(b".")[2]) for job_id in arguments[3::8]]


class QueueCase(PoolCase):
    replicas = 0

    async def setUp(self) -> None:  # type: ignore[override]
        super().setUp()
        self.breaker = CircuitBreaker(BreakerPolicy(slow_call_s=10.0, probe_timeout_s=10.0), lambda: 0.0)
        self.acknowledged: list[int] = []
        self.ended: list[int] = []
        self.queue = RedisQueue(
            self.clock,
            self.pool,
            self.breaker,
            QueueSettings("bull", Wire.AUTO, 60_000, lambda: "the tests", self.replicas),
            deadline_s=_DEADLINE_S,
            acknowledged=self.acknowledge,
        )
        self.line = await self.connect()

    def acknowledge(self, jobs: Iterable[Job]) -> None:
        self.acknowledged += [job_number(job) for job in jobs]

    def add(self, *job_numbers: int, **settings: Any) -> list[Deferred[Receipt]]:
        return [self.add_job(make_job(number, **settings)) for number in job_numbers]

    def add_job(self, job: Job) -> Deferred[Receipt]:
        receipt = self.queue.add(job)
        receipt.addBoth(self.note_end, job_number(job))
        self.addCleanup(self.forget, receipt)  # what a test leaves open fails when the pool ends
        return receipt

    def forget(self, receipt: Deferred[Receipt]) -> None:
        receipt.addErrback(lambda _: None)

    def note_end(self, result: Any, number: int) -> Any:
        self.ended.append(number)
        return result

    def turn(self) -> None:
        """End the turn of the reactor: what was added in it is sent."""
        self.clock.advance(0)

    def sent(self, line: Line | None = None) -> list[int]:
        """Return the numbers of the jobs of the one call that was sent."""
        return numbers_of((line or self.line).expect(b"EVALSHA"))

    def outcomes(self, receipts: Iterable[Deferred[Receipt]]) -> list[Outcome]:
        return [self.successResultOf(receipt).outcome for receipt in receipts]

    def assert_added(self, receipts: Iterable[Deferred[Receipt]]) -> None:
        self.assertEqual(set(self.outcomes(receipts)), {Outcome.QUEUED})

    def assert_failed(
        self, receipts: Iterable[Deferred[Receipt]], kind: RedisErrorKind, *, unknown: bool
    ) -> None:
        for receipt in receipts:
            reason = self.failureResultOf(receipt, QueueUnavailable).value
            self.assertEqual((reason.kind, reason.unknown), (kind, unknown))

    def calls(self) -> dict[CallOutcome, int]:
        """Return the calls that the breaker has counted, without the zeros."""
        return {outcome: count for outcome, count in self.breaker.calls.items() if count}


class BatchTests(QueueCase):
    async def test_one_job_is_one_call_of_the_script(self) -> None:
        job = Job(
            "chatwoot", "a.1", "created", b"{}", b'{"attempts":3}', 17, delay_ms=5, priority=3, lifo=True
        )
        receipt = self.queue.add(job)
        self.turn()
        keys, arguments = add_jobs_arguments(
            QueueKeys("bull", "chatwoot"), [job], lock_ttl_ms=60_000, wire=Wire.AUTO, set_by="the tests"
        )
        expected = [ADD_JOBS.sha1, str(len(keys)), *keys, *arguments]
        self.assertEqual(
            self.line.expect(b"EVALSHA")[1:],
            [text.encode() if isinstance(text, str) else text for text in expected],
        )
        self.assertNoResult(receipt)
        self.line.reply(added(1))
        self.assertEqual(self.successResultOf(receipt), Receipt(Outcome.QUEUED, "a.1", "created"))

    async def test_the_jobs_of_one_turn_go_in_one_call(self) -> None:
        receipts = self.add(3, 1, 2)
        self.assertEqual(self.line.commands(), [])  # more may come in this turn
        self.turn()
        self.assertEqual(self.sent(), [3, 1, 2])
        self.line.reply(added(3))
        self.assert_added(receipts)
        self.assertEqual(self.ended, [3, 1, 2])

    async def test_what_waits_while_a_call_is_in_flight_goes_in_the_next(self) -> None:
        first = self.add(1)
        self.turn()
        self.assertEqual(self.sent(), [1])
        rest = self.add(2, 3)
        self.turn()
        rest += self.add(4)
        self.turn()
        self.assertEqual(self.line.commands(), [])
        self.line.reply(added(1))
        self.assert_added(first)
        self.assertEqual(self.sent(), [2, 3, 4])
        self.line.reply(added(3))
        self.assert_added(rest)
        self.turn()
        self.assertEqual(self.line.commands(), [])

    async def test_an_idle_queue_sends_again(self) -> None:
        for number in range(3):
            receipts = self.add(number)
            self.turn()
            self.assertEqual(self.sent(), [number])
            self.line.reply(added(1))
            self.assert_added(receipts)

    async def test_a_job_that_is_added_by_a_receipt(self) -> None:
        later: list[Deferred[Receipt]] = []
        self.add(1)[0].addCallback(lambda _: later.extend(self.add(2)))
        self.turn()
        self.assertEqual(self.sent(), [1])
        self.line.reply(added(1))
        self.assertEqual(self.sent(), [2])
        self.line.reply(added(1))
        self.assert_added(later)

    async def test_at_most_128_jobs(self) -> None:
        receipts = self.add(*range(300))
        self.turn()
        for expected in range(128), range(128, 256), range(256, 300):
            self.assertEqual(self.sent(), list(expected))
            self.line.reply(added(len(expected)))
        self.assert_added(receipts)

    async def test_at_most_1_mib_but_for_one(self) -> None:
        for number in range(4):
            self.add(number, data=b"x" * 400_000)
        self.add(4, data=b"x" * 2_000_000)
        self.add(5)
        self.turn()
        for expected in [0, 1], [2, 3], [4], [5]:
            self.assertEqual(self.sent(), expected)
            self.line.reply(added(len(expected)))

    async def test_the_queues_take_turns(self) -> None:
        self.add(*range(200), queue="busy")
        self.add(1000, queue="quiet")
        self.add(2000, 2001, queue="other")
        self.turn()
        for expected in [*range(128)], [1000], [2000, 2001], [*range(128, 200)]:
            self.assertEqual(self.sent(), expected)
            self.line.reply(added(len(expected)))

    async def test_a_cancelled_receipt_does_not_disturb_the_others(self) -> None:
        receipts = self.add(1, 2, 3)
        receipts[0].cancel()
        self.turn()
        self.assertEqual(self.sent(), [1, 2, 3])  # it is not taken back
        receipts[1].cancel()
        self.line.reply(added(3))
        for receipt in receipts[:2]:
            self.failureResultOf(receipt, CancelledError)
        self.assert_added(receipts[2:])
        self.assertEqual(self.acknowledged, [1, 2, 3])

    async def test_cancelled_receipts_of_a_call_that_fails(self) -> None:
        receipts = self.add(1, 2)
        self.turn()
        waiting = self.add(3, 4)
        for receipt in receipts[0], waiting[0]:
            receipt.cancel()
            self.failureResultOf(receipt, CancelledError)
        self.line.hang_up()
        self.assert_failed(receipts[1:], RedisErrorKind.DISCONNECTED, unknown=True)
        self.assert_failed(waiting[1:], RedisErrorKind.DISCONNECTED, unknown=False)


class AnswerTests(QueueCase):
    def answered(self, *answers: bytes) -> list[Deferred[Receipt]]:
        """Add jobs, numbered from 0, in one call with these answers; return their receipts."""
        receipts = self.add(*range(len(answers)))
        self.turn()
        self.sent()
        self.line.reply(array(*answers))
        return receipts

    async def test_added_and_duplicate(self) -> None:
        receipts = self.answered(_ADDED, _LOCK_HELD, _JOB_EXISTS)
        already = Outcome.ALREADY_QUEUED
        self.assertEqual(self.outcomes(receipts), [Outcome.QUEUED, already, already])
        self.assertEqual(self.acknowledged, [0, 1, 2])
        self.assertEqual(self.calls(), {CallOutcome.SUCCESS: 1})

    async def test_a_job_that_is_refused_is_refused_alone(self) -> None:
        refused, not_now, other, taken = self.answered(
            bulk(b"WRONGTYPE Operation against a key holding the wrong kind of value"),
            bulk(b"NOPERM this user has no permissions to run the 'zadd' command"),
            bulk(b"ERR what"),
            _ADDED,
        )
        self.assertIn("WRONGTYPE", str(self.failureResultOf(refused, JobRefused).value))
        self.assert_failed([not_now], RedisErrorKind.NOPERM, unknown=False)
        self.assert_failed([other], RedisErrorKind.OTHER, unknown=False)
        self.assert_added([taken])
        self.assertEqual(self.acknowledged, [3])
        self.assertEqual(self.calls(), {CallOutcome.SUCCESS: 1})  # Redis answered
        self.assertFalse(self.line.is_aborted)

    async def test_an_error_reply_fails_the_call(self) -> None:
        """None of its jobs is added. Some kinds mean that another server may be the right one."""
        for message, kind, gives_up in (
            ("READONLY You can't write against a read only replica.", RedisErrorKind.READONLY, True),
            ("UNBLOCKED force unblock", RedisErrorKind.READONLY, True),
            ("LOADING Redis is loading the dataset in memory", RedisErrorKind.LOADING, True),
            ("MASTERDOWN Link with MASTER is down", RedisErrorKind.MASTERDOWN, True),
            ("NOAUTH Authentication required.", RedisErrorKind.NOAUTH, True),
            ("CLUSTERDOWN The cluster is down", RedisErrorKind.CLUSTER, True),
            ("CROSSSLOT Keys in request don't hash to the same slot", RedisErrorKind.CLUSTER, True),
            ("MOVED 3999 127.0.0.1:6381", RedisErrorKind.CLUSTER, True),
            ("NOREPLICAS Not enough good replicas to write.", RedisErrorKind.NOREPLICAS, False),
            ("OOM command not allowed when used memory > 'maxmemory'.", RedisErrorKind.OOM, False),
            ("MISCONF Errors writing to the AOF file", RedisErrorKind.MISCONF, False),
            ("BUSY Redis is busy running a script.", RedisErrorKind.BUSY, False),
            ("NOPERM no permissions to run the 'evalsha' command", RedisErrorKind.NOPERM, False),
            ("WRONGTYPE Operation against a key", RedisErrorKind.WRONGTYPE, False),
            ("ERR what", RedisErrorKind.OTHER, False),
        ):
            await self.setUp()
            receipts = self.add(1, 2)
            self.turn()
            waiting = self.add(3)
            self.sent()
            self.line.reply(error(message))
            self.assert_failed([*receipts, *waiting], kind, unknown=False)
            self.assertEqual(self.line.is_aborted, gives_up, message)
            self.assertEqual(self.pool.writer is None, gives_up, message)
            self.assertEqual(self.calls(), {CallOutcome.FAILURE: 1}, message)
            assert self.pool.last_error is not None
            self.assertIs(self.pool.last_error.kind, kind)
            self.assertEqual((self.ended, self.acknowledged), ([1, 2, 3], []))

    async def test_after_an_error_that_keeps_the_connection_it_goes_on(self) -> None:
        receipts = self.add(1)
        self.turn()
        self.sent()
        self.line.reply(error("OOM command not allowed when used memory > 'maxmemory'."))
        self.assert_failed(receipts, RedisErrorKind.OOM, unknown=False)
        receipts = self.add(2)
        self.turn()
        self.assertEqual(self.sent(), [2])
        self.line.reply(added(1))
        self.assert_added(receipts)
        self.assertIsNone(self.pool.last_error)

    async def test_a_script_that_redis_does_not_know_is_sent_unseen(self) -> None:
        receipts = self.add(1, 2)
        self.turn()
        known = self.line.expect(b"EVALSHA")
        self.line.reply(_NOSCRIPT)
        unknown = self.line.expect(b"EVAL")
        self.assertEqual(unknown[1], ADD_JOBS.text)
        self.assertEqual(unknown[2:], known[2:])
        self.line.reply(added(2))
        self.assert_added(receipts)
        self.assertEqual(self.calls(), {CallOutcome.SUCCESS: 1})
        self.assertEqual(self.log.at(LogLevel.warn), [])
        self.add(3)
        self.turn()
        self.assertEqual(self.sent(), [3])

    async def test_redis_forgets_the_script_a_second_time(self) -> None:
        for number in range(2):
            receipts = self.add(number)
            self.turn()
            self.sent()
            self.line.reply(_NOSCRIPT)
            self.assertEqual(numbers_of(self.line.expect(b"EVAL")), [number])
            self.line.reply(added(1))
            self.assert_added(receipts)

    async def test_an_error_behind_noscript(self) -> None:
        receipts = self.add(1)
        self.turn()
        self.sent()
        self.line.reply(_NOSCRIPT)
        self.line.expect(b"EVAL")
        self.line.reply(error("OOM command not allowed"))
        self.assert_failed(receipts, RedisErrorKind.OOM, unknown=False)
        self.assertEqual(self.calls(), {CallOutcome.FAILURE: 1})

    async def test_a_reply_that_makes_no_sense_is_a_defect(self) -> None:
        for number, reply in enumerate(
            [added(1), added(3), b"+OK\r\n", array(_ADDED, integer(9)), b"*-1\r\n"]
        ):
            await self.setUp()
            receipts = self.add(1, 2)
            self.turn()
            waiting = self.add(3)
            self.sent()
            self.line.reply(reply)
            self.assert_failed(receipts, RedisErrorKind.OTHER, unknown=True)
            self.assertEqual(len(self.flushLoggedErrors(ValueError)), 1, number)
            self.assertEqual(self.calls(), {CallOutcome.FAILURE: 1})
            self.assertEqual(self.sent(), [3])  # no request hangs for it
            self.line.reply(added(1))
            self.assert_added(waiting)
            self.assertEqual(self.acknowledged, [3])


class SilenceTests(QueueCase):
    async def test_without_a_connection_a_job_fails_at_once(self) -> None:
        self.line.hang_up()
        self.assert_failed(self.add(1), RedisErrorKind.DISCONNECTED, unknown=False)
        self.assertEqual(self.calls(), {})  # there was no call

    async def test_without_a_connection_no_list_of_waits_grows(self) -> None:
        """Txredisapi keeps each command that it could not send."""
        self.line.hang_up()
        before = sum(isinstance(thing, Deferred) for thing in gc.get_objects())
        for number in range(500):
            self.queue.add(make_job(number)).addErrback(lambda _: None)
        self.turn()
        gc.collect()
        after = sum(isinstance(thing, Deferred) for thing in gc.get_objects())
        self.assertLess(after - before, 50)

    async def test_without_a_connection_the_reason_is_the_last_known(self) -> None:
        self.line.hang_up()
        self.network.accept().shake_hands(PING=error("LOADING Redis is loading the dataset in memory"))
        self.assert_failed(self.add(1), RedisErrorKind.LOADING, unknown=False)

    async def test_a_connection_that_is_lost_before_the_call(self) -> None:
        receipts = self.add(1, 2)
        self.line.hang_up()
        self.turn()
        self.assert_failed(receipts, RedisErrorKind.DISCONNECTED, unknown=False)
        self.assertEqual(self.calls(), {})

    async def test_a_connection_that_is_lost_in_a_call(self) -> None:
        receipts = self.add(1, 2)
        self.turn()
        waiting = self.add(3)
        self.line.hang_up()
        self.assert_failed(receipts, RedisErrorKind.DISCONNECTED, unknown=True)
        self.assert_failed(waiting, RedisErrorKind.DISCONNECTED, unknown=False)
        self.assertEqual(self.ended, [1, 2, 3])
        self.assertEqual(self.calls(), {CallOutcome.FAILURE: 1})

    async def test_no_answer_in_time(self) -> None:
        receipts = self.add(1, 2)
        self.turn()
        self.clock.advance(_DEADLINE_S - 0.01)
        waiting = [*self.add(3), *self.add(5, queue="other"), *self.add(4)]
        self.assertEqual(self.ended, [])
        self.clock.advance(0.01)
        self.assert_failed(receipts, RedisErrorKind.TIMEOUT, unknown=True)
        self.assert_failed(waiting, RedisErrorKind.TIMEOUT, unknown=False)
        self.assertEqual(self.ended, [1, 2, 3, 4, 5])  # those of one queue in their order
        self.assertTrue(self.line.is_aborted)
        self.assertIsNone(self.pool.writer)
        self.assertEqual(self.calls(), {CallOutcome.FAILURE: 1})
        self.assertEqual(self.acknowledged, [])

    async def test_a_late_answer_is_nobody_elses(self) -> None:
        other = await self.connect()
        late = self.add(1)
        self.turn()
        self.clock.advance(_DEADLINE_S)
        self.assert_failed(late, RedisErrorKind.TIMEOUT, unknown=True)
        receipts = self.add(2)
        self.turn()
        self.assertEqual(self.sent(other), [2])
        self.line.reply(array(_LOCK_HELD))
        self.assertNoResult(receipts[0])
        other.reply(added(1))
        self.assert_added(receipts)
        self.assertEqual(self.acknowledged, [2])

    async def test_no_answer_to_the_whole_script_in_time(self) -> None:
        receipts = self.add(1)
        self.turn()
        self.line.reply(_NOSCRIPT)
        self.clock.advance(_DEADLINE_S)
        self.assert_failed(receipts, RedisErrorKind.TIMEOUT, unknown=True)
        self.assertTrue(self.line.is_aborted)

    async def test_who_has_waited_too_long_is_not_sent(self) -> None:
        first = self.add(1, queue="a")
        second = self.add(2, queue="b")
        late = self.add(3, queue="c")
        self.turn()
        self.clock.advance(0.4)
        in_time = self.add(4, queue="c")
        self.line.reply(added(1))
        self.clock.advance(0.4)
        self.line.commands()
        self.line.reply(added(1))
        self.assert_added([*first, *second])
        self.assert_failed(late, RedisErrorKind.TIMEOUT, unknown=False)
        self.assertEqual(self.sent(), [4])
        self.line.reply(added(1))
        self.assert_added(in_time)
        self.assertEqual(self.calls(), {CallOutcome.SUCCESS: 3})

    async def test_when_all_have_waited_too_long_the_queue_is_idle_again(self) -> None:
        self.add(1, queue="a")
        self.add(2, queue="b")
        late = self.add(3, queue="c")
        self.turn()
        for _ in range(2):
            self.clock.advance(0.4)
            self.line.reply(added(1))
        self.assert_failed(late, RedisErrorKind.TIMEOUT, unknown=False)
        self.line.commands()
        self.add(4)
        self.turn()
        self.assertEqual(self.sent(), [4])


class BreakerTests(QueueCase):
    async def test_it_opens_on_failures_and_closes_on_probes(self) -> None:
        for number in range(2):
            self.add(number)[0].addErrback(lambda _: None)
            self.turn()
            self.line.reply(error("OOM command not allowed"))
        self.assertIs(self.breaker.state, State.OPEN)
        self.clock.advance(1)
        for number in range(2):
            self.add(number)
            self.turn()
            self.line.reply(added(1))
        self.assertIs(self.breaker.state, State.CLOSED)

    async def test_who_asks_all_the_same_is_heard(self) -> None:
        """The caller decides: if the spool takes nothing, Redis is the only hope."""
        for _ in range(2):
            permit = self.breaker.permit(self.clock.seconds())
            assert permit is not None
            permit.failed(self.clock.seconds())
        receipts = self.add(1)
        self.turn()
        self.line.reply(added(1))
        self.assert_added(receipts)
        self.assertEqual(self.calls(), {CallOutcome.FAILURE: 2, CallOutcome.NOT_PERMITTED: 1})


class ReplicasTests(QueueCase):
    replicas = 2

    async def setUp(self) -> None:  # type: ignore[override]
        await super().setUp()
        self.receipts = self.add(1, 2)
        self.turn()
        self.sent()
        self.line.reply(array(_ADDED, _LOCK_HELD))

    async def test_each_call_waits_for_them(self) -> None:
        self.assertNoResult(self.receipts[0])
        self.assertEqual(self.line.expect(b"WAIT")[1:], [b"2", b"250"])  # half of the deadline, in ms
        self.line.reply(integer(2))
        self.assertEqual(self.outcomes(self.receipts), [Outcome.QUEUED, Outcome.ALREADY_QUEUED])
        self.assertEqual(self.acknowledged, [1, 2])

    async def test_too_few(self) -> None:
        self.line.reply(integer(1))
        self.assert_failed(self.receipts, RedisErrorKind.NOREPLICAS, unknown=True)
        self.assertEqual(self.acknowledged, [])
        self.assertEqual(self.calls(), {CallOutcome.FAILURE: 1})
        self.assertFalse(self.line.is_aborted)

    async def test_no_answer(self) -> None:
        self.clock.advance(_DEADLINE_S)
        self.assert_failed(self.receipts, RedisErrorKind.TIMEOUT, unknown=True)
        self.assertTrue(self.line.is_aborted)

    async def test_an_error_says_nothing_of_the_jobs(self) -> None:
        self.line.reply(error("NOPERM no permissions to run the 'wait' command"))
        self.assert_failed(self.receipts, RedisErrorKind.NOPERM, unknown=True)
        self.assertEqual(self.acknowledged, [])

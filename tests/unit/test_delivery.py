"""The delivery policy and the drain, against fakes that answer at once or on demand."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import mkdtemp

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock
from twisted.logger import LogLevel
from twisted.trial.unittest import SynchronousTestCase

from tests.support.fakes import (
    NOT_SENT,
    UNKNOWN,
    AcceptingSink,
    Log,
    MemorySpool,
    PickySink,
    RefusingSink,
    SilentSink,
)
from tests.support.spools import HeldBack, Replica, make_job, numbers
from webhookd.delivery import Drain, JobDelivery, resend
from webhookd.model import (
    IJobSink,
    ISpool,
    Job,
    JobRefused,
    Outcome,
    QueueUnavailable,
    Receipt,
    SpoolRecord,
    SpoolUnavailable,
)
from webhookd.spool.queue import Spool

_REFUSED = JobRefused("WRONGTYPE")


class DeliveryTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.spool = MemorySpool()
        self.breaker_permits = True
        self.notices = 0

    def spooled(self) -> None:
        self.notices += 1

    def delivery(self, sink: IJobSink, spool: ISpool | None = None) -> JobDelivery:
        return JobDelivery(
            sink,
            spool or self.spool,
            may_call=lambda: self.breaker_permits,
            spooled=self.spooled,
            handover=lambda: None,
        )

    def deliver(self, sink: IJobSink, number: int = 1) -> Outcome:
        receipt = self.successResultOf(self.delivery(sink).deliver(make_job(number)))
        job = make_job(number)
        self.assertEqual((receipt.job_id, receipt.event), (job.id, job.name))
        return receipt.outcome

    def test_redis_first(self) -> None:
        sink = AcceptingSink()
        self.assertEqual(self.deliver(sink), Outcome.QUEUED)
        self.assertEqual(self.deliver(sink), Outcome.ALREADY_QUEUED)
        self.assertEqual((sink.queue, self.spool.numbers, self.notices), ([1], [], 0))

    def test_nobody_is_told_before_redis_is(self) -> None:
        sink = SilentSink()
        receipt = self.delivery(sink).deliver(make_job(1))
        self.assertNoResult(receipt)
        sink.accept()
        self.assertEqual(self.successResultOf(receipt).outcome, Outcome.QUEUED)

    def test_behind_what_is_in_the_spool(self) -> None:
        sink = RefusingSink()
        self.spool.append(make_job(1))
        self.assertEqual(self.deliver(sink, 2), Outcome.SPOOLED)
        self.assertEqual((sink.asked, self.spool.numbers, self.notices), ([], [1, 2], 1))

    def test_behind_what_is_on_its_way_into_the_spool(self) -> None:
        sink = RefusingSink()
        self.spool.busy = True
        self.assertEqual(self.deliver(sink), Outcome.SPOOLED)
        self.assertEqual(sink.asked, [])

    def test_what_the_spool_holds_already_is_said_so(self) -> None:
        self.spool.append(make_job(1))
        self.assertEqual(self.deliver(AcceptingSink()), Outcome.ALREADY_QUEUED)

    def test_redis_is_not_asked_while_the_breaker_is_open(self) -> None:
        sink = AcceptingSink()
        self.breaker_permits = False
        self.assertEqual(self.deliver(sink), Outcome.SPOOLED)
        self.assertEqual((sink.queue, self.notices), ([], 1))

    def test_whatever_redis_did_not_take_is_spooled(self) -> None:
        for error in NOT_SENT, UNKNOWN, _REFUSED, ZeroDivisionError():
            self.spool.records.clear()
            self.assertEqual(self.deliver(RefusingSink(error)), Outcome.SPOOLED, error)
            self.assertEqual(self.spool.numbers, [1], error)

    def test_jobs_that_fail_together_are_spooled_in_their_order(self) -> None:
        sink = SilentSink()
        delivery = self.delivery(sink)
        receipts = [delivery.deliver(make_job(number)) for number in (3, 1, 2)]
        sink.refuse(UNKNOWN)
        outcomes = [self.successResultOf(receipt).outcome for receipt in receipts]
        self.assertEqual(outcomes, [Outcome.SPOOLED] * 3)
        self.assertEqual((self.spool.numbers, self.notices), ([3, 1, 2], 3))

    def test_a_spool_that_takes_nothing_is_no_reason_to_refuse(self) -> None:
        """Out of order in Redis, with an open breaker, is better than lost."""
        self.spool.append(make_job(1))
        self.spool.problem = "broken"
        for self.breaker_permits in True, False:
            sink = AcceptingSink()
            self.assertEqual(self.deliver(sink, 2), Outcome.QUEUED)
            self.assertEqual((sink.queue, self.notices), ([2], 0))

    def test_when_neither_takes_it_that_is_an_error(self) -> None:
        self.spool.problem = "broken"
        sink = RefusingSink(UNKNOWN)
        delivery = self.delivery(sink)
        self.failureResultOf(delivery.deliver(make_job(1)), SpoolUnavailable)
        self.breaker_permits = False
        self.failureResultOf(delivery.deliver(make_job(2)), QueueUnavailable)
        self.assertEqual(sink.asked, [1, 2])  # each once

    def test_a_defect_of_the_spool_is_not_covered_up(self) -> None:
        class DefectSpool(MemorySpool):
            def append(self, job: Job) -> Deferred[Receipt]:
                return fail(ZeroDivisionError())

        self.breaker_permits = False
        delivery = self.delivery(AcceptingSink(), DefectSpool())
        self.failureResultOf(delivery.deliver(make_job(1)), ZeroDivisionError)

    def test_through_the_spool_though_redis_could(self) -> None:
        sink = AcceptingSink()
        receipt = self.delivery(sink).deliver_through_spool(make_job(1))
        self.assertEqual(self.successResultOf(receipt).outcome, Outcome.SPOOLED)
        self.assertEqual((sink.queue, self.spool.numbers, self.notices), ([], [1], 1))


class ResendTests(SynchronousTestCase):
    def test_each_in_order(self) -> None:
        sink = AcceptingSink()
        resend([make_job(2), make_job(1)], sink.add)
        self.assertEqual(sink.queue, [2, 1])

    def test_many_do_not_go_at_once(self) -> None:
        under_way: list[Deferred[Receipt]] = []

        def deliver(job: Job) -> Deferred[Receipt]:
            under_way.append(Deferred())
            return under_way[-1]

        resend([make_job(number) for number in range(300)], deliver)
        for sent in (128, 256, 300):
            self.assertEqual(len(under_way), sent)
            for number, receipt in enumerate(tuple(under_way)):
                if not receipt.called:
                    receipt.callback(Receipt(Outcome.SPOOLED, str(number), "created"))

    def test_one_that_fails_is_logged_and_the_rest_go_on(self) -> None:
        log = Log.of(self)
        sink = PickySink({1: SpoolUnavailable("full")})
        resend([make_job(1), make_job(2)], sink.add)
        self.assertEqual(sink.accepting.queue, [2])
        (line,) = log.at(LogLevel.error)
        self.assertIn("full", line)


class DrainCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.spool: MemorySpool = MemorySpool()
        self.worth_asking_in_s = 0.0

    def drain(self, sink: IJobSink, spool: ISpool | None = None) -> Drain:
        return Drain(self.clock, spool or self.spool, sink, lambda: self.worth_asking_in_s)

    def fill(self, *job_numbers: int) -> None:
        for number in job_numbers:
            self.successResultOf(self.spool.append(make_job(number)))

    def disk_spool(self, disk: HeldBack) -> Spool:
        root = Path(mkdtemp())
        self.addCleanup(shutil.rmtree, root)
        opening = Replica(root, run=disk).spools.open_own()
        disk.go()
        return self.successResultOf(opening)

    def assert_at_rest(self) -> None:
        """No delayed call is left."""
        self.assertEqual(self.clock.getDelayedCalls(), [])


class DrainTests(DrainCase):
    def test_in_order_until_it_is_empty(self) -> None:
        sink = AcceptingSink()
        self.fill(*range(300, 0, -1))
        self.drain(sink).wake()
        self.assertEqual(sink.queue, list(range(300, 0, -1)))
        self.assertEqual(self.spool.numbers, [])
        self.assert_at_rest()

    def test_an_empty_spool_is_left_alone(self) -> None:
        self.drain(RefusingSink()).wake()
        self.assert_at_rest()

    def test_one_batch_of_128_at_a_time(self) -> None:
        sink = SilentSink()
        self.fill(*range(130))
        drain = self.drain(sink)
        drain.wake()
        drain.wake()  # as each append does
        self.assertEqual(list(sink.waiting), list(range(128)))
        self.fill(130)
        sink.accept()
        self.assertEqual(sink.accept(), [128, 129, 130])
        self.assertEqual(self.spool.numbers, [])

    def test_a_batch_of_1_mib(self) -> None:
        sink = SilentSink()
        for number in range(3):
            self.spool.append(make_job(number, data=b"x" * 500_000))
        self.spool.append(make_job(3, data=b"x" * 2_000_000))
        self.drain(sink).wake()
        self.assertEqual([sink.accept() for _ in range(3)], [[0, 1], [2], [3]])

    def test_only_what_redis_acknowledged_is_removed(self) -> None:
        sink = PickySink({2: UNKNOWN, 4: NOT_SENT})
        self.fill(1, 2, 3, 4, 5)
        self.drain(sink).wake()
        self.assertEqual(self.spool.numbers, [2, 4])
        sink.errors = {}
        self.clock.advance(0.1)
        self.assertEqual(sink.accepting.queue, [1, 3, 5, 2, 4])
        self.assertEqual(self.spool.numbers, [])
        self.assert_at_rest()

    def test_what_redis_has_already_is_removed(self) -> None:
        sink = AcceptingSink(queue=[1])
        self.fill(1)
        self.drain(sink).wake()
        self.assertEqual((sink.queue, self.spool.numbers), ([1], []))

    def test_what_can_never_be_queued_is_buried_and_does_not_block_the_rest(self) -> None:
        sink = PickySink({1: _REFUSED, 100: _REFUSED})
        self.fill(*range(200))
        self.drain(sink).wake()
        self.assertEqual(len(sink.accepting.queue), 198)
        self.assertEqual(self.spool.dead, [(1, "WRONGTYPE"), (100, "WRONGTYPE")])
        self.assertEqual(self.spool.numbers, [])
        self.assert_at_rest()

    def test_a_job_is_buried_beside_one_that_has_to_wait(self) -> None:
        sink = PickySink({1: _REFUSED, 2: NOT_SENT})
        self.fill(1, 2)
        self.drain(sink).wake()
        self.assertEqual((self.spool.dead, self.spool.numbers), ([(1, "WRONGTYPE")], [2]))

    def test_it_pauses_as_long_as_it_is_told_within_bounds(self) -> None:
        for told_s, pause_s in (0.0, 0.1), (0.05, 0.1), (3.0, 3.0), (60.0, 5.0):
            self.worth_asking_in_s = told_s
            self.fill(1)
            sink = RefusingSink()
            drain = self.drain(sink)
            drain.wake()
            self.clock.advance(pause_s - 0.01)
            self.assertEqual(sink.asked, [1], told_s)
            self.clock.advance(0.01)
            self.assertEqual(sink.asked, [1, 1], told_s)
            drain.stop()

    def test_waking_ends_a_pause(self) -> None:
        sink = PickySink({1: NOT_SENT})
        self.fill(1)
        drain = self.drain(sink)
        drain.wake()
        sink.errors = {}
        drain.wake()
        self.assertEqual(sink.accepting.queue, [1])
        self.assert_at_rest()

    def test_it_pauses_while_the_disk_is_broken(self) -> None:
        sink = AcceptingSink()
        self.fill(1)
        self.spool.problem = "broken"
        self.drain(sink).wake()
        self.assertEqual(sink.queue, [])
        self.spool.problem = None
        self.clock.advance(0.1)
        self.assertEqual((sink.queue, self.spool.numbers), ([1], []))

    def test_a_removal_that_fails_is_made_good_by_sending_again(self) -> None:
        sink = SilentSink()
        self.fill(1)
        self.drain(sink).wake()
        self.spool.problem = "broken"
        sink.accept()
        self.spool.problem = None
        self.assertEqual(self.spool.numbers, [1])
        self.clock.advance(0.1)
        self.assertEqual(sink.accept(), [1])
        self.assertEqual(self.spool.numbers, [])

    def test_records_that_cannot_be_read_make_it_pause_not_spin(self) -> None:
        class UnreadableSpool(MemorySpool):
            reads = 0

            def first(self, limit: int, max_bytes: int) -> Deferred[Sequence[SpoolRecord]]:
                self.reads += 1
                return succeed([])

        spool = UnreadableSpool()
        spool.append(make_job(1))
        drain = self.drain(RefusingSink(), spool)
        drain.wake()
        self.assertEqual(spool.reads, 1)
        self.clock.advance(0.1)
        self.assertEqual(spool.reads, 2)
        drain.stop()

    def test_a_defect_is_logged_and_ends_nothing_for_good(self) -> None:
        class DefectOnce(MemorySpool):
            is_defect = True

            def first(self, limit: int, max_bytes: int) -> Deferred[Sequence[SpoolRecord]]:
                return fail(ZeroDivisionError()) if self.is_defect else super().first(limit, max_bytes)

        sink = AcceptingSink()
        spool = DefectOnce()
        spool.append(make_job(1))
        drain = self.drain(sink, spool)
        self.assertIsNone(self.successResultOf(drain.until_empty()))
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        spool.is_defect = False
        drain.wake()
        self.assertEqual(sink.queue, [1])


class UntilEmptyTests(DrainCase):
    def test_of_an_empty_spool(self) -> None:
        self.assertIsNone(self.successResultOf(self.drain(RefusingSink()).until_empty()))

    def test_it_fires_when_the_last_record_is_removed(self) -> None:
        sink = SilentSink()
        self.fill(*range(129))
        drain = self.drain(sink)
        waiters = [drain.until_empty(), drain.until_empty()]
        sink.accept()
        self.assertNoResult(waiters[0])
        sink.accept()
        for waiter in waiters:
            self.assertIsNone(self.successResultOf(waiter))

    def test_who_gives_up_waiting_does_not_disturb_the_others(self) -> None:
        sink = SilentSink()
        self.fill(1)
        drain = self.drain(sink)
        impatient, patient = drain.until_empty(), drain.until_empty()
        impatient.addErrback(lambda _: None)
        impatient.cancel()
        sink.accept()
        self.assertIsNone(self.successResultOf(patient))


class StopTests(DrainCase):
    """At each point: what was not removed stays, Redis is no longer asked, and no waiter hangs."""

    def stop(self, drain: Drain, waiter: Deferred[None]) -> None:
        self.assertNoResult(waiter)
        drain.stop()
        self.assertIsNone(self.successResultOf(waiter))
        self.assert_at_rest()
        drain.wake()
        self.assert_at_rest()

    def test_before_it_began(self) -> None:
        self.fill(1)
        drain = self.drain(RefusingSink())
        drain.stop()
        drain.wake()
        self.assertIsNone(self.successResultOf(drain.until_empty()))
        self.assertEqual(self.spool.numbers, [1])

    def test_in_a_pause(self) -> None:
        sink = RefusingSink()
        self.fill(1)
        drain = self.drain(sink)
        waiter = drain.until_empty()
        self.stop(drain, waiter)
        self.assertEqual((sink.asked, self.spool.numbers), ([1], [1]))

    def test_while_redis_is_asked(self) -> None:
        sink = SilentSink()
        self.fill(1, 2)
        drain = self.drain(sink)
        waiter = drain.until_empty()
        self.stop(drain, waiter)
        sink.accept()  # too late
        self.assertEqual(self.spool.numbers, [1, 2])

    def test_while_the_disk_is_asked(self) -> None:
        """On the real spool, whose disk works one piece at a time: read, remove, and bury."""
        for steps, left, dead in (0, [1, 2], 0), (1, [1], 0), (2, [], 1):
            disk = HeldBack()
            spool = self.disk_spool(disk)
            for number in 1, 2:
                spool.append(make_job(number))
            disk.go()
            drain = self.drain(PickySink({1: _REFUSED}), spool)
            waiter = drain.until_empty()
            for _ in range(steps):
                disk.step()
            self.stop(drain, waiter)
            disk.go()  # what was asked for is done all the same
            self.assertEqual(self.held(spool, disk), left, steps)
            self.assertEqual(spool.stats.dead_records, dead, steps)

    def held(self, spool: Spool, disk: HeldBack) -> list[int]:
        reading = spool.first(100, 1 << 20)
        disk.go()
        return numbers(self.successResultOf(reading))


class HandoverTests(DrainCase):
    """Jobs that arrive while the last jobs of the spool move."""

    def setUp(self) -> None:
        super().setUp()
        self.sink = SilentSink()
        self.handing_over = self.drain(self.sink)
        self.delivery = JobDelivery(
            self.sink,
            self.spool,
            may_call=lambda: True,
            spooled=self.handing_over.wake,
            handover=self.handing_over.handover.wait,
        )

    def deliver(self, *job_numbers: int) -> list[Deferred[Receipt]]:
        return [self.delivery.deliver(make_job(number)) for number in job_numbers]

    def assert_outcome(self, receipts: list[Deferred[Receipt]], outcome: Outcome) -> None:
        self.assertEqual({self.successResultOf(receipt).outcome for receipt in receipts}, {outcome})

    def test_they_go_to_redis_behind_it(self) -> None:
        self.fill(1, 2)
        self.handing_over.wake()
        receipts = self.deliver(3, 4)
        self.assertEqual(list(self.sink.waiting), [1, 2])
        self.assertEqual(self.sink.accept(), [1, 2])
        receipts += self.deliver(5)
        self.assertEqual((self.sink.accept(), self.spool.numbers), ([3, 4, 5], []))
        self.assert_outcome(receipts, Outcome.QUEUED)
        self.assert_at_rest()

    def test_they_do_not_wait_for_long(self) -> None:
        self.fill(1)
        self.handing_over.wake()
        receipts = self.deliver(2, 3)
        self.clock.advance(0.25)
        self.assert_outcome([*receipts, *self.deliver(4)], Outcome.SPOOLED)
        self.assertEqual(self.spool.numbers, [1, 2, 3, 4])
        self.assertEqual([self.sink.accept(), self.sink.accept()], [[1], [2, 3, 4]])
        self.assert_at_rest()

    def test_where_redis_refuses_it_they_follow_it_into_the_spool(self) -> None:
        self.fill(1)
        self.handing_over.wake()
        receipts = self.deliver(2)
        self.sink.refuse(NOT_SENT)
        self.assert_outcome(receipts, Outcome.SPOOLED)
        self.assertEqual(self.spool.numbers, [1, 2])

    def test_nobody_waits_where_many_are_left_or_redis_is_away(self) -> None:
        for count, worth_asking_in_s in (513, 0.0), (1, 1.0):
            self.setUp()
            self.worth_asking_in_s = worth_asking_in_s
            self.fill(*range(count))
            self.handing_over.wake()
            self.assert_outcome(self.deliver(1000), Outcome.SPOOLED)

    def test_one_that_failed_is_not_tried_again_at_once(self) -> None:
        self.fill(1)
        self.handing_over.wake()
        self.clock.advance(0.25)
        self.deliver(2)
        self.sink.accept()
        self.assert_outcome(self.deliver(3), Outcome.SPOOLED)
        self.clock.advance(10)
        self.sink.accept()
        (receipt,) = self.deliver(4)
        self.assertNoResult(receipt)


class LiveAndSpooledTests(DrainCase):
    def test_order_is_kept_over_an_outage(self) -> None:
        """Delivery and drain together, on the real spool."""
        disk = HeldBack()
        spool = self.disk_spool(disk)
        sink = PickySink(dict.fromkeys(range(2, 6), UNKNOWN))
        drain = self.drain(sink, spool)
        delivery = JobDelivery(
            sink, spool, may_call=lambda: True, spooled=drain.wake, handover=drain.handover.wait
        )

        receipts = [delivery.deliver(make_job(number)) for number in (1, 2, 3)]
        receipts.append(delivery.deliver(make_job(4)))  # while the others are on their way to the disk
        disk.go()
        receipts.append(delivery.deliver(make_job(5)))  # while the drain pauses
        disk.go()
        sink.errors = {}
        self.clock.advance(0.1)  # the drain continues
        receipts.append(delivery.deliver(make_job(6)))
        disk.go()
        self.clock.advance(0.1)
        receipts.append(delivery.deliver(make_job(7)))

        outcomes = [self.successResultOf(receipt).outcome for receipt in receipts]
        self.assertEqual(outcomes, [Outcome.QUEUED, *[Outcome.SPOOLED] * 5, Outcome.QUEUED])
        self.assertEqual(sink.accepting.queue, [1, 2, 3, 4, 5, 6, 7])
        self.assert_at_rest()

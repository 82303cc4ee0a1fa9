"""The life of a replica's own spool: on real files, without a thread, on the test's clock."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from attrs import Factory, define
from twisted.internet.defer import Deferred, fail
from twisted.logger import LogLevel

from tests.support.fakes import AcceptingSink, PickySink, RefusingSink, SilentSink
from tests.support.spools import Disk, HeldBack, Replica, inline, make_job, numbers
from tests.unit.spool.case import SpoolCase
from webhookd.delivery import Drain, JobDelivery
from webhookd.model import IJobSink, ISpool, JobRefused, Outcome, Receipt, SpoolUnavailable
from webhookd.spool.database import SpoolLimits
from webhookd.spool.queue import DeferToThread, Spool, SpoolThread
from webhookd.spool.record import encode_record
from webhookd.spool.service import SpoolService

_T = TypeVar("_T")

_DRAIN_DEADLINE_S = 20.0
_HEAL_S, _ORPHANS_S, _EXPIRE_S = 2.0, 30.0, 3600.0


class NoThread(SpoolThread):
    """A thread without work: the spools of these tests work elsewhere."""

    def __init__(self) -> None:
        self.runs = False

    def start(self) -> None:
        self.runs = True

    def stop(self) -> None:
        self.runs = False


@define
class Defective:
    """Does the spool's work at once; while ``is_defect``, the work fails with an unexpected error."""

    is_defect: bool = False

    def __call__(self, work: Callable[[], _T], /) -> Deferred[_T]:
        return fail(ZeroDivisionError()) if self.is_defect else inline(work)


@define
class ControlSockets:
    """Opens control sockets; ``paths`` are the directories of the open ones."""

    paths: list[Path] = Factory(list)

    async def open(self, spool: Spool, _drain: Drain) -> _ControlSocket:
        path = spool.directory.path
        assert path.exists()
        self.paths.append(path)
        return _ControlSocket(self, path)


@define
class _ControlSocket:
    _sockets: ControlSockets
    _path: Path

    async def close(self) -> None:
        self._sockets.paths.remove(self._path)


class ServiceCase(SpoolCase):
    def setUp(self) -> None:
        super().setUp()
        self.sockets = ControlSockets()
        self.thread = NoThread()
        self.sink: IJobSink = RefusingSink()
        self.disk = Disk()

    def start(
        self,
        *,
        run: DeferToThread = inline,
        limits: SpoolLimits = SpoolLimits(min_free_bytes=0),  # noqa: B008 - it is frozen
        mountinfo: str = "",
    ) -> SpoolService:
        replica = Replica(self.root, run=run, limits=limits, mountinfo=mountinfo, disk=self.disk)
        self.clock = replica.clock

        def make_drain(spool: ISpool) -> Drain:
            return Drain(self.clock, spool, self.sink, lambda: 0.0)

        service = SpoolService(
            self.clock, self.thread, replica.spools, make_drain, _DRAIN_DEADLINE_S, self.sockets.open
        )
        service.startService()
        return service

    def stop(self, service: SpoolService) -> None:
        self.now(service.stopService())

    def other_replica(self, *job_numbers: int) -> Spool:
        """Return the spool of another replica, with jobs in it."""
        spool = self.open()
        self.append(spool, *job_numbers)
        return spool

    def orphan(self, *job_numbers: int) -> Path:
        """Return the directory of a spool that another replica left, with jobs in it."""
        spool = self.other_replica(*job_numbers)
        self.now(spool.close())
        return spool.directory.path

    def directories(self) -> list[Path]:
        return sorted(self.root.iterdir())


class OpeningTests(ServiceCase):
    def test_until_it_is_open_everything_waits(self) -> None:
        disk = HeldBack()
        service = self.start(run=disk)
        receipt, first = service.append(make_job(1)), service.first(1, 1)
        for each in receipt, first:
            self.assertNoResult(each)
        self.assertFalse(service.is_empty)  # it may hold something that must not be overtaken
        self.assertFalse(service.is_up)
        self.assertIsNone(service.stats.problem)
        disk.go()
        self.assertEqual(self.now(receipt).outcome, Outcome.SPOOLED)
        self.assertEqual(numbers(self.now(first)), [1])
        self.assertEqual(service.stats.records, 1)
        self.assertTrue(service.is_up)

    def test_what_an_earlier_run_left_is_drained(self) -> None:
        self.orphan(1, 2)
        self.sink = sink = AcceptingSink()
        service = self.start()
        self.assertEqual(sink.queue, [1, 2])
        self.assertTrue(service.is_empty)

    def test_one_that_cannot_be_opened_has_a_reason_and_heals(self) -> None:
        self.root.write_text("in the way")
        service = self.start()
        self.assertTrue(service.is_empty)  # so that Redis is asked
        self.assertTrue((service.stats.problem or "").startswith("broken: "))
        self.assertFalse(service.is_up)
        reason = str(self.failureResultOf(service.append(make_job(1)), SpoolUnavailable).value)
        self.assertEqual(reason, service.stats.problem)
        self.clock.advance(_HEAL_S)
        self.assertEqual(self.logged_at(LogLevel.error), 1)  # not each time that it is tried
        self.root.unlink()
        self.clock.advance(_HEAL_S)
        self.append(service, 1)
        self.assertIsNone(service.stats.problem)

    def test_what_waits_for_one_that_cannot_be_opened_fails_with_the_reason(self) -> None:
        self.root.write_text("in the way")
        disk = HeldBack()
        service = self.start(run=disk)
        receipts = [service.append(make_job(number)) for number in (1, 2)]
        disk.go()
        for receipt in receipts:
            message = str(self.failureResultOf(receipt, SpoolUnavailable).value)
            self.assertTrue(message.startswith("broken: "), message)

    def deliver_while_it_is_opened(self, *job_numbers: int, redis_is_up: bool = True) -> list[Receipt]:
        """Deliver events while the spool is still being opened, and return their receipts."""
        disk = HeldBack()
        service = self.start(run=disk)
        delivery = JobDelivery(
            self.sink,
            service,
            may_call=lambda: redis_is_up,
            spooled=service.drain.wake,
            handover=service.drain.handover.wait,
        )
        receipts = [delivery.deliver(make_job(number)) for number in job_numbers]
        for receipt in receipts:
            self.assertNoResult(receipt)
        disk.go()
        return [self.now(receipt) for receipt in receipts]

    def test_events_wait_for_it_and_skip_the_disk_if_it_is_empty(self) -> None:
        self.sink = sink = AcceptingSink()
        receipts = self.deliver_while_it_is_opened(1, 2, 3)
        self.assertEqual({receipt.outcome for receipt in receipts}, {Outcome.QUEUED})
        self.assertEqual(sink.queue, [1, 2, 3])

    def test_events_follow_what_an_earlier_run_left(self) -> None:
        self.orphan(1, 2)
        self.sink = sink = AcceptingSink()
        receipts = self.deliver_while_it_is_opened(3, 4)
        self.assertEqual({receipt.outcome for receipt in receipts}, {Outcome.SPOOLED})
        self.assertEqual(sink.queue, [1, 2, 3, 4])

    def test_events_that_waited_are_spooled_if_redis_is_away(self) -> None:
        (receipt,) = self.deliver_while_it_is_opened(1, redis_is_up=False)
        self.assertEqual(receipt.outcome, Outcome.SPOOLED)

    def test_events_that_waited_for_one_that_cannot_be_opened_are_queued(self) -> None:
        self.root.write_text("in the way")
        self.sink = AcceptingSink()
        (receipt,) = self.deliver_while_it_is_opened(1)
        self.assertEqual(receipt.outcome, Outcome.QUEUED)

    def test_a_place_where_it_can_never_be(self) -> None:
        mountinfo = f"22 1 0:25 / {self.root.resolve()} rw - nfs4 server:/srv rw\n"
        service = self.start(mountinfo=mountinfo)
        self.assertIn("nfs4", service.stats.problem or "")
        self.failureResultOf(service.append(make_job(1)), SpoolUnavailable)


class ControlSocketTests(ServiceCase):
    def test_it_is_open_while_the_spool_is(self) -> None:
        service = self.start()
        self.assertEqual(self.sockets.paths, self.directories())
        self.stop(service)
        self.assertEqual(self.sockets.paths, [])

    def test_there_is_none_for_a_spool_that_cannot_be_opened(self) -> None:
        self.root.write_text("in the way")
        service = self.start()
        self.assertEqual(self.sockets.paths, [])
        self.root.unlink()
        self.clock.advance(_HEAL_S)
        self.assertEqual(self.sockets.paths, self.directories())
        self.stop(service)

    def test_an_adopted_spool_has_its_own(self) -> None:
        self.sink = sink = SilentSink()
        self.start()
        own = self.directories()
        orphan = self.orphan(1)
        self.clock.advance(_ORPHANS_S)
        self.assertEqual(sorted(self.sockets.paths), sorted([*own, orphan]))
        sink.accept()
        self.assertEqual(self.sockets.paths, own)


class UpkeepTests(ServiceCase):
    def test_a_disk_that_takes_writes_again_is_noticed_without_an_event(self) -> None:
        service = self.start()
        self.disk.error_code = sqlite3.SQLITE_FULL
        self.failureResultOf(service.append(make_job(1)), SpoolUnavailable)
        self.clock.advance(_HEAL_S)
        self.assertIsNotNone(service.stats.problem)
        self.disk.error_code = None
        self.clock.advance(_HEAL_S)
        self.assertIsNone(service.stats.problem)

    def test_a_full_spool_whose_drain_failed_is_drained_again(self) -> None:
        run = Defective()
        self.sink = sink = RefusingSink()
        size_bytes = len(encode_record(make_job(1)))
        service = self.start(run=run, limits=SpoolLimits(min_free_bytes=0, max_bytes=2 * size_bytes))
        self.append(service, 1, 2)
        self.assertEqual(service.stats.problem, "full")
        run.is_defect = True
        self.now(service.drain.until_empty())
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        run.is_defect = False
        self.clock.advance(_HEAL_S)
        self.assertEqual(sink.asked, [1, 2])

    def test_the_dead_letters_expire(self) -> None:
        self.sink = PickySink({1: JobRefused("WRONGTYPE")})
        service = self.start(limits=SpoolLimits(min_free_bytes=0, dead_max_age_ms=1000))
        self.append(service, 1)
        service.drain.wake()
        self.assertEqual(service.stats.dead_records, 1)
        self.clock.advance(_EXPIRE_S)
        self.assertEqual(service.stats.dead_records, 0)

    def test_a_spool_that_another_left_is_drained_and_removed(self) -> None:
        self.sink = sink = SilentSink()
        self.start()
        own = self.directories()
        orphan = self.orphan(1, 2)
        self.clock.advance(_ORPHANS_S)
        self.assertIn(orphan, self.directories())
        self.assertEqual(sink.accept(), [1, 2])
        self.assertEqual(self.directories(), own)

    def test_the_spools_of_others_are_drained_one_at_a_time(self) -> None:
        self.sink = sink = SilentSink()
        self.start()
        for spool in [self.other_replica(1), self.other_replica(1)]:
            self.now(spool.close())
        for _ in range(2):
            self.clock.advance(_ORPHANS_S)
            self.clock.advance(_ORPHANS_S)
            self.assertEqual(sink.accept(), [1])
        self.assertEqual(len(self.directories()), 1)

    def test_a_spool_that_another_replica_uses_is_left_alone(self) -> None:
        self.sink = sink = AcceptingSink()
        self.start()
        other = self.other_replica(1)
        self.clock.advance(_ORPHANS_S)
        self.assertEqual((sink.queue, self.held(other)), ([], [1]))

    def test_live_events_do_not_wait_for_an_orphan(self) -> None:
        self.sink = SilentSink()
        service = self.start()
        self.orphan(1)
        self.clock.advance(_ORPHANS_S)
        self.assertTrue(service.is_empty)
        self.append(service, 2)

    def test_work_that_fails_is_logged_and_tried_again(self) -> None:
        self.sink = sink = AcceptingSink()
        run = Defective()
        self.start(run=run)
        self.orphan(1)
        run.is_defect = True
        self.clock.advance(_ORPHANS_S)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        run.is_defect = False
        self.clock.advance(_ORPHANS_S)
        self.assertEqual(sink.queue, [1])


class StoppingTests(ServiceCase):
    def assert_left_behind(self, *job_numbers: int) -> None:
        """Check what the next replica finds."""
        self.assertEqual(self.held(self.other_replica()), list(job_numbers))

    def assert_at_rest(self) -> None:
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.assertFalse(self.thread.runs)

    def test_an_empty_spool_leaves_nothing(self) -> None:
        service = self.start()
        self.stop(service)
        self.assertEqual(self.directories(), [])
        self.assert_at_rest()

    def test_it_is_emptied_first(self) -> None:
        self.sink = sink = SilentSink()
        service = self.start()
        self.append(service, 1, 2)
        stopped = service.stopService()
        self.assertNoResult(stopped)
        self.assertEqual(sink.accept(), [1, 2])
        self.now(stopped)
        self.assertEqual(self.directories(), [])
        self.assert_at_rest()

    def test_what_redis_does_not_answer_to_in_time_stays(self) -> None:
        self.sink = SilentSink()
        self.check_that_it_stays()

    def test_what_redis_refuses_until_the_end_stays(self) -> None:
        self.sink = RefusingSink()
        self.check_that_it_stays()

    def check_that_it_stays(self) -> None:
        service = self.start()
        self.append(service, 1, 2)
        stopped = service.stopService()
        self.clock.advance(_DRAIN_DEADLINE_S - 1)
        self.assertNoResult(stopped)
        self.clock.advance(1)
        self.now(stopped)
        self.assert_at_rest()
        self.failureResultOf(service.append(make_job(3)), SpoolUnavailable)
        self.assert_left_behind(1, 2)

    def test_an_orphan_that_redis_does_not_answer_to_is_left_to_the_next_one(self) -> None:
        self.sink = SilentSink()
        self.check_that_the_orphan_stays()

    def test_an_orphan_that_redis_refuses_is_left_to_the_next_one(self) -> None:
        self.sink = RefusingSink()
        self.check_that_the_orphan_stays()

    def check_that_the_orphan_stays(self) -> None:
        service = self.start()
        self.orphan(1)
        self.clock.advance(_ORPHANS_S)
        self.stop(service)
        self.assert_at_rest()
        self.assert_left_behind(1)

    def test_one_that_never_opened(self) -> None:
        self.root.write_text("in the way")
        service = self.start()
        self.stop(service)
        self.assert_at_rest()

    def test_one_that_is_being_opened(self) -> None:
        disk = HeldBack()
        service = self.start(run=disk)
        stopped = service.stopService()
        disk.go()
        self.clock.advance(0.1)
        disk.go()
        self.now(stopped)
        self.assertEqual(self.directories(), [])
        self.assert_at_rest()

    def test_a_disk_that_hangs_is_not_waited_for(self) -> None:
        disk = HeldBack()
        service = self.start(run=disk)
        disk.go()
        stopped = service.stopService()
        self.clock.advance(_DRAIN_DEADLINE_S)
        self.clock.advance(5)
        self.now(stopped)
        self.assertEqual(self.logged_at(LogLevel.error), 1)
        self.assertTrue(self.thread.runs)  # joining it would hang, too
        disk.go()

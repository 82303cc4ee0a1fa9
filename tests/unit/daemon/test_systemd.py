"""The notifications to systemd, beat by beat."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from webhookd.daemon.systemd import SystemdService, systemd_service

ALIVE = "READY=1\nSTATUS=ok\nWATCHDOG=1"
STOPPING = "STOPPING=1\nSTATUS=draining"


class SystemdServiceTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.sent: list[str] = []
        self.status = "ok"

    def start(self, watchdog_s: float | None) -> SystemdService:
        service = SystemdService(self.clock, self.sent.append, lambda: self.status, watchdog_s)
        service.startService()
        return service

    def test_it_is_ready_when_it_starts(self) -> None:
        self.start(None)
        self.assertEqual(self.sent, [ALIVE])

    def test_it_beats_three_times_within_the_watchdogs_patience(self) -> None:
        self.start(3.0)
        self.clock.pump([1.0] * 3)
        self.assertEqual(self.sent, [ALIVE] * 4)

    def test_the_status_is_that_of_the_moment(self) -> None:
        self.start(None)
        self.status = "degraded"
        self.clock.advance(60.0)
        self.assertEqual(self.sent[-1], "READY=1\nSTATUS=degraded\nWATCHDOG=1")

    def test_after_the_stop_it_says_nothing(self) -> None:
        service = self.start(3.0)
        service.stopService()
        self.clock.pump([1.0] * 10)
        self.assertEqual(self.sent, [ALIVE, STOPPING])
        self.assertEqual(self.clock.getDelayedCalls(), [])


class EnvironmentTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.directory = TemporaryDirectory()
        self.addCleanup(self.directory.cleanup)
        self.path = str(Path(self.directory.name, "notify"))
        self.clock = Clock()

    def listen(self, address: str) -> socket.socket:
        receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.addCleanup(receiver.close)
        receiver.bind(address)
        receiver.setblocking(False)
        return receiver

    def started(self, environ: Mapping[str, str]) -> SystemdService:
        service = systemd_service(environ, self.clock, lambda: "ok")
        assert service is not None
        service.startService()
        return service

    def beats_in_a_second(self, **environ: str) -> int:
        receiver = self.listen(self.path)
        service = self.started({"NOTIFY_SOCKET": self.path, **environ})
        self.clock.pump([0.1] * 11)
        service.stopService()
        Path(self.path).unlink()
        count = 0
        with contextlib.suppress(BlockingIOError):
            while b"STOPPING" not in receiver.recv(1000):
                count += 1
        return count

    def test_without_systemd_there_is_no_service(self) -> None:
        for environ in ({}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "vsock:2:1"}):
            self.assertIsNone(systemd_service(environ, self.clock, lambda: "ok"))

    def test_a_path_is_a_socket(self) -> None:
        receiver = self.listen(self.path)
        self.started({"NOTIFY_SOCKET": self.path})
        self.assertEqual(receiver.recv(1000).decode(), ALIVE)

    def test_an_at_sign_is_the_abstract_namespace(self) -> None:
        name = f"webhookd-test-{os.getpid()}-{id(self)}"
        receiver = self.listen(f"\0{name}")
        self.started({"NOTIFY_SOCKET": f"@{name}"})
        self.assertEqual(receiver.recv(1000).decode(), ALIVE)

    def test_a_watchdog_gets_its_beats(self) -> None:
        for usec, pid, beats in (
            ("1500000", str(os.getpid()), 3),
            ("1500000", "", 3),  # without a pid, it is ours
            ("1500000", "1", 1),  # another process's
            ("soon", "", 1),
            ("0", "", 1),
        ):
            with self.subTest(f"{usec} {pid}"):
                environ = {"WATCHDOG_USEC": usec, **({"WATCHDOG_PID": pid} if pid else {})}
                self.assertEqual(self.beats_in_a_second(**environ), beats)

    def test_a_missing_socket_is_no_reason_to_fail(self) -> None:
        service = self.started({"NOTIFY_SOCKET": self.path})
        self.clock.advance(60)
        service.stopService()

    def test_a_queue_that_is_full_is_no_reason_to_wait(self) -> None:
        self.listen(self.path)
        self.started({"NOTIFY_SOCKET": self.path, "WATCHDOG_USEC": "3000"})
        self.clock.pump([0.001] * 5000)

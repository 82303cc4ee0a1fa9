"""The command's options, and the daemon that is built from them, on a reactor in memory."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path
from typing import Any, cast

import twisted.internet
from twisted.application.service import IService
from twisted.internet.testing import MemoryReactorClock
from twisted.logger import ILogObserver, LogLevel
from twisted.trial.unittest import SynchronousTestCase

import webhookd
from tests.support.fakes import Log
from tests.support.web_client import MemoryClient
from webhookd.daemon.parts import Daemon
from webhookd.http import WebhookSite
from webhookd.samples import SAMPLES, SECRET
from webhookd.service import Options, makeService

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

    def test_the_version(self) -> None:
        stdout = StringIO()
        self.patch(sys, "stdout", stdout)

        self.assertEqual(self.assertRaises(SystemExit, self.options, "--version").code, 0)
        self.assertEqual(stdout.getvalue(), f"webhookd {webhookd.__version__}\n")

    def test_the_log_goes_to_twistds_logfile_if_there_is_one(self) -> None:
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

    def test_timers_run_on_the_monotonic_clock(self) -> None:
        self.make("--spool", "off")

        self.assertIs(self.reactor.seconds, time.monotonic)

    def test_it_listens_on_its_port(self) -> None:
        self.make(*QUIET, "--port", "80").privilegedStartService()

        self.assertEqual(
            [(port, backlog, interface) for port, _, backlog, interface in self.reactor.tcpServers],
            [(6180, 50, "127.0.0.1"), (80, 1024, "")],
        )
        self.assertIn("webhookd listening for webhooks on 0.0.0.0:80", self.log.at(LogLevel.info))

    def test_no_port_shows_a_traceback(self) -> None:
        for site in self.listen().values():
            self.assertFalse(site.displayTracebacks)

    def test_an_event_goes_all_the_way_and_is_refused_at_its_end(self) -> None:
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

    def test_health_is_on_both_ports_and_webhooks_on_one(self) -> None:
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

"""Checks of the doctor whose conditions no test can create: from facts to a finding."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import TestCase
from unittest.mock import patch

from attrs import evolve

import webhookd
from webhookd.cli.doctor import machine, redis
from webhookd.cli.doctor.findings import Finding, Level, Result, run_checks
from webhookd.config import resolve
from webhookd.redis.watch import ServerFacts

_SETTINGS = resolve({"secret": ["one", "two"], "token": ["three"]}, {})
_SERVER = redis.RedisFacts(
    url=_SETTINGS.redis,
    settings=_SETTINGS,
    round_trip_s=0.001,
    info={"used_memory": "500", "maxmemory": "1000"},
    server=ServerFacts(version="9.1.2", has_aof=True, appendfsync="everysec", maxmemory_policy="noeviction"),
    has_snapshots=None,
    ahead_s=0.0,
    queues=(),
)
_SPOOL = machine.SpoolFacts(
    path=Path("/var/spool/webhookd"),
    max_bytes=1 << 30,
    place=Path("/var/spool/webhookd"),
    owner="webhookd",
    user="webhookd",
    mode=0o700,
    free_bytes=1 << 40,
    problem=None,
    fsync_s=0.001,
    directories={},
)
_REPORT: Mapping[str, Any] = {
    "status": "ok",
    "version": webhookd.__version__,
    "uptimeSeconds": 1,
    "spool": {"records": 0},
}
_RUNNING = machine.PortFacts(
    "port 3001",
    is_needed=True,
    is_tcp=True,
    report=_REPORT,
)


class TestJudgement(TestCase):
    def judge(self, check: Callable[[Any], Finding], facts: Any, level: Level, words: str) -> None:
        finding = check(facts)
        self.assertIs(finding.level, level)
        self.assertIn(words, finding.detail)

    def test_all_is_well(self) -> None:
        results = [
            *run_checks("Redis", redis.SERVER, _SERVER),
            *run_checks("Spool", machine.SPOOL, _SPOOL),
            Result("Ports", "webhooks", machine.port(_RUNNING)),
        ]
        self.assertEqual([result for result in results if result.finding.level is not Level.OK], [])

    def test_credentials_are_counted_and_not_shown(self) -> None:
        finding = machine.secrets(_SETTINGS)
        self.assertEqual(finding, Finding(Level.OK, "chatwoot: 2 signing secrets and 1 tokens"))

    def test_memory_that_is_nearly_full(self) -> None:
        facts = evolve(_SERVER, info={"used_memory": "900", "maxmemory": "1000"})
        self.judge(redis.memory, facts, Level.WARN, "of")

    def test_a_disk_of_redis_that_failed(self) -> None:
        facts = evolve(_SERVER, info={"aof_last_write_status": "err"})
        self.judge(redis.persistence, facts, Level.FAIL, "the append-only file failed")

    def test_a_redis_that_does_not_tell_its_time(self) -> None:
        self.judge(redis.clock, evolve(_SERVER, ahead_s=None), Level.WARN, "unknown")

    def test_a_network_file_system(self) -> None:
        facts = evolve(_SPOOL, problem="the spool is on a network file system, nfs4: use a local disk")
        self.judge(machine.directory, facts, Level.FAIL, "nfs4")

    def test_a_daemon_with_dead_letters(self) -> None:
        facts = evolve(_RUNNING, report={**_REPORT, "spool": {"deadRecords": 2, "corruptRecords": None}})
        self.judge(machine.port, facts, Level.WARN, "2 dead and 0 corrupt")

    def test_a_daemon_whose_spool_is_on_its_way(self) -> None:
        facts = evolve(_RUNNING, report={**_REPORT, "spool": {"records": 3}})
        self.judge(machine.port, facts, Level.OK, "3 events wait")

    def test_a_daemon_of_another_version(self) -> None:
        facts = evolve(_RUNNING, report={**_REPORT, "version": "0.0.0"})
        self.judge(machine.port, facts, Level.WARN, f"this is {webhookd.__version__}")

    def test_a_health_report_that_would_control_the_terminal(self) -> None:
        facts = evolve(_RUNNING, report={**_REPORT, "version": "1\x1b[2J"})
        self.judge(machine.port, facts, Level.WARN, "webhookd 1\\x1b[2J")

    def test_a_port_that_cannot_exist(self) -> None:
        facts = machine.look_at_port("tcp:65536", is_needed=True)
        self.judge(machine.port, facts, Level.FAIL, "the highest port is 65535")

    def test_a_health_report_that_is_not_of_webhookd(self) -> None:
        for spool in (None, "x", 1):
            answer = (200, {"status": "ok", "version": "1", "uptimeSeconds": 1, "spool": spool})
            with (
                patch.object(machine, "ask_health", return_value=answer),
                socket.create_server(("127.0.0.1", 0)) as server,
            ):
                endpoint = f"tcp:{server.getsockname()[1]}:interface=127.0.0.1"
                facts = machine.look_at_port(endpoint, is_needed=True)
            self.judge(machine.port, facts, Level.FAIL, "another program")

    def test_a_kernel_that_does_not_tell_its_backlog(self) -> None:
        self.judge(machine.backlog, machine.LimitFacts(20_000, None), Level.OK, "unknown on this system")

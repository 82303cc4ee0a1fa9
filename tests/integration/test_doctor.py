"""``webhookd doctor``: each check, in a situation that it looks for."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
import pytest_twisted
from attrs import frozen

from tests.faults.disks import mounted_tmpfs
from tests.faults.preloads import FaultyClock, FaultySync
from tests.support.command import start_command
from tests.support.process import ReservedPort
from tests.support.proxy import Proxy
from tests.support.servers import FLAVOURS, ClusterNode, RedisServer, server_binary
from tests.support.webhooks import connected
from webhookd.cli.doctor import check_ports, check_redis, check_spool
from webhookd.cli.doctor.findings import Finding, Level, Result
from webhookd.config import Config, resolve
from webhookd.reactor import the_reactor
from webhookd.spool.directory import SpoolRoot

from .conftest import StartDaemon

OK, WARN, FAIL = Level.OK, Level.WARN, Level.FAIL
ACL_FILE = Path(__file__).parents[2] / "conf" / "redis-acl.conf"
SAFE = ("appendonly yes", "appendfsync always")
QUEUE = ("rights", "script", "keys", "cluster", "paused", "BullMQ")
SERVER = ("version", "persistence", "eviction", "memory", "replication", "clock")


@pytest.fixture
def port() -> Iterator[int]:
    reserved = ReservedPort()
    yield reserved.number
    reserved.close()


def configured(**options: str) -> Config:
    return resolve(options, {})


def by_check(results: Sequence[Result]) -> dict[str, Finding]:
    return {result.check: result.finding for result in results}


async def examine(server: RedisServer, **options: str) -> Mapping[str, Finding]:
    """Return what the doctor finds about a Redis and its queue."""
    return by_check(await check_redis(the_reactor(), configured(**{"redis": server.url, **options})))


def examine_ports(**options: str) -> Mapping[str, Finding]:
    return by_check(check_ports(configured(**options)))


def assert_found(findings: Mapping[str, Finding], check: str, level: Level, words: str) -> None:
    """Assert that the check found it, with advice."""
    finding = findings[check]
    assert (finding.level, words in finding.detail) == (level, True), finding
    assert bool(finding.advice) == (level in (WARN, FAIL))


# -- Redis --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest_twisted.ensureDeferred
async def test_all_is_well_under_the_daemons_own_user_and_stays_as_it_was(flavour: str) -> None:
    config = [*SAFE, f"include {ACL_FILE}"]
    with RedisServer(flavour, config) as server, server.client() as admin:
        admin.lpush("bull:chatwoot:wait", "a.job")
        before = {key: admin.dump(key) for key in admin.keys("*")}

        url = f"redis://webhookd:change-me@127.0.0.1:{server.port}/0"
        findings = await examine(server, redis=url, redis_deadline="1.5")  # a busy machine is slow

        assert {name: one.level for name, one in findings.items()} == dict.fromkeys(findings, OK)
        assert set(findings) == {"connection", *SERVER, *QUEUE}
        assert {key: admin.dump(key) for key in admin.keys("*")} == before


@frozen
class Fault:
    """The expected level and words of each check, and the situation that leads to them."""

    found: Mapping[str, tuple[Level, str]]
    config: Sequence[str] = SAFE
    commands: Sequence[str] = ()
    options: Mapping[str, str] = {}
    url: str = "redis://127.0.0.1:{port}/0"

    def __str__(self) -> str:
        return ", ".join(words for _, words in self.found.values()).replace(" ", "-")


def limited(found: Mapping[str, tuple[Level, str]], rights: str, keys: str = "~*") -> Fault:
    """Return a fault: a user who lacks some rights."""
    config = (*SAFE, f"user hook on >secret {keys} resetchannels +@all {rights}")
    return Fault(found, config, url="redis://hook:secret@127.0.0.1:{port}/0")


FAULTS = (
    Fault({"connection": (FAIL, "WRONGPASS")}, ["requirepass right"], url="redis://:wrong@127.0.0.1:{port}"),
    Fault({"connection": (FAIL, "NOAUTH")}, ["requirepass right"]),
    Fault({"connection": (FAIL, "out of range")}, ["databases 2"], url="redis://127.0.0.1:{port}/7"),
    Fault({"persistence": (FAIL, "a restart loses jobs")}, []),
    Fault({"persistence": (FAIL, "except those of the last snapshot")}, ["save 60 1"]),
    Fault({"persistence": (FAIL, "a crash loses jobs")}, ["appendonly yes", "appendfsync no"]),
    Fault({"eviction": (FAIL, "allkeys-lru evicts")}, [*SAFE, "maxmemory-policy allkeys-lru"]),
    Fault({"memory": (FAIL, "of 1 MiB used"), "script": (FAIL, "OOM")}, [*SAFE, "maxmemory 900kb"]),
    Fault(
        {"replication": (FAIL, "is a replica"), "script": (FAIL, "READONLY")},
        [*SAFE, "replicaof 127.0.0.1 1"],
    ),
    Fault(
        {"replication": (FAIL, "0 replicas"), "script": (FAIL, "only 0 replicas have")},
        options={"ack": "replicas:1"},
    ),
    Fault({"script": (FAIL, "NOREPLICAS")}, [*SAFE, "min-replicas-to-write 1"]),
    limited({"rights": (FAIL, "EVAL, EVALSHA"), "script": (FAIL, "NOPERM")}, "-eval -evalsha"),
    limited({"rights": (FAIL, "LREM, ZREM"), "script": (OK, "adds")}, "-lrem -zrem"),
    limited({"rights": (FAIL, "DEL"), "script": (Level.SKIPPED, "needs rights")}, "-del"),
    limited({"rights": (FAIL, "DEL")}, "", "~other:*"),
    limited({"rights": (WARN, "INFO, CONFIG GET"), "version": (WARN, "may not ask")}, "-info -config"),
    limited({"persistence": (WARN, "unknown"), "eviction": (OK, "noeviction")}, "-config"),
    Fault(
        {"paused": (WARN, "jobs waiting: 1")},
        commands=["HSET bull:chatwoot:meta paused 1", "LPUSH bull:chatwoot:paused one"],
    ),
    Fault(
        {"paused": (FAIL, "two lists")},
        commands=["LPUSH bull:chatwoot:wait one", "LPUSH bull:chatwoot:paused two"],
    ),
    Fault({"keys": (FAIL, "bull:chatwoot:wait is a string")}, commands=["SET bull:chatwoot:wait x"]),
    Fault({"BullMQ": (WARN, "bullmq:4.1")}, commands=["HSET bull:chatwoot:meta version bullmq:4.1.0"]),
    Fault(
        {"BullMQ": (WARN, "--wire is 5")},
        commands=["HSET bull:chatwoot:meta version bullmq:6.7.0"],
        options={"wire": "5"},
    ),
)


@pytest.mark.parametrize("fault", FAULTS, ids=str)
@pytest_twisted.ensureDeferred
async def test_a_redis_with_a_fault(fault: Fault) -> None:
    with RedisServer(config=fault.config) as server:
        if fault.commands:
            with server.client() as client:
                for line in fault.commands:
                    client.execute_command(*line.split())

        findings = await examine(server, redis=fault.url.format(port=server.port), **fault.options)

    for check, (level, words) in fault.found.items():
        assert_found(findings, check, level, words)
    if "connection" in fault.found:  # and no cascade of errors follows
        rest = {findings[check] for check in (*SERVER, *QUEUE)}
        assert rest == {Finding(Level.SKIPPED, "needs Redis")}


@pytest_twisted.ensureDeferred
async def test_a_redis_that_is_not_there(port: int) -> None:
    findings = by_check(await check_redis(the_reactor(), configured(redis=f"redis://127.0.0.1:{port}")))

    assert_found(findings, "connection", FAIL, "refused")


@pytest.mark.parametrize(("latency_s", "level"), [(0.007, WARN), (0.015, FAIL)])
@pytest_twisted.ensureDeferred
async def test_a_slow_way_to_redis(redis: RedisServer, latency_s: float, level: Level) -> None:
    with Proxy(redis.port) as proxy, proxy.faulty(reply_latency_s=latency_s):
        url = f"redis://127.0.0.1:{proxy.port}"
        findings = await examine(redis, redis=url, redis_deadline="0.013")

    assert findings["connection"].level in (level, FAIL)  # a busy machine adds latency
    assert_found(findings, "script", WARN, "of --redis-deadline")


@pytest_twisted.ensureDeferred
async def test_a_redis_that_hangs(redis: RedisServer) -> None:
    redis.suspend()
    findings = await examine(redis)

    assert_found(findings, "connection", FAIL, "did not answer in time")


class OldRedis(RedisServer):
    """Our oldest Redis, which reports an even older version."""

    def argv(self) -> Sequence[str]:
        _, *rest = super().argv()
        program = self.directory / "redis-server"
        program.write_bytes(Path(server_binary("redis-6.2")).read_bytes().replace(b"6.2.5\0", b"5.0.5\0"))
        program.chmod(0o700)
        return [str(program), *rest]


@pytest_twisted.ensureDeferred
async def test_a_redis_that_is_too_old() -> None:
    with OldRedis("redis-6.2") as server:
        findings = await examine(server)

    assert_found(findings, "version", FAIL, "Redis 5.0.5 is too old")


class SkewedRedis(RedisServer):
    """A Redis on a machine whose clock is wrong."""

    def __init__(self, ahead_s: int) -> None:
        super().__init__(config=SAFE)
        clock = FaultyClock(self)
        clock.set(ahead_s)
        self._environ = clock.environ

    def environ(self) -> Mapping[str, str]:
        return {**super().environ(), **self._environ}


@pytest.mark.parametrize(
    ("ahead_s", "level", "words"),
    [(60, WARN, "60 s ahead"), (-400, FAIL, "400 s behind ours: more than --tolerance")],
)
@pytest_twisted.ensureDeferred
async def test_a_clock_that_is_wrong(ahead_s: int, level: Level, words: str) -> None:
    with SkewedRedis(ahead_s) as server:
        findings = await examine(server)

    assert_found(findings, "clock", level, words)


@pytest_twisted.ensureDeferred
async def test_a_cluster() -> None:
    with ClusterNode(config=SAFE) as cluster:
        untagged, tagged = await examine(cluster), await examine(cluster, prefix="{bull}")

    assert_found(untagged, "cluster", FAIL, "share a slot")
    assert_found(untagged, "script", FAIL, "CROSSSLOT")
    assert tagged["cluster"].level is tagged["script"].level is OK


# -- the spool ----------------------------------------------------------------------------------------------


def examine_spool(directory: Path, **options: str) -> dict[str, Finding]:
    return by_check(check_spool(configured(spool=str(directory), **options)))


def test_a_spool_that_is_well_and_left_as_it_was(tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    new = examine_spool(spool)
    assert not spool.exists()
    spool.mkdir(mode=0o700)
    made = examine_spool(spool)

    for found in (new, made):
        assert found["fsync"].level in (OK, WARN)  # depends on the load of the disk
        assert {one.level for name, one in found.items() if name != "fsync"} == {OK}
    assert list(spool.iterdir()) == []


def test_no_spool() -> None:
    assert_found(by_check(check_spool(configured(spool="off"))), "directory", WARN, "off")


def test_a_spool_that_cannot_be_written_to(tmp_path: Path) -> None:
    with mounted_tmpfs(tmp_path, "ro"):
        findings = examine_spool(tmp_path / "spool")

    assert_found(findings, "directory", FAIL, "Read-only file system")
    assert_found(findings, "fsync", Level.SKIPPED, "needs a disk")


def test_a_spool_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "spool").touch()

    assert_found(examine_spool(tmp_path / "spool"), "directory", FAIL, "Not a directory")


def test_a_spool_on_a_disk_that_is_too_small(tmp_path: Path) -> None:
    with mounted_tmpfs(tmp_path, "size=100m"):
        assert_found(examine_spool(tmp_path), "space", WARN, "100 MiB free")
    with mounted_tmpfs(tmp_path, "size=1m"):
        assert_found(examine_spool(tmp_path), "space", FAIL, "takes no events")


def test_a_spool_that_is_not_the_daemons_alone(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    assert_found(examine_spool(tmp_path), "privacy", WARN, "its mode is 755")
    tmp_path.chmod(stat.S_IRWXU)
    os.chown(tmp_path, 12345, -1)
    assert_found(examine_spool(tmp_path), "privacy", WARN, "belongs to 12345")


def test_a_spool_that_others_left(tmp_path: Path) -> None:
    settings = configured(spool=str(tmp_path))
    SpoolRoot(tmp_path, settings.destination).take().release()
    assert_found(examine_spool(tmp_path), "contents", WARN, "1 of stopped replicas")

    SpoolRoot(tmp_path, "another Redis").take().release()
    assert_found(examine_spool(tmp_path), "contents", WARN, "1 for another Redis")


# -- the ports ----------------------------------------------------------------------------------------------


def test_a_port_that_is_free(port: int) -> None:
    findings = examine_ports(endpoint=f"tcp:{port}", ops_endpoint="unix:/run/ops")

    assert findings["webhooks"] == Finding(OK, f"port {port} is free: webhookd is not running")
    assert findings["ops"].level is OK


def test_a_port_that_another_program_has(redis: RedisServer) -> None:
    taken = f"tcp:{redis.port}:interface=127.0.0.1"
    findings = examine_ports(endpoint=taken, ops_endpoint=taken)

    assert_found(findings, "webhooks", FAIL, "another program")
    assert_found(findings, "ops", WARN, "another program")


def test_a_port_of_another_machine() -> None:
    findings = examine_ports(endpoint="tcp:3001:interface=192.0.2.1", ops_endpoint="off")

    assert_found(findings, "webhooks", FAIL, "Cannot assign requested address")


def test_a_daemon_that_is_well(redis: RedisServer, start_daemon: StartDaemon) -> None:
    daemon = connected(start_daemon("--redis", redis.url))
    findings = examine_ports(port=str(daemon.port), interface="127.0.0.1", ops_endpoint="off")

    assert findings["webhooks"].level is OK
    assert findings["webhooks"].detail.endswith(": ok")


@pytest.mark.parametrize(
    ("spool", "level", "words"),
    [("spool", WARN, ": degraded"), ("off", FAIL, ": unavailable")],
)
def test_a_daemon_that_is_not_well(
    port: int, start_daemon: StartDaemon, spool: str, level: Level, words: str
) -> None:
    daemon = start_daemon("--redis", f"redis://127.0.0.1:{port}", "--spool", spool)
    findings = examine_ports(port=str(daemon.port), interface="127.0.0.1", ops_endpoint="off")

    assert_found(findings, "webhooks", level, words)


# -- the command --------------------------------------------------------------------------------------------


def test_a_machine_with_every_fault_of_its_own(tmp_path: Path) -> None:
    """Low limits, a slow disk and a doubtful configuration, in a separate network namespace."""
    with RedisServer(config=SAFE, unix_socket=True) as server, FaultySync(server).faulty("SLOW"):
        environ = {**FaultySync(server).environ, "WEBHOOK_PROT": "1"}
        limits = 'echo 16 >/proc/sys/net/core/somaxconn; ulimit -n 256; exec "$0" "$@"'
        ended = start_command(
            *("doctor", "--json", "--redis", server.unix_url),
            within=("unshare", "--net", "sh", "-c", limits),
            environ=environ,
            cwd=tmp_path,
        ).end()

    levels = {one["check"]: one["level"] for one in json.loads(ended.stdout)["checks"]}
    bad = {name for name, level in levels.items() if level != "ok"}
    assert bad == {"options", "secrets", "fsync", "open files", "backlog"}, ended
    assert json.loads(ended.stdout)["levels"]["fail"] == 0
    assert ended.returncode == 0


def test_exit_codes_and_words(tmp_path: Path, redis: RedisServer, port: int) -> None:
    dead = f"redis://127.0.0.1:{port}"
    with RedisServer(config=SAFE) as safe, ExitStack() as stack:
        free = ReservedPort()
        stack.callback(free.close)
        common = ("--port", str(free.number), "--ops-endpoint", "off")
        commands = {
            "warnings alone": start_command("doctor", *common, "--redis", safe.url, cwd=tmp_path),
            "strict": start_command("doctor", *common, "--strict", "--redis", safe.url, cwd=tmp_path),
            "a failure": start_command("doctor", *common, "--redis", dead, cwd=tmp_path),
            "no configuration": start_command("doctor", *common, "--redis", "http://x", cwd=tmp_path),
            "nowhere": start_command("doctor", *common, "--redis", "embedded:", cwd=tmp_path),
        }
        ended = {name: one.end() for name, one in commands.items()}

    codes = {name: one.returncode for name, one in ended.items()}
    assert codes == {"warnings alone": 0, "strict": 1, "a failure": 1, "no configuration": 2, "nowhere": 0}
    assert "skipped needs Redis   version, persistence" in ended["a failure"].stdout
    assert "1 fail, 12 skipped" in ended["a failure"].stdout
    assert "no embedded Redis runs" in ended["nowhere"].stdout
    assert len(ended["no configuration"].stderr.splitlines()) == 1
    for one in ended.values():
        assert "Traceback" not in one.stdout + one.stderr
        assert all(
            len(line) <= 80 or "/" in line for line in one.stdout.splitlines()
        )  # paths are not wrapped
    assert not (tmp_path / "var").exists()


def test_an_embedded_redis_is_found_while_the_daemon_runs(start_daemon: StartDaemon) -> None:
    daemon = connected(start_daemon("--redis", "embedded:"))
    options = ("--port", str(daemon.port), "--interface", "127.0.0.1", "--ops-endpoint", "off")
    ended = start_command("doctor", "--json", "--redis", "embedded:", *options, cwd=daemon.directory).end()

    levels = {one["check"]: one["level"] for one in json.loads(ended.stdout)["checks"]}
    assert {name for name, level in levels.items() if level != "ok"} - {"fsync"} == {"secrets"}, ended
    assert ended.returncode == 0

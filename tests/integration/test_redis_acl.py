"""The user of conf/redis-acl.conf: the daemon works under it, and it can do nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import redis as client_library
from redis.exceptions import ResponseError

from tests.support.daemon import Daemon
from tests.support.process import wait_until
from tests.support.servers import FLAVOURS, RedisServer
from tests.support.webhooks import connected, outcome, post, webhook

from .conftest import StartDaemon

ACL_FILE = Path(__file__).parents[2] / "conf" / "redis-acl.conf"
USER, PASSWORD = "webhookd", "change-me"

#: Each kind of job takes another way through the script.
JOB_OPTIONS = ("{}", '{"delay":60000}', '{"priority":5}', '{"lifo":true}')

Client = client_library.Redis


@pytest.fixture(params=FLAVOURS)
def guarded(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    """A Redis that has the user."""
    with RedisServer(request.param, config=[f"include {ACL_FILE}", "appendonly yes"]) as server:
        yield server


@pytest.fixture
def user(guarded: RedisServer) -> Iterator[Client]:
    """A client that has logged in as the daemon does."""
    with guarded.client(username=USER, password=PASSWORD) as client:
        yield client


def url(server: RedisServer) -> str:
    return f"redis://{USER}:{PASSWORD}@{server.host}:{server.port}/0"


def counts(daemon: Daemon) -> Mapping[str, int]:
    """The queue's jobs by state, as the health report has them."""
    queues: Mapping[str, Mapping[str, int] | None] = json.loads(daemon.get("/health").body)["queues"]
    return queues["chatwoot"] or {}


@pytest.mark.parametrize("job_options", JOB_OPTIONS)
def test_the_daemon_works_under_it(guarded: RedisServer, start_daemon: StartDaemon, job_options: str) -> None:
    daemon = start_daemon("--redis", url(guarded), "--job-options", job_options, "--spool", "off")
    connected(daemon)

    assert [outcome(post(daemon.port, webhook(1))) for _ in range(2)] == [
        (202, "queued"),
        (200, "already_queued"),
    ]
    health = json.loads(daemon.get("/health").body)
    assert health["redis"]["safety"] != "unknown"
    wait_until(lambda: 1 in counts(daemon).values(), "a look at the queue after the job was added")
    assert "NOPERM" not in daemon.log


def test_the_daemon_works_under_it_on_a_paused_queue(guarded: RedisServer, start_daemon: StartDaemon) -> None:
    with guarded.client() as client:
        client.hset("bull:chatwoot:meta", "paused", 1)
    daemon = start_daemon("--redis", url(guarded), "--spool", "off")

    assert outcome(post(connected(daemon).port, webhook(1))) == (202, "queued")


def test_the_daemon_works_under_it_with_replicas(guarded: RedisServer, user: Client) -> None:
    assert user.execute_command("WAIT", 0, 100) == 0
    assert user.execute_command("ROLE")[0] in (b"master", "master")


#: Commands that the daemon's user must not run.
FORBIDDEN: tuple[tuple[str | int, ...], ...] = (
    ("FLUSHALL",),
    ("FLUSHDB",),
    ("KEYS", "*"),
    ("SCAN", 0),
    ("RANDOMKEY",),
    ("DBSIZE",),
    ("GET", "bull:chatwoot:id"),
    ("GET", "other"),
    ("SET", "other", "x"),
    ("DEL", "other"),
    ("HMGET", "other", "data"),
    ("LLEN", "bullet"),
    ("HGETALL", "bull:chatwoot:1"),
    ("LRANGE", "bull:chatwoot:wait", 0, -1),
    ("XRANGE", "bull:chatwoot:events", "-", "+"),
    ("LPOP", "bull:chatwoot:wait"),
    ("RPOPLPUSH", "bull:chatwoot:wait", "bull:other:wait"),
    ("EXPIRE", "bull:chatwoot:wait", 1),
    ("RENAME", "bull:chatwoot:wait", "bull:chatwoot:gone"),
    ("DUMP", "bull:chatwoot:id"),
    ("SORT", "bull:chatwoot:wait"),
    ("CONFIG", "SET", "appendonly", "no"),
    ("CONFIG", "REWRITE"),
    ("CONFIG", "RESETSTAT"),
    ("SCRIPT", "FLUSH"),
    ("SCRIPT", "LOAD", "return 1"),
    ("ACL", "LIST"),
    ("ACL", "SETUSER", USER, "+@all"),
    ("ACL", "WHOAMI"),
    ("CLIENT", "LIST"),
    ("CLIENT", "KILL", "TYPE", "normal"),
    ("MONITOR",),
    ("SUBSCRIBE", "x"),
    ("PUBLISH", "x", "y"),
    ("SHUTDOWN", "NOSAVE"),
    ("SAVE",),
    ("BGREWRITEAOF",),
    ("REPLICAOF", "127.0.0.1", "1"),
    ("MODULE", "LIST"),
    ("SLOWLOG", "GET"),
    ("LATENCY", "LATEST"),
    ("MEMORY", "DOCTOR"),
    ("CLUSTER", "INFO"),
    ("MULTI",),
    ("SWAPDB", "0", "1"),
    ("EVAL", "return redis.call('GET', KEYS[1])", 1, "bull:chatwoot:id"),
    ("EVAL", "return redis.call('FLUSHALL')", 0),
    ("EVAL", "return redis.call('SET', 'other', 'x')", 0),
    ("EVAL", "return redis.call('SET', KEYS[1], 'x')", 1, "other"),
    ("EVAL", "return redis.call('EXPIRE', KEYS[1], 1)", 1, "bull:chatwoot:id"),
)


def test_it_can_do_nothing_else(guarded: RedisServer, user: Client) -> None:
    with guarded.client() as admin:
        admin.set("other", "kept")
        admin.set("bull:chatwoot:id", "7")
        before = keys_and_settings(admin)

        allowed = [command for command in FORBIDDEN if not is_denied(user, command)]

        assert allowed == []
        assert keys_and_settings(admin) == before


def keys_and_settings(admin: Client) -> tuple[object, ...]:
    return admin.get("other"), admin.get("bull:chatwoot:id"), admin.dbsize(), admin.config_get("appendonly")


def is_denied(user: Client, command: tuple[str | int, ...]) -> bool:
    run: Callable[..., object] = user.execute_command
    try:
        run(*command)
    except ResponseError as error:
        return any(
            sign in str(error)
            for sign in ("permission", "NOPERM", "ACL failure", "user executing the script")
        )
    return False

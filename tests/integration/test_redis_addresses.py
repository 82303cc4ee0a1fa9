"""Each form of a Redis URL, with a server that needs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from itertools import count
from typing import Any
from urllib.parse import quote

import pytest

from tests.integration.conftest import StartDaemon
from tests.support.daemon import Daemon
from tests.support.process import wait_until
from tests.support.servers import RedisServer, Sentinels, TlsRedis
from tests.support.webhooks import DIRECT, Webhook, connected, outcome, post, webhook
from webhookd.bullmq.keys import QueueKeys

KEYS = QueueKeys("bull", "chatwoot")
EVENT = webhook()

USER, PASSWORD = "hook:s", "p@ss/w:rd%"
ACL = (
    "user default off",
    f"user {USER} on >{PASSWORD} ~bull:chatwoot:* +@all",
    "user admin on >admin ~* &* +@all",
)


def credentials(username: str = USER, password: str = PASSWORD) -> str:
    return f"{quote(username, safe='')}:{quote(password, safe='')}"


def has_job(client: Any, event: Webhook = EVENT) -> bool:
    with client:
        return bool(client.hget(KEYS.job(event.job_id), "data") == event.body)


def assert_refused(start_daemon: StartDaemon, url: str, kind: str) -> None:
    """Check that a daemon with this URL starts, logs what is wrong, and refuses events."""
    daemon = start_daemon("--redis", url, *DIRECT)
    wait_until(lambda: f"cannot be used: {kind}" in daemon.log, "the log says what is wrong")
    assert outcome(post(daemon.port, EVENT)) == (500, "unavailable")
    assert "Traceback" not in daemon.log


@pytest.fixture
def guarded() -> Iterator[RedisServer]:
    """A server that requires a user and a password."""
    with RedisServer(config=ACL, unix_socket=True) as server:
        yield server


def admin(server: RedisServer, **options: Any) -> Any:
    return server.client(username="admin", password="admin", **options)


# -- redis:// -----------------------------------------------------------------------------------------------


def test_user_password_and_database(guarded: RedisServer, start_daemon: StartDaemon) -> None:
    url = f"redis://{credentials()}@127.0.0.1:{guarded.port}/5"
    daemon = connected(start_daemon(*DIRECT, environ={"REDIS_URL": url}))

    assert outcome(post(daemon.port, EVENT)) == (202, "queued")

    assert has_job(admin(guarded, db=5))
    assert not has_job(admin(guarded, db=0))
    assert quote(PASSWORD, safe="") not in daemon.log
    assert PASSWORD not in daemon.log


def test_a_password_alone_is_the_default_users(start_daemon: StartDaemon) -> None:
    with RedisServer(config=["requirepass sesame"]) as server:
        daemon = connected(start_daemon("--redis", f"redis://:sesame@127.0.0.1:{server.port}", *DIRECT))

        assert outcome(post(daemon.port, EVENT)) == (202, "queued")

        assert has_job(server.client(password="sesame"))


@pytest.mark.parametrize("user_info", ["", f"{credentials(password='wrong')}@"], ids=["none", "wrong"])
def test_without_the_right_password_events_are_refused(
    guarded: RedisServer, start_daemon: StartDaemon, user_info: str
) -> None:
    assert_refused(start_daemon, f"redis://{user_info}127.0.0.1:{guarded.port}/0", "noauth")


# -- unix:// ------------------------------------------------------------------------------------------------


@pytest.fixture
def redis_at_socket() -> Iterator[RedisServer]:
    with RedisServer(unix_socket=True) as server:
        yield server


def test_a_unix_socket_with_user_password_and_database(
    guarded: RedisServer, start_daemon: StartDaemon
) -> None:
    url = f"unix://{credentials()}@{guarded.socket_path}?db=5"
    daemon = connected(start_daemon("--redis", url, *DIRECT))

    assert outcome(post(daemon.port, EVENT)) == (202, "queued")

    assert has_job(admin(guarded, db=5))


def test_a_unix_socket_that_comes_back_is_found_again(
    redis_at_socket: RedisServer, start_daemon: StartDaemon
) -> None:
    daemon = connected(start_daemon("--redis", redis_at_socket.unix_url, *DIRECT))
    redis_at_socket.stop()
    wait_until(lambda: outcome(post(daemon.port, EVENT))[0] == 500, "the daemon misses Redis")

    redis_at_socket.start()

    assert outcome(post(connected(daemon).port, EVENT)) == (202, "queued")


# -- rediss:// ----------------------------------------------------------------------------------------------


@pytest.fixture
def tls_redis() -> Iterator[TlsRedis]:
    with TlsRedis(config=["requirepass sesame"]) as server:
        yield server


def test_tls_with_a_private_authority(tls_redis: TlsRedis, start_daemon: StartDaemon) -> None:
    for number, host in enumerate(("localhost", "127.0.0.1")):
        url = f"rediss://:sesame@{host}:{tls_redis.port}/5?ca_file={tls_redis.ca_file}"
        daemon = connected(start_daemon("--redis", url, *DIRECT))

        assert outcome(post(daemon.port, webhook(number + 1))) == (202, "queued")

        assert has_job(tls_redis.client(password="sesame", db=5), webhook(number + 1))


def test_a_certificate_that_proves_nothing_is_not_trusted(start_daemon: StartDaemon) -> None:
    """That of an unknown authority, of another one, and for another name."""
    with TlsRedis(config=["bind 127.0.0.1 127.0.0.2"]) as server, closing(TlsRedis()) as other:
        for place in (
            f"localhost:{server.port}/0",
            f"localhost:{server.port}/0?ca_file={other.ca_file}",
            f"127.0.0.2:{server.port}/0?ca_file={server.ca_file}",
        ):
            assert_refused(start_daemon, f"rediss://{place}", "disconnected")


def test_tls_to_a_server_that_does_not_speak_it(redis: RedisServer, start_daemon: StartDaemon) -> None:
    """The server takes the greeting for the beginning of a command, and waits for the rest."""
    assert_refused(start_daemon, f"rediss://localhost:{redis.port}/0", "timeout")


# -- redis+sentinel:// --------------------------------------------------------------------------------------


@pytest.fixture
def sentinels() -> Iterator[Sentinels]:
    with Sentinels() as group:
        yield group


def queue_somehow(daemon: Daemon) -> Webhook:
    """Send events until one is queued, and return that one."""
    for number in count(100):
        event = webhook(number)
        if outcome(post(daemon.port, event)) == (202, "queued"):
            return event
        connected(daemon)
    raise AssertionError("not reached")


def test_sentinel_names_the_primary_and_after_its_death_the_next(
    sentinels: Sentinels, start_daemon: StartDaemon
) -> None:
    daemon = connected(start_daemon("--redis", sentinels.url, *DIRECT))
    first, second = sentinels.primary, sentinels.replica
    assert outcome(post(daemon.port, EVENT)) == (202, "queued")
    assert has_job(first.client())

    sentinels.kill_primary()
    sentinels.wait_for_primary(second)

    assert has_job(second.client(), queue_somehow(daemon))


@pytest.mark.slow
def test_a_primary_that_became_a_replica_is_left(sentinels: Sentinels, start_daemon: StartDaemon) -> None:
    daemon = connected(start_daemon("--redis", sentinels.url, *DIRECT))
    assert outcome(post(daemon.port, EVENT)) == (202, "queued")

    promoted = sentinels.failover()
    # The old primary may still accept this one, until Sentinel makes it a replica.
    event = queue_somehow(daemon)

    wait_until(lambda: has_job(promoted.client(), event), "the new primary has the event")


@pytest.mark.slow
def test_a_sentinel_that_does_not_answer_is_skipped_and_an_unknown_name_refused(
    sentinels: Sentinels, start_daemon: StartDaemon
) -> None:
    sentinels.sentinels[0].kill()
    sentinels.sentinels[1].suspend()

    daemon = connected(start_daemon("--redis", sentinels.url, *DIRECT))

    assert outcome(post(daemon.port, EVENT)) == (202, "queued")
    assert_refused(start_daemon, sentinels.url.replace("mymaster", "unknown"), "disconnected")

"""The traps of txredisapi, Klein and networks, each with a Redis that triggers it."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

import pytest

from tests.integration.conftest import StartDaemon
from tests.support.bullmq import Queue
from tests.support.daemon import Daemon
from tests.support.http import Response, connect
from tests.support.process import wait_until
from tests.support.proxy import Proxy
from tests.support.servers import RedisServer
from tests.support.webhooks import DIRECT, Webhook, connected, outcome, post, post_at_once, webhook, webhooks
from webhookd.bullmq.keys import QueueKeys

KEYS = QueueKeys("bull", "chatwoot")
EVENT = webhook()
QUEUED, ALREADY_QUEUED, UNAVAILABLE = (202, "queued"), (200, "already_queued"), (500, "unavailable")
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


def chatwoot_queue(redis: RedisServer) -> Queue:
    return Queue(redis.client(), KEYS)


def is_refused(response: Response) -> bool:
    """Return true if this is the answer of a daemon without Redis."""
    return outcome(response) == UNAVAILABLE and int(response.headers["retry-after"]) > 0


@pytest.fixture
def proxy(redis: RedisServer) -> Iterator[Proxy]:
    """The path to Redis, to which a test can give faults."""
    with Proxy(redis.port) as proxy:
        yield proxy


@pytest.fixture
def daemon(proxy: Proxy, start_daemon: StartDaemon) -> Daemon:
    """A daemon that reaches Redis through the proxy."""
    return connected(start_daemon("--redis", f"redis://127.0.0.1:{proxy.port}/0", *DIRECT))


def outcome_after_recovery(daemon: Daemon, event: Webhook) -> tuple[int, str]:
    """Post an event until the daemon does not refuse it, and return the outcome."""
    outcomes = [UNAVAILABLE]

    def is_taken() -> bool:
        outcomes.append(outcome(post(daemon.port, event)))
        return outcomes[-1] != UNAVAILABLE

    wait_until(is_taken, "the daemon has recovered")
    return outcomes[-1]


def assert_mended(daemon: Daemon, redis: RedisServer, *earlier: Webhook) -> None:
    """Check that the daemon recovers by itself, and that each event, ``earlier`` too, is one job."""
    assert outcome_after_recovery(daemon, EVENT) in (QUEUED, ALREADY_QUEUED)
    assert outcome(post(daemon.port, webhook(2))) == QUEUED
    ids = sorted(event.job_id for event in (EVENT, webhook(2), *earlier))
    queue = chatwoot_queue(redis)
    assert sorted(queue.held_ids()) == ids
    assert sorted(entry[b"jobId"].decode() for entry in queue.events("added")) == ids
    assert queue.faults() == []
    assert "Traceback" not in daemon.log


# -- Redis goes, and comes back -----------------------------------------------------------------------------


def test_nothing_waits_for_a_redis_that_is_down(redis: RedisServer, daemon: Daemon) -> None:
    """By default, txredisapi waits forever."""
    redis.kill()

    assert all(map(is_refused, post_at_once([daemon.port], webhooks(50))))

    redis.start()
    assert_mended(daemon, redis)


def test_redis_restarts_between_two_requests(redis: RedisServer, daemon: Daemon) -> None:
    assert outcome(post(daemon.port, webhook(7))) == QUEUED

    redis.restart()

    queue = chatwoot_queue(redis)
    wait_until(lambda: queue.held_ids() == [webhook(7).job_id], "the lost job is sent again")
    assert_mended(daemon, redis, webhook(7))


def test_scripts_are_flushed_between_two_requests(redis: RedisServer, daemon: Daemon) -> None:
    """NOSCRIPT is no failure: the call had no effect, and is repeated with the script."""
    with redis.client() as client:
        for event in webhooks(3):
            assert outcome(post(daemon.port, event)) == QUEUED
            assert client.script_flush()
    assert "cannot be used" not in daemon.log


# -- a wrong password, a missing database -------------------------------------------------------------------


def test_a_failed_auth_is_mended_without_a_restart(start_daemon: StartDaemon) -> None:
    """By default, txredisapi never tries again."""
    with RedisServer(config=["requirepass old"]) as redis:
        daemon = start_daemon("--redis", f"redis://:new@127.0.0.1:{redis.port}/0", *DIRECT)
        wait_until(lambda: "cannot be used: noauth" in daemon.log, "AUTH has failed")
        assert is_refused(post(daemon.port, EVENT))

        with redis.client(password="old") as client:
            assert client.config_set("requirepass", "new")

        assert outcome(post(connected(daemon).port, EVENT)) == QUEUED


def test_a_failed_select_is_mended_without_a_restart(start_daemon: StartDaemon) -> None:
    """By default, txredisapi never tries again."""
    with RedisServer(config=["databases 4"]) as redis:
        daemon = start_daemon("--redis", f"redis://127.0.0.1:{redis.port}/9", *DIRECT)
        wait_until(lambda: "DB index is out of range" in daemon.log, "SELECT has failed")
        assert is_refused(post(daemon.port, EVENT))

        redis.config = []
        redis.restart()

        assert outcome(post(connected(daemon).port, EVENT)) == QUEUED
        with redis.client(db=9) as client:
            assert client.exists(KEYS.job(EVENT.job_id))


# -- the network --------------------------------------------------------------------------------------------


def test_a_black_hole_is_answered_and_left_behind(redis: RedisServer, proxy: Proxy, daemon: Daemon) -> None:
    events = webhooks(20)
    with proxy.faulty(black_hole=True):
        assert all(map(is_refused, post_at_once([daemon.port], events)))

    # The late replies must not be taken for those of these calls.
    answers = post_at_once([connected(daemon).port], events)
    assert {outcome(answer) for answer in answers} <= {QUEUED, ALREADY_QUEUED}
    assert_mended(daemon, redis, *events)


def test_a_frozen_redis_is_answered_and_comes_back(redis: RedisServer, daemon: Daemon) -> None:
    redis.suspend()
    for _ in range(3):
        assert is_refused(post(daemon.port, EVENT))
    redis.resume()

    assert_mended(daemon, redis)


def test_a_reset_between_two_requests(redis: RedisServer, proxy: Proxy, daemon: Daemon) -> None:
    assert outcome(post(daemon.port, webhook(7))) == QUEUED

    proxy.reset_all()

    wait_until(lambda: proxy.connection_count == 2, "the daemon has connected again")
    assert_mended(daemon, redis, webhook(7))


def test_replies_in_slices_of_one_byte(redis: RedisServer, proxy: Proxy, start_daemon: StartDaemon) -> None:
    options = "--redis", f"redis://127.0.0.1:{proxy.port}/0", "--redis-deadline", "1.5", *DIRECT
    daemon = connected(start_daemon(*options))
    wait_until(lambda: proxy.connection_count == 2, "the daemon has both connections")
    events = webhooks(5)  # a byte takes a millisecond or more, and the deadline is 1.5 s
    with proxy.faulty(slice_bytes=1):
        assert {outcome(answer) for answer in post_at_once([daemon.port], events)} == {QUEUED}
        assert outcome(post(daemon.port, events[0])) == ALREADY_QUEUED

    # The handshake and INFO, in short slices.
    with proxy.faulty(slice_bytes=16):
        proxy.reset_all()
        wait_until(lambda: proxy.connection_count == 2, "the daemon has connected again")
        assert_mended(daemon, redis, *events)


# -- a client hangs up --------------------------------------------------------------------------------------


@pytest.mark.parametrize("reset", [False, True], ids=["closes", "resets"])
def test_a_client_that_hangs_up_does_not_take_its_event_back(
    redis: RedisServer, start_daemon: StartDaemon, reset: bool
) -> None:
    """By default, Klein cancels the handler."""
    daemon = connected(start_daemon("--redis", redis.url, "--max-in-flight", "1", *DIRECT))
    redis.suspend()
    connection = connect(daemon.port)
    connection.sendall(EVENT.request)
    assert daemon.get("/health/live").status == 200  # so the webhook before it was read
    if reset:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    connection.close()
    assert daemon.get("/health/live").status == 200  # so the end of the connection was read
    assert outcome(post(daemon.port, webhook(2))) == (429, "too_many")

    redis.resume()

    queue = chatwoot_queue(redis)
    wait_until(lambda: queue.held_ids() == [EVENT.job_id], "the event is in Redis")
    wait_until(lambda: outcome(post(daemon.port, EVENT)) == ALREADY_QUEUED, "it is no longer in flight")
    assert queue.faults() == []
    assert "Traceback" not in daemon.log

"""The traps of txredisapi, Klein and networks, each with a Redis that triggers it."""

from __future__ import annotations

import gc
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
import pytest_twisted
from attrs import frozen
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater

from tests.integration.conftest import StartDaemon
from tests.support.bullmq import Queue
from tests.support.daemon import Daemon
from tests.support.http import Response, connect
from tests.support.process import wait_until
from tests.support.proxy import Proxy
from tests.support.servers import RedisServer
from tests.support.webhooks import DIRECT, Webhook, connected, outcome, post, post_at_once, webhook, webhooks
from webhookd.bullmq.keys import QueueKeys
from webhookd.bullmq.script import Wire
from webhookd.model import Job, Outcome, QueueUnavailable, Receipt, RedisErrorKind
from webhookd.reactor import the_reactor
from webhookd.redis.breaker import BreakerPolicy, CircuitBreaker
from webhookd.redis.connection import RedisConnection
from webhookd.redis.pool import RedisPool
from webhookd.redis.queue import RedisQueue
from webhookd.redis.settings import QueueSettings
from webhookd.redis.url import RedisUrl

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


def test_a_password_that_is_changed_and_changed_back(start_daemon: StartDaemon) -> None:
    """A user's connections survive a change of its password, so this test cuts them, as an operator does."""
    with RedisServer(config=["user hook on >first ~* &* +@all"]) as redis, redis.client() as client:
        daemon = connected(start_daemon("--redis", f"redis://hook:first@127.0.0.1:{redis.port}/0", *DIRECT))
        assert outcome(post(daemon.port, EVENT)) == QUEUED

        client.acl_setuser("hook", enabled=True, reset_passwords=True, passwords=["+second"])
        client.client_kill_filter(user="hook")
        wait_until(lambda: "cannot be used: noauth" in daemon.log, "AUTH has failed")
        assert is_refused(post(daemon.port, webhook(2)))

        client.acl_setuser("hook", enabled=True, reset_passwords=True, passwords=["+first"])
        assert outcome(post(connected(daemon).port, webhook(2))) == QUEUED


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


@pytest.mark.parametrize("fault", ["resets_on_reply", "drops_replies"])
def test_a_reply_that_is_lost_leaves_one_job_when_the_request_comes_again(
    redis: RedisServer, proxy: Proxy, daemon: Daemon, fault: str
) -> None:
    """The script has run, but its reply is lost. The outcome is unknown, and a repetition is harmless."""
    assert outcome(post(daemon.port, webhook(7))) == QUEUED  # so Redis knows the script
    with proxy.faulty(**{fault: True}):
        assert is_refused(post(daemon.port, EVENT))
        queue = chatwoot_queue(redis)
        wait_until(lambda: EVENT.job_id in queue.held_ids(), "Redis has carried it out")

    assert outcome_after_recovery(daemon, EVENT) == ALREADY_QUEUED
    assert_mended(daemon, redis, webhook(7))


def test_replies_in_slices_of_one_byte(redis: RedisServer, proxy: Proxy, daemon: Daemon) -> None:
    events = webhooks(8)
    with proxy.faulty(slice_bytes=1):
        assert {outcome(answer) for answer in post_at_once([daemon.port], events)} == {QUEUED}
        assert outcome(post(daemon.port, events[0])) == ALREADY_QUEUED

    # The handshake and INFO, in short slices.
    with proxy.faulty(slice_bytes=16):
        proxy.reset_all()
        wait_until(lambda: proxy.connection_count == 2, "the daemon has connected again")
        assert_mended(daemon, redis, *events)


def test_a_slow_redis_within_the_deadline_is_no_failure(proxy: Proxy, daemon: Daemon) -> None:
    with proxy.faulty(reply_latency_s=0.05):
        assert {outcome(answer) for answer in post_at_once([daemon.port], webhooks(20))} == {QUEUED}
    assert "cannot be used" not in daemon.log


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


# -- inside the pool and the queue --------------------------------------------------------------------------


@frozen
class Sink:
    """The daemon's pool and queue, in this process."""

    pool: RedisPool
    queue: RedisQueue

    async def writer(self) -> RedisConnection:
        """Return the connection for jobs when there is one."""
        for _ in range(1000):
            if self.pool.writer is not None:
                return self.pool.writer
            await deferLater(reactor, 0.01)
        raise TimeoutError("the pool does not connect")


@asynccontextmanager
async def open_sink(url: str, *, deadline_s: float = 0.5) -> AsyncIterator[Sink]:
    pool = RedisPool(the_reactor(), RedisUrl.parse(url))
    # A breaker that never opens: the pool itself must not wait.
    breaker = CircuitBreaker(BreakerPolicy(failures_in_a_row=10**9, minimum_calls=10**9), lambda: 0.5)
    settings = QueueSettings(KEYS.prefix, Wire.AUTO, 60_000, lambda: "the tests")
    queue = RedisQueue(
        reactor, pool, breaker, settings, deadline_s=deadline_s, acknowledged=lambda _jobs: None
    )
    pool.startService()
    try:
        yield Sink(pool, queue)
    finally:
        await pool.stopService()


def job(number: int) -> Job:
    return Job(KEYS.queue, f"trap.{number}", "trap", b"{}", b'{"attempts":0}', 1_700_000_000_000)


async def outcome_of(receipt: Deferred[Receipt]) -> object:
    """Return the outcome of a receipt, or the error."""
    result: object
    try:
        result = (await receipt).outcome
    except QueueUnavailable as error:
        result = error
    await deferLater(reactor, 0)  # the next event comes in another turn, as from the network
    return result


def deferreds_count() -> int:
    gc.collect()
    return sum(isinstance(thing, Deferred) for thing in gc.get_objects())


@pytest_twisted.ensureDeferred
async def test_no_list_of_abandoned_waits_grows(redis: RedisServer) -> None:
    async with open_sink(redis.url) as sink:
        await sink.writer()
        redis.kill()
        while sink.pool.writer is not None:
            await deferLater(reactor, 0.01)
        await outcome_of(sink.queue.add(job(0)))
        before = deferreds_count()

        for number in range(1, 501):
            error = await outcome_of(sink.queue.add(job(number)))
            assert isinstance(error, QueueUnavailable)
            assert error.kind is RedisErrorKind.DISCONNECTED
            assert not error.unknown

        assert deferreds_count() - before < 50


@pytest_twisted.ensureDeferred
async def test_a_late_answer_is_not_taken_for_that_of_the_next_command(redis: RedisServer) -> None:
    async with open_sink(redis.url, deadline_s=0.2) as sink:
        late = await sink.writer()
        assert await outcome_of(sink.queue.add(job(1))) is Outcome.QUEUED

        redis.suspend()
        error = await outcome_of(sink.queue.add(job(1)))  # its late answer is "already queued"
        assert isinstance(error, QueueUnavailable)
        assert (error.kind, error.unknown) == (RedisErrorKind.TIMEOUT, True)
        assert sink.pool.writer is not late
        redis.resume()

        assert await sink.writer() is not late
        for number in range(2, 10):
            assert await outcome_of(sink.queue.add(job(number))) is Outcome.QUEUED
        assert await outcome_of(sink.queue.add(job(1))) is Outcome.ALREADY_QUEUED


@pytest_twisted.ensureDeferred
async def test_a_call_that_waits_for_a_lost_one_was_not_sent(redis: RedisServer) -> None:
    async with open_sink(redis.url, deadline_s=0.2) as sink:
        await sink.writer()
        redis.suspend()
        first = sink.queue.add(job(1))
        await deferLater(reactor, 0)
        second = sink.queue.add(job(2))

        errors = [await outcome_of(first), await outcome_of(second)]
        redis.resume()

        assert [error.unknown for error in errors if isinstance(error, QueueUnavailable)] == [True, False]


@pytest_twisted.ensureDeferred
async def test_digits_stay_text(redis: RedisServer) -> None:
    """By default, txredisapi converts them to numbers, and bytes to text."""
    async with open_sink(redis.url) as sink:
        connection = await sink.writer()
        for value in b"007", b"1e3", b"\xff\x00":
            await connection.set("key", value)
            assert await connection.get("key") == value


@pytest_twisted.ensureDeferred
async def test_jobs_of_one_turn_keep_their_order(redis: RedisServer) -> None:
    """A pool of txredisapi picks any connection for a command."""
    async with open_sink(redis.url) as sink:
        await sink.writer()
        receipts = []
        for number in range(300):
            receipts.append(sink.queue.add(job(number)))
            if number % 7 == 0:
                await deferLater(reactor, 0)
        for receipt in receipts:
            assert await outcome_of(receipt) is Outcome.QUEUED

    assert chatwoot_queue(redis).held_ids() == [f"trap.{number}" for number in reversed(range(300))]

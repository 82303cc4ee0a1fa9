"""The pool of connections, over transports in memory: which server it finds, and what it reports."""

from __future__ import annotations

from pathlib import Path

from twisted.internet.testing import MemoryReactorClock
from twisted.logger import LogLevel
from twisted.trial.unittest import SynchronousTestCase

from tests.support.redis_wire import (
    NIL,
    REPLICA,
    Line,
    PoolCase,
    array,
    bulk,
    error,
    turn,
    until_attempts,
)
from webhookd.model import ConfigError, QueueUnavailable, RedisErrorKind
from webhookd.redis.pool import RedisPool
from webhookd.redis.url import RedisUrl

_SENTINELS = "redis+sentinel://s1:26379,s2:26380,s3:26381/mymaster"


class SentinelTests(PoolCase):
    url = _SENTINELS

    def setUp(self) -> None:
        super().setUp()
        self.other_slots_sentinel = self.network.accept()  # the pool's second connection begins alike

    def sentinel(self, reply: bytes) -> Line:
        """The next Sentinel, and its answer."""
        line = self.network.accept()
        self.assertEqual(line.expect(b"SENTINEL")[1:], [b"GET-MASTER-ADDR-BY-NAME", b"mymaster"])
        line.reply(reply)
        return line

    async def test_the_first_who_knows_names_the_primary(self) -> None:
        self.assertEqual(self.network.where(), 26379)
        self.network.refuse()
        self.clock.advance(0.3)  # by then Twisted knows that the name has no further address
        self.assertEqual(self.network.where(), 26380)
        unknowing = self.sentinel(NIL)
        self.assertTrue(unknowing.is_aborted)
        self.assertEqual(self.network.where(), 26381)
        knowing = self.sentinel(array(bulk(b"10.0.0.7"), bulk(b"6390")))
        self.assertTrue(knowing.is_aborted)
        self.assertEqual(self.network.where(), 6390)
        came = self.network.accept().shake_hands()
        self.assertEqual(came, [[b"PING"], [b"ROLE"]])
        await turn()
        self.assertIsNotNone(self.pool.writer)

    async def test_one_that_says_nothing_is_passed_over(self) -> None:
        silent = self.network.accept()
        self.clock.advance(0.5)
        self.assertTrue(silent.is_aborted)
        self.assertEqual(self.network.where(), 26380)

    async def test_one_that_wants_a_password_is_passed_over(self) -> None:
        self.sentinel(error("NOAUTH Authentication required."))
        self.assertEqual(self.network.where(), 26380)

    async def test_when_none_knows_that_is_said(self) -> None:
        for _ in range(3):
            self.sentinel(NIL)
        assert self.pool.last_error is not None
        self.assertIs(self.pool.last_error.kind, RedisErrorKind.DISCONNECTED)
        self.assertIn("mymaster", str(self.pool.last_error))

    async def test_stopping_ends_the_search(self) -> None:
        self.successResultOf(self.pool.stopService())
        self.assertEqual(len(self.network.attempts()), 1)
        self.assertEqual(self.log.at(LogLevel.warn), [])

    async def test_a_replica_is_no_primary_whatever_the_sentinel_says(self) -> None:
        for role, kind in (
            (REPLICA, RedisErrorKind.READONLY),
            (error("NOPERM no permissions to run the 'role' command"), RedisErrorKind.NOPERM),
        ):
            self.start_pool()
            self.network.accept()
            self.sentinel(array(bulk(b"10.0.0.7"), bulk(b"6390")))
            line = self.network.accept()
            line.shake_hands(ROLE=role)
            self.assertTrue(line.is_aborted)
            assert self.pool.last_error is not None
            self.assertIs(self.pool.last_error.kind, kind)


class UseTests(PoolCase):
    async def test_the_writer_stays_the_same_and_the_prober_is_the_other_one(self) -> None:
        first = await self.connect()
        writer = self.pool.writer
        self.assertIsNone(self.pool.prober)
        second = await self.connect()
        self.assertIs(self.pool.writer, writer)
        prober = self.pool.prober
        self.assertIsNot(prober, writer)
        first.hang_up()
        self.assertIs(self.pool.writer, prober)
        self.assertIsNone(self.pool.prober)
        await until_attempts(self.network, 1)
        await self.connect()
        self.assertIs(self.pool.writer, prober)
        self.assertNotIn(self.pool.prober, (None, prober))
        second.hang_up()
        self.assertIsNot(self.pool.writer, prober)

    async def test_what_is_given_up_is_not_used_any_more(self) -> None:
        lines = [await self.connect(), await self.connect()]
        writer, prober = self.pool.writer, self.pool.prober
        assert writer is not None
        writer.give_up()
        self.assertTrue(lines[0].is_aborted)
        self.assertIs(self.pool.writer, prober)  # before the connection has ended
        self.clock.advance(0)
        self.assertIs(self.pool.writer, prober)
        self.assertFalse(lines[1].is_aborted)

    async def test_nothing_that_txredisapi_does_ends_the_reconnecting(self) -> None:
        """It calls stopTrying() when it takes a failure for a permanent one."""
        line = await self.connect()
        connection = self.pool.writer
        assert connection is not None
        await connection.factory.stopTrying()
        line.hang_up()
        await until_attempts(self.network, 2)
        await self.connect()
        self.assertIsNotNone(self.pool.writer)

    async def test_listeners_hear_of_each_connection_when_it_can_be_used(self) -> None:
        heard = []
        self.pool.on_ready(lambda connection: heard.append((connection, self.pool.prober)))
        await self.connect()
        await self.connect()
        self.assertEqual(heard, [(self.pool.writer, None), (self.pool.prober,) * 2])

    async def test_who_waits_for_a_connection_gets_the_writer(self) -> None:
        waiting = self.pool.when_ready()
        self.assertNoResult(waiting)
        await self.connect()
        self.assertIs(self.successResultOf(waiting), self.pool.writer)
        await self.connect()
        self.assertIs(self.successResultOf(self.pool.when_ready()), self.pool.writer)

    async def test_who_waits_for_a_connection_hears_of_the_first_failure(self) -> None:
        waiting = self.pool.when_ready()
        self.network.refuse()
        reason = self.failureResultOf(waiting, QueueUnavailable).value
        self.assertIs(reason, self.pool.last_error)
        await self.connect()
        self.assertIs(self.successResultOf(self.pool.when_ready()), self.pool.writer)

    async def test_stopping_closes_the_connections(self) -> None:
        lines = [await self.connect(), await self.connect()]
        stopped = self.pool.stopService()
        self.assertNoResult(stopped)
        self.clock.advance(0)
        self.successResultOf(stopped)
        self.assertIsNone(self.pool.writer)
        self.assertEqual([line.is_aborted for line in lines], [False, False])

    async def test_stopping_while_it_connects_is_no_failure(self) -> None:
        self.successResultOf(self.pool.stopService())
        self.assertIsNone(self.pool.last_error)


class ReportTests(PoolCase):
    def failed(self, kind: RedisErrorKind) -> QueueUnavailable:
        reason = QueueUnavailable(kind, f"no, {kind.value}")
        self.pool.failed(reason)
        return reason

    def test_at_first_nothing_is_known(self) -> None:
        self.assertIsNone(self.pool.last_error)

    def test_each_kind_is_logged_once_until_redis_works_again(self) -> None:
        for kind in RedisErrorKind.OOM, RedisErrorKind.OOM, RedisErrorKind.TIMEOUT:
            reason = self.failed(kind)
            self.assertIs(self.pool.last_error, reason)
        lines = self.log.at(LogLevel.warn)
        self.assertEqual(len(lines), 2)
        self.assertIn("oom", lines[0])
        self.assertIn("timeout", lines[1])
        self.assertIn("unix:///redis.sock", lines[0])
        self.pool.worked()
        self.pool.worked()
        self.assertIsNone(self.pool.last_error)
        self.assertEqual(len(self.log.at(LogLevel.info)), 1)
        self.failed(RedisErrorKind.TIMEOUT)
        self.assertEqual(len(self.log.at(LogLevel.warn)), 3)

    async def test_a_server_that_refuses_everything_is_asked_less_and_less(self) -> None:
        await self.connect()
        assert self.pool.writer is not None
        retry_delay = self.pool.writer.factory.retryDelay
        self.assertLess(retry_delay(1), 0.5)
        for _ in range(4):
            self.failed(RedisErrorKind.CLUSTER)
        self.assertGreater(retry_delay(1), 0.5)
        self.pool.worked()
        self.assertLess(retry_delay(1), 0.5)

    async def test_a_connection_is_news_once_after_each_that_failed_otherwise(self) -> None:
        kinds = RedisErrorKind.DISCONNECTED, RedisErrorKind.CLUSTER, RedisErrorKind.CLUSTER
        for kind, lines in zip(kinds, (1, 2, 2), strict=True):
            self.failed(kind)
            line = await self.connect()
            said = [text for text in self.log.at(LogLevel.info) if text.startswith("connected")]
            self.assertEqual(len(said), lines)
            line.hang_up()
            await until_attempts(self.network, 2)

    async def test_a_connection_alone_does_not_mean_that_redis_works(self) -> None:
        reason = self.failed(RedisErrorKind.OOM)
        await self.connect()
        self.assertIs(self.pool.last_error, reason)


class CertificateTests(SynchronousTestCase):
    def assert_refused(self, ca_file: Path, expected: str) -> None:
        url = RedisUrl.parse(f"rediss://:s3cret@redis?ca_file={ca_file}")
        error_ = self.assertRaises(ConfigError, RedisPool, MemoryReactorClock(), url)
        self.assertIn(expected, str(error_))
        self.assertNotIn("s3cret", str(error_))

    def test_a_file_that_is_not_there(self) -> None:
        self.assert_refused(Path("/nonexistent.pem"), "cannot be read")

    def test_a_file_without_a_certificate(self) -> None:
        self.assert_refused(Path(__file__), "no PEM certificate")

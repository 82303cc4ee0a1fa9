"""The parts of one Redis together: when it is called, and what is logged when that changes."""

from __future__ import annotations

from twisted.logger import LogLevel

from tests.support.redis_wire import Network, PoolCase, array, error, integer
from tests.support.spools import make_job
from webhookd.bullmq.script import Wire
from webhookd.redis.client import connect
from webhookd.redis.settings import QueueSettings
from webhookd.redis.url import RedisUrl


class RedisTests(PoolCase):
    def start_pool(self) -> None:
        self.network = Network()
        self.clock = self.network.clock
        settings = QueueSettings("bull", Wire.AUTO, 60_000, lambda: "the tests")
        self.redis = connect(self.clock, RedisUrl.parse(self.url), settings, 0.5)
        self.pool = self.redis.pool
        self.addCleanup(self._stop, self.pool, self.clock)
        self.pool.startService()

    async def test_it_is_called_once_it_is_connected(self) -> None:
        self.assertFalse(self.redis.may_call())
        self.assertEqual(self.redis.why_not(), "Redis at unix:///redis.sock?db=0: it is not connected")
        await self.connect()
        self.assertTrue(self.redis.may_call())
        self.assertIsNone(self.redis.why_not())

    async def test_it_is_not_called_while_the_breaker_is_open(self) -> None:
        line = await self.connect()
        for number in range(2):
            self.redis.live.add(make_job(number)).addErrback(lambda _: None)
            self.clock.advance(0)
            line.reply(error("OOM command not allowed"))
        self.assertFalse(self.redis.may_call())
        self.assertRegex(
            str(self.redis.why_not()),
            r"^Redis at .*: OOM command not allowed; the breaker is open, next try in 0\.[2-5] s$",
        )
        self.clock.advance(self.redis.retry_in_s())
        self.assertTrue(self.redis.may_call())
        for number in range(2):
            self.redis.draining.add(make_job(number))
            self.clock.advance(0)
            line.reply(array(integer(1)))
        self.assertIsNone(self.redis.why_not())
        self.assertIn("the circuit breaker is open, and was closed", self.log.at(LogLevel.warn))
        for text in (
            "the circuit breaker is half_open, and was open",
            "the circuit breaker is closed, and was half_open",
        ):
            self.assertIn(text, self.log.at(LogLevel.info))
        self.assertEqual(len(self.redis.recent.take()), 2)

"""Facts about Redis, read from INFO, judged, and compared with the last ones; and the looks at its queues."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from typing import Any

from attrs import evolve
from twisted.internet.defer import Deferred, ensureDeferred
from twisted.logger import LogLevel
from twisted.trial.unittest import SynchronousTestCase

from tests.support.redis_wire import NIL, Line, PoolCase, array, bulk, error, integer
from webhookd.bullmq.keys import QueueKeys
from webhookd.model import QueueUnavailable, RedisErrorKind
from webhookd.redis.watch import QueueWatch, RedisWatch, ServerFacts

_DEADLINE_S = 4.0
_WAIT_S = 1.0
_NOPERM = error("NOPERM this user has no permissions to run the command")
_SAFE = ServerFacts(
    version="7.0.15",
    run_id="a" * 40,
    is_cluster=False,
    maxmemory_policy="noeviction",
    has_aof=True,
    appendfsync="everysec",
)


def info(**values: str) -> bytes:
    """Return an INFO reply of a safe Redis, with some values changed."""
    lines = {
        "redis_version": "7.0.15",
        "run_id": "a" * 40,
        "cluster_enabled": "0",
        "maxmemory_policy": "noeviction",
        "aof_enabled": "1",
        **values,
    }
    return b"# Server\r\n" + b"".join(f"{name}:{value}\r\n".encode() for name, value in lines.items())


class FactsTests(SynchronousTestCase):
    def test_from_an_info_reply(self) -> None:
        self.assertEqual(ServerFacts.from_info(info()), evolve(_SAFE, appendfsync=None))

    def test_valkey_gives_its_own_version(self) -> None:
        facts = ServerFacts.from_info(info(redis_version="7.2.4", valkey_version="9.1.2"))
        self.assertEqual(facts.version, "9.1.2")

    def test_flags(self) -> None:
        facts = ServerFacts.from_info(info(cluster_enabled="1", aof_enabled="0"))
        self.assertEqual((facts.is_cluster, facts.has_aof), (True, False))

    def test_what_is_not_said_is_not_known(self) -> None:
        self.assertEqual(ServerFacts.from_info(b""), ServerFacts())
        self.assertEqual(ServerFacts.from_info(b"# Server\r\nno colon\r\n\xff:\xff\r\n"), ServerFacts())

    def test_dangers_and_safety(self) -> None:
        for change, danger, safety in (
            ({}, None, "safe"),
            ({"appendfsync": "always"}, None, "safe"),
            ({"maxmemory_policy": "allkeys-lru"}, "allkeys-lru", "unsafe"),
            ({"maxmemory_policy": "volatile-ttl"}, "volatile-ttl", "unsafe"),
            ({"has_aof": False}, "appendonly", "unsafe"),
            ({"has_aof": False, "appendfsync": "no"}, "appendonly", "unsafe"),
            ({"appendfsync": "no"}, "appendfsync", "unsafe"),
            ({"appendfsync": None}, None, "unknown"),
            ({"maxmemory_policy": None}, None, "unknown"),
            ({"has_aof": None}, None, "unknown"),
            ({"has_aof": None, "maxmemory_policy": "allkeys-lru"}, "allkeys-lru", "unsafe"),
        ):
            facts = evolve(_SAFE, **change)
            self.assertEqual(facts.safety, safety, change)
            self.assertEqual(len(facts.dangers), int(danger is not None), change)
            self.assertIn(danger or "", "".join(facts.dangers))

    def test_each_danger_is_named(self) -> None:
        self.assertEqual(len(evolve(_SAFE, maxmemory_policy="allkeys-lru", has_aof=False).dangers), 2)


class WatchCase(PoolCase):
    queues: tuple[str, ...] = ("chatwoot",)
    prefix = "bull"

    def setUp(self) -> None:
        super().setUp()
        self.restarts = 0
        keys = [QueueKeys(self.prefix, queue) for queue in self.queues]
        self.watch = RedisWatch(self.pool, keys, self.restarted)
        self.pool.on_ready(self.watch.connected)

    def restarted(self) -> None:
        self.restarts += 1

    async def connect_to(self, reply: bytes, fsync: bytes | None = None) -> Line:
        """Connect to a server that gives these replies to INFO and to CONFIG GET appendfsync."""
        line = await self.connect()
        line.expect(b"INFO")
        line.reply(reply)
        for command in line.commands():
            self.assertEqual(command, [b"CONFIG", b"GET", b"appendfsync"])
            line.reply(array(bulk(b"appendfsync"), bulk(b"everysec")) if fsync is None else fsync)
        return line

    async def meet(self, *servers: Mapping[str, str]) -> None:
        """Connect to one server after another."""
        for values in servers:
            self.start_pool()
            self.pool.on_ready(self.watch.connected)
            await self.connect_to(bulk(info(**values)))

    def describe(self) -> Any:
        return self.watch.describe()


class LookTests(WatchCase):
    async def test_a_server_that_is_safe(self) -> None:
        await self.connect_to(bulk(info()))
        self.assertEqual(self.watch.facts, _SAFE)
        self.assertEqual(self.log.at(LogLevel.warn), [])
        expected = {"status": "up", "version": "7.0.15", "safety": "safe", "dangers": []}
        self.assertEqual(self.describe(), expected)

    async def test_a_server_that_is_not(self) -> None:
        await self.connect_to(bulk(info(aof_enabled="0", maxmemory_policy="allkeys-lru")))
        self.assertEqual(len(self.log.at(LogLevel.warn)), 2)
        self.assertEqual(self.describe()["safety"], "unsafe")
        self.assertEqual(len(self.describe()["dangers"]), 2)

    async def test_a_server_that_does_not_report_how_it_syncs(self) -> None:
        for reply in _NOPERM, error("ERR unknown command 'CONFIG'"), array():
            self.start_pool()
            self.pool.on_ready(self.watch.connected)
            await self.connect_to(bulk(info()), fsync=reply)
            self.assertEqual(self.watch.facts, evolve(_SAFE, appendfsync=None))
            self.assertIsNotNone(self.pool.writer)
        self.assertEqual(len(self.log.at(LogLevel.warn)), 1)  # once: nothing changed
        self.assertEqual(self.watch.facts.safety, "unknown")

    async def test_a_server_that_reports_nothing(self) -> None:
        await self.connect_to(_NOPERM)
        self.assertEqual(self.watch.facts, ServerFacts())
        self.assertEqual(self.describe()["safety"], "unknown")
        self.assertEqual(len(self.log.at(LogLevel.warn)), 1)

    async def test_a_server_that_is_gone_before_it_answers(self) -> None:
        line = await self.connect()
        line.hang_up()
        self.assertEqual(self.log.at(LogLevel.critical), [])
        await self.meet({})
        self.assertEqual((self.watch.facts, self.restarts), (_SAFE, 0))

    async def test_a_server_that_is_gone_in_the_middle_is_the_same_as_before(self) -> None:
        await self.meet({})
        line = await self.connect()
        line.expect(b"INFO")
        line.reply(bulk(info()))
        line.hang_up()
        self.assertEqual((self.watch.facts, self.log.at(LogLevel.warn)), (_SAFE, []))

    async def test_a_server_that_does_not_answer(self) -> None:
        line = await self.connect()
        self.clock.advance(_DEADLINE_S)
        self.assertTrue(line.is_aborted)
        self.assertEqual(self.watch.facts, ServerFacts())

    async def test_an_answer_that_makes_no_sense_is_logged(self) -> None:
        await self.connect_to(integer(1))
        self.assertEqual(len(self.flushLoggedErrors(AttributeError)), 1)

    async def test_without_a_connection(self) -> None:
        self.assertEqual(self.describe(), {"status": "down", "error": None})
        self.pool.failed(QueueUnavailable(RedisErrorKind.LOADING, "LOADING"))
        self.assertEqual(self.describe(), {"status": "down", "error": "loading"})


class RestartTests(WatchCase):
    async def test_the_first_server_is_no_restart(self) -> None:
        await self.meet({})
        self.assertEqual(self.restarts, 0)

    async def test_nor_is_a_second_connection_to_the_same_run(self) -> None:
        await self.connect_to(bulk(info()))
        await self.connect_to(bulk(info()))
        self.assertEqual(self.restarts, 0)

    async def test_nor_is_a_reconnect_to_the_same_run(self) -> None:
        await self.meet({}, {}, {"aof_enabled": "0"})
        self.assertEqual(self.restarts, 0)

    async def test_another_run_is_one_and_its_second_connection_is_none(self) -> None:
        await self.meet({}, {"run_id": "b" * 40}, {"run_id": "b" * 40})
        self.assertEqual(self.restarts, 1)
        await self.meet({})
        self.assertEqual(self.restarts, 2)

    async def test_a_server_without_a_run_id_may_be_another_each_time(self) -> None:
        for reply in _NOPERM, _NOPERM, bulk(b"redis_version:7.0.15\r\n"):
            self.start_pool()
            self.pool.on_ready(self.watch.connected)
            await self.connect_to(reply)
        self.assertEqual(self.restarts, 2)
        await self.meet({})
        self.assertEqual(self.restarts, 3)


class ClusterTests(WatchCase):
    async def test_a_prefix_without_a_hash_tag_is_an_error(self) -> None:
        await self.connect_to(bulk(info(cluster_enabled="1")))
        (line,) = self.log.at(LogLevel.error)
        self.assertIn("--prefix '{bull}'", line)
        self.assertIn("chatwoot", line)

    async def test_without_a_cluster_it_is_none(self) -> None:
        await self.connect_to(bulk(info()))
        self.assertEqual(self.log.at(LogLevel.error), [])


class HashTagTests(WatchCase):
    prefix = "{bull}"

    async def test_a_prefix_with_one_is_right(self) -> None:
        await self.connect_to(bulk(info(cluster_enabled="1")))
        self.assertEqual(self.log.at(LogLevel.error), [])


def jobs(first: int) -> Mapping[str, int]:
    """Return consecutive counts by state, in the order in which Redis is asked for them."""
    states = ("waiting", "paused", "delayed", "prioritized", "active", "failed")
    return {state: first + number for number, state in enumerate(states)}


UNKNOWN: Mapping[str, None] = {"chatwoot": None, "other": None}
NONE_WAITS = [*map(integer, range(6)), NIL]


class QueueCase(PoolCase):
    def setUp(self) -> None:
        super().setUp()
        queues = [QueueKeys("bull", queue) for queue in ("chatwoot", "other")]
        self.watch = QueueWatch(self.clock, self.pool, queues)
        self.asked: list[Sequence[bytes]] = []

    async def connect_both(self) -> None:
        self.writer, self.prober = await self.connect(), await self.connect()

    def refresh(self) -> Deferred[None]:
        return ensureDeferred(self.watch.refresh())

    def reply(self, *replies: bytes) -> None:
        for reply in replies:
            self.asked += self.prober.commands()
            self.prober.reply(reply)


class QueueTests(QueueCase):
    async def look(self, *replies: bytes) -> None:
        """Take a look, and have Redis give these replies."""
        await self.connect_both()
        refreshed = self.refresh()
        self.reply(*replies)
        self.successResultOf(refreshed)

    async def test_the_jobs_of_each_queue(self) -> None:
        await self.look(*NONE_WAITS, *map(integer, range(6, 12)), NIL)
        self.assertEqual(self.watch.last.jobs, {"chatwoot": jobs(0), "other": jobs(6)})
        self.assertEqual(self.watch.last.next_since_ms, {"chatwoot": None, "other": None})
        self.assertEqual(
            self.asked[:7],
            [
                [b"LLEN", b"bull:chatwoot:wait"],
                [b"LLEN", b"bull:chatwoot:paused"],
                [b"ZCARD", b"bull:chatwoot:delayed"],
                [b"ZCARD", b"bull:chatwoot:prioritized"],
                [b"LLEN", b"bull:chatwoot:active"],
                [b"ZCARD", b"bull:chatwoot:failed"],
                [b"LINDEX", b"bull:chatwoot:wait", b"-1"],
            ],
        )
        self.assertEqual(self.writer.commands(), [])  # it is for jobs only

    async def test_the_next_job_is_at_the_end_of_the_list(self) -> None:
        counts = map(integer, range(6))
        await self.look(*counts, bulk(b"chatwoot.a.7.1"), array(bulk(b"1788264005123")), *NONE_WAITS)
        self.assertEqual(self.watch.last.next_since_ms, {"chatwoot": 1_788_264_005_123, "other": None})
        self.assertEqual(self.asked[7], [b"HMGET", b"bull:chatwoot:chatwoot.a.7.1", b"timestamp"])

    async def test_the_next_job_is_gone_meanwhile(self) -> None:
        counts = map(integer, range(6))
        await self.look(*counts, bulk(b"chatwoot.a.7.1"), array(NIL), *NONE_WAITS)
        self.assertIsNone(self.watch.last.next_since_ms["chatwoot"])

    async def test_a_job_without_a_time(self) -> None:
        await self.look(*map(integer, range(6)), bulk(b"\xff"), array(bulk(b"yesterday")), *NONE_WAITS)
        self.assertIsNone(self.watch.last.next_since_ms["chatwoot"])

    async def test_a_queue_that_cannot_be_asked(self) -> None:
        await self.look(_NOPERM, *NONE_WAITS)
        self.assertEqual(self.watch.last.jobs, {"chatwoot": None, "other": jobs(0)})
        self.assertEqual(self.watch.last.next_since_ms, {"other": None})

    async def test_a_next_job_that_cannot_be_asked_for(self) -> None:
        await self.look(*map(integer, range(6)), _NOPERM, *NONE_WAITS)
        self.assertEqual(self.watch.last.jobs["chatwoot"], jobs(0))
        self.assertEqual(self.watch.last.next_since_ms, {"other": None})

    async def test_without_a_connection_nothing_is_known(self) -> None:
        self.successResultOf(self.refresh())
        self.assertEqual((self.watch.last.jobs, self.watch.last.next_since_ms), (UNKNOWN, {}))

    async def test_a_connection_that_is_lost_meanwhile(self) -> None:
        await self.connect_both()
        refreshed = self.refresh()
        self.prober.hang_up()
        self.successResultOf(refreshed)
        self.assertEqual(self.watch.last.jobs, UNKNOWN)
        gc.collect()  # an unhandled failure would be logged now
        self.assertEqual(self.flushLoggedErrors(), [])

    async def test_no_answer_in_time(self) -> None:
        await self.connect_both()
        self.refresh()
        self.clock.advance(_DEADLINE_S)
        self.assertTrue(self.prober.is_aborted)
        self.assertFalse(self.writer.is_aborted)
        self.assertEqual(self.watch.last.jobs, UNKNOWN)


class RefreshTests(QueueCase):
    async def test_all_who_ask_at_once_share_a_look(self) -> None:
        await self.connect_both()
        refreshed = [self.refresh() for _ in range(3)]
        self.reply(*NONE_WAITS, *NONE_WAITS)
        for each in refreshed:
            self.successResultOf(each)
        self.assertEqual(len(self.asked), 14)

    async def test_a_look_is_good_for_two_seconds(self) -> None:
        await self.connect_both()
        self.refresh()
        self.reply(*NONE_WAITS, *NONE_WAITS)
        self.clock.advance(1.9)
        self.successResultOf(self.refresh())
        self.assertEqual(self.prober.commands(), [])
        self.clock.advance(0.1)
        self.refresh()
        self.prober.expect(b"LLEN")

    async def test_a_slow_redis_is_not_waited_for_and_the_last_look_is_dropped(self) -> None:
        await self.connect_both()
        self.refresh()
        self.reply(*NONE_WAITS, *NONE_WAITS)
        self.clock.advance(2)
        refreshed = self.refresh()
        self.assertEqual(self.watch.last.jobs["chatwoot"], jobs(0))
        self.clock.advance(_WAIT_S)
        self.successResultOf(refreshed)
        self.assertEqual(self.watch.last.jobs, UNKNOWN)
        self.reply(*map(integer, range(7, 13)), NIL, *NONE_WAITS)  # late, but new
        self.successResultOf(self.refresh())
        self.assertEqual(self.watch.last.jobs["chatwoot"], jobs(7))

    async def test_a_look_of_long_ago_is_not_shown(self) -> None:
        await self.connect_both()
        self.refresh()
        self.reply(*NONE_WAITS, *NONE_WAITS)
        self.clock.advance(5)
        self.assertEqual(self.watch.last.jobs["chatwoot"], jobs(0))
        self.clock.advance(0.1)
        self.assertEqual(self.watch.last.jobs, UNKNOWN)

    async def test_a_defect_is_logged_and_fails_no_caller(self) -> None:
        await self.connect_both()
        refreshed = self.refresh()
        self.reply(*map(integer, range(6)), integer(1))
        self.successResultOf(refreshed)
        self.assertEqual(self.watch.last.jobs, UNKNOWN)
        self.assertEqual(len(self.flushLoggedErrors(AttributeError)), 1)

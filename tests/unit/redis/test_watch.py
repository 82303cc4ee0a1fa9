"""What Redis says of itself: read from INFO, judged, and compared with what the last one said."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from typing import Any

from attrs import evolve
from twisted.internet.defer import ensureDeferred
from twisted.logger import LogLevel
from twisted.trial.unittest import SynchronousTestCase

from tests.support.redis_wire import NIL, Line, PoolCase, array, bulk, error, integer
from webhookd.bullmq.keys import QueueKeys
from webhookd.model import QueueUnavailable, RedisErrorKind
from webhookd.redis.watch import RedisWatch, ServerFacts

_DEADLINE_S = 0.5
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
    """An INFO reply of a Redis that is safe, but for some values."""
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
        self.watch = RedisWatch(keys, _DEADLINE_S, self.restarted)
        self.pool.on_ready(self.watch.connected)

    def restarted(self) -> None:
        self.restarts += 1

    async def connect_to(self, reply: bytes, fsync: bytes | None = None) -> Line:
        """A new connection whose server answers so to INFO and to CONFIG GET appendfsync."""
        line = await self.connect()
        line.expect(b"INFO")
        line.reply(reply)
        for command in line.commands():
            self.assertEqual(command, [b"CONFIG", b"GET", b"appendfsync"])
            line.reply(array(bulk(b"appendfsync"), bulk(b"everysec")) if fsync is None else fsync)
        return line

    async def meet(self, *servers: Mapping[str, str]) -> None:
        """Connect to one server after the other."""
        for values in servers:
            self.start_pool()
            self.pool.on_ready(self.watch.connected)
            await self.connect_to(bulk(info(**values)))

    def describe(self) -> Any:
        return self.successResultOf(ensureDeferred(self.watch.describe(self.pool)))


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

    async def test_a_server_that_does_not_tell_how_it_syncs(self) -> None:
        for reply in _NOPERM, error("ERR unknown command 'CONFIG'"), array():
            self.start_pool()
            self.pool.on_ready(self.watch.connected)
            await self.connect_to(bulk(info()), fsync=reply)
            self.assertEqual(self.watch.facts, evolve(_SAFE, appendfsync=None))
            self.assertIsNotNone(self.pool.writer)
        self.assertEqual(len(self.log.at(LogLevel.warn)), 1)  # once: nothing changed
        self.assertEqual(self.describe()["safety"], "unknown")

    async def test_a_server_that_tells_nothing(self) -> None:
        await self.connect_to(_NOPERM)
        self.assertEqual(self.watch.facts, ServerFacts())
        self.assertEqual(self.describe()["safety"], "unknown")
        self.assertEqual(len(self.log.at(LogLevel.warn)), 1)

    async def test_a_server_that_is_gone_before_it_tells(self) -> None:
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

    async def test_a_server_that_does_not_tell_may_be_another_each_time(self) -> None:
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

    async def test_elsewhere_it_is_none(self) -> None:
        await self.connect_to(bulk(info()))
        self.assertEqual(self.log.at(LogLevel.error), [])


class HashTagTests(WatchCase):
    prefix = "{bull}"

    async def test_a_prefix_with_one_is_right(self) -> None:
        await self.connect_to(bulk(info(cluster_enabled="1")))
        self.assertEqual(self.log.at(LogLevel.error), [])


class CountTests(WatchCase):
    queues = ("chatwoot", "other")

    async def test_the_jobs_of_each_queue(self) -> None:
        writer = await self.connect_to(bulk(info()))
        prober = await self.connect_to(bulk(info()))
        counting = ensureDeferred(self.watch.count_jobs(self.pool))
        asked = []
        for number in range(12):
            (command,) = prober.commands()
            asked.append(command)
            prober.reply(integer(number))
        self.assertEqual(
            self.successResultOf(counting),
            {
                "chatwoot": {
                    "waiting": 0,
                    "paused": 1,
                    "delayed": 2,
                    "prioritized": 3,
                    "active": 4,
                    "failed": 5,
                },
                "other": {
                    "waiting": 6,
                    "paused": 7,
                    "delayed": 8,
                    "prioritized": 9,
                    "active": 10,
                    "failed": 11,
                },
            },
        )
        self.assertEqual(
            asked[:6],
            [
                [b"LLEN", b"bull:chatwoot:wait"],
                [b"LLEN", b"bull:chatwoot:paused"],
                [b"ZCARD", b"bull:chatwoot:delayed"],
                [b"ZCARD", b"bull:chatwoot:prioritized"],
                [b"LLEN", b"bull:chatwoot:active"],
                [b"ZCARD", b"bull:chatwoot:failed"],
            ],
        )
        self.assertEqual(writer.commands(), [])  # it is for the jobs

    async def test_without_a_connection_nothing_is_known(self) -> None:
        counting = ensureDeferred(self.watch.count_jobs(self.pool))
        self.assertEqual(self.successResultOf(counting), {"chatwoot": None, "other": None})

    async def test_a_connection_that_is_lost_meanwhile(self) -> None:
        line = await self.connect_to(bulk(info()))
        counting = ensureDeferred(self.watch.count_jobs(self.pool))
        line.hang_up()
        self.assertEqual(self.successResultOf(counting), {"chatwoot": None, "other": None})
        gc.collect()  # a failure that nobody looks at would be logged now
        self.assertEqual(self.flushLoggedErrors(), [])

    async def test_no_answer_in_time(self) -> None:
        writer = await self.connect_to(bulk(info()))
        line = await self.connect_to(bulk(info()))
        counting = ensureDeferred(self.watch.count_jobs(self.pool))
        self.clock.advance(_DEADLINE_S)
        self.clock.advance(_DEADLINE_S)
        self.assertEqual(self.successResultOf(counting), {"chatwoot": None, "other": None})
        self.assertTrue(line.is_aborted)
        self.assertFalse(writer.is_aborted)

    async def test_an_error(self) -> None:
        line = await self.connect_to(bulk(info()))
        counting = ensureDeferred(self.watch.count_jobs(self.pool))
        line.reply(_NOPERM)
        line.reply(_NOPERM)
        self.assertEqual(self.successResultOf(counting), {"chatwoot": None, "other": None})


class WaitingTests(WatchCase):
    async def ask(self, *replies: bytes) -> tuple[Any, list[Sequence[bytes]]]:
        """What is found where the queue's Redis answers so, and the commands that it got."""
        await self.connect_to(bulk(info()))
        prober = await self.connect_to(bulk(info()))
        asking = ensureDeferred(self.watch.waiting_since(self.pool))
        asked = []
        for reply in replies:
            asked += prober.commands()
            prober.reply(reply)
        return self.successResultOf(asking), asked

    async def test_the_next_job_is_at_the_end_of_the_list(self) -> None:
        found, asked = await self.ask(bulk(b"chatwoot.a.7.1"), array(bulk(b"1788264005123")))
        self.assertEqual(found, {"chatwoot": 1_788_264_005_123})
        self.assertEqual(
            asked,
            [
                [b"LINDEX", b"bull:chatwoot:wait", b"-1"],
                [b"HMGET", b"bull:chatwoot:chatwoot.a.7.1", b"timestamp"],
            ],
        )

    async def test_nothing_waits(self) -> None:
        found, _ = await self.ask(NIL)
        self.assertEqual(found, {"chatwoot": None})

    async def test_the_job_is_gone_meanwhile(self) -> None:
        found, _ = await self.ask(bulk(b"chatwoot.a.7.1"), array(NIL))
        self.assertEqual(found, {"chatwoot": None})

    async def test_a_job_of_somebody_else_without_a_time(self) -> None:
        found, _ = await self.ask(bulk(b"\xff"), array(bulk(b"yesterday")))
        self.assertEqual(found, {"chatwoot": None})

    async def test_a_queue_that_cannot_be_asked_is_left_out(self) -> None:
        found, _ = await self.ask(_NOPERM)
        self.assertEqual(found, {})

    async def test_without_a_connection_all_are(self) -> None:
        asking = ensureDeferred(self.watch.waiting_since(self.pool))
        self.assertEqual(self.successResultOf(asking), {})

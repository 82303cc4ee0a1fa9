"""One connection, over a transport in memory: what makes it ready, and when it is given up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import txredisapi
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import ensureDeferred
from twisted.internet.testing import StringTransport
from twisted.logger import LogLevel
from twisted.trial.unittest import SynchronousTestCase

from tests.support.redis_wire import (
    PONG,
    Line,
    PoolCase,
    bulk,
    error,
    turn,
    until_attempts,
)
from webhookd.model import QueueUnavailable, RedisErrorKind
from webhookd.redis.connection import RedisConnection, error_kind, unavailable
from webhookd.redis.pool import RedisEndpoint
from webhookd.redis.url import RedisUrl


def sent(protocol: Any, command: Sequence[bytes | str | int]) -> bytes:
    """Return what a ready connection sends for one command."""
    protocol.transport = StringTransport()
    protocol.connected = 1
    protocol.execute_command(*command)
    written: bytes = protocol.transport.value()
    return written


class ErrorKindTests(SynchronousTestCase):
    def test_an_error_reply_is_known_by_its_first_word(self) -> None:
        for message, kind in {
            "READONLY You can't write against a read only replica.": RedisErrorKind.READONLY,
            "UNBLOCKED force unblock from blocking operation": RedisErrorKind.READONLY,
            "LOADING Redis is loading the dataset in memory": RedisErrorKind.LOADING,
            "MASTERDOWN Link with MASTER is down": RedisErrorKind.MASTERDOWN,
            "NOREPLICAS Not enough good replicas to write.": RedisErrorKind.NOREPLICAS,
            "OOM command not allowed when used memory > 'maxmemory'.": RedisErrorKind.OOM,
            "MISCONF Errors writing to the AOF file": RedisErrorKind.MISCONF,
            "BUSY Redis is busy running a script.": RedisErrorKind.BUSY,
            "NOAUTH Authentication required.": RedisErrorKind.NOAUTH,
            "WRONGPASS invalid username-password pair": RedisErrorKind.NOAUTH,
            "NOPERM this user has no permissions": RedisErrorKind.NOPERM,
            "CLUSTERDOWN The cluster is down": RedisErrorKind.CLUSTER,
            "CROSSSLOT Keys in request don't hash to the same slot": RedisErrorKind.CLUSTER,
            "MOVED 3999 127.0.0.1:6381": RedisErrorKind.CLUSTER,
            "ASK 3999 127.0.0.1:6381": RedisErrorKind.CLUSTER,
            "TRYAGAIN Multiple keys request during rehashing of slot": RedisErrorKind.CLUSTER,
            "WRONGTYPE Operation against a key": RedisErrorKind.WRONGTYPE,
            "ERR unknown command": RedisErrorKind.OTHER,
            "BUSYKEY Target key name already exists.": RedisErrorKind.OTHER,
            "": RedisErrorKind.OTHER,
        }.items():
            self.assertIs(error_kind(message), kind, message)

    def test_who_asks_the_wrong_server_of_a_cluster_is_told_which_one_to_name(self) -> None:
        reason = unavailable(txredisapi.ResponseError("MOVED 3999 10.0.0.2:6381"))
        self.assertIs(reason.kind, RedisErrorKind.CLUSTER)
        self.assertTrue(str(reason).startswith("MOVED 3999 10.0.0.2:6381: that server has"))


class CommandTests(SynchronousTestCase):
    @given(st.lists(st.one_of(st.binary(), st.text(), st.integers()), min_size=1))
    def test_the_bytes_are_those_of_txredisapi(self, command: list[bytes | str | int]) -> None:
        plain = txredisapi.RedisProtocol(charset=None)
        self.assertEqual(sent(RedisConnection(charset=None), command), sent(plain, command))


class HandshakeTests(PoolCase):
    async def assert_refused(self, line: Line, kind: RedisErrorKind) -> None:
        await turn()
        self.assertTrue(line.is_aborted)
        self.assertIsNone(self.pool.writer)
        assert self.pool.last_error is not None
        self.assertIs(self.pool.last_error.kind, kind)

    async def test_a_ping_makes_sure_that_somebody_is_there(self) -> None:
        line = self.network.accept()
        await turn()
        self.assertIsNone(self.pool.writer)
        self.assertEqual(line.shake_hands(), [[b"PING"]])
        await turn()
        self.assertIsNotNone(self.pool.writer)

    async def test_a_user_who_may_not_ping_has_got_an_answer(self) -> None:
        await self.connect(PING=error("NOPERM this user has no permissions to run the 'ping' command"))
        self.assertIsNotNone(self.pool.writer)
        self.assertIsNone(self.pool.last_error)

    async def test_a_server_that_cannot_serve_yet_is_not_ready(self) -> None:
        for reply, kind in {
            "LOADING Redis is loading the dataset in memory": RedisErrorKind.LOADING,
            "MASTERDOWN Link with MASTER is down": RedisErrorKind.MASTERDOWN,
            "NOAUTH Authentication required.": RedisErrorKind.NOAUTH,
            "BUSY Redis is busy running a script.": RedisErrorKind.BUSY,
            "ERR what": RedisErrorKind.OTHER,
        }.items():
            self.start_pool()
            line = self.network.accept()
            line.shake_hands(PING=error(reply))
            await self.assert_refused(line, kind)

    async def test_a_server_that_says_nothing_is_given_up(self) -> None:
        """The kernel accepts for a server that is stopped, and for one that hangs."""
        line = self.network.accept()
        self.clock.advance(1.9)
        self.assertFalse(line.is_aborted)
        self.clock.advance(0.1)
        await self.assert_refused(line, RedisErrorKind.TIMEOUT)

    async def test_a_server_that_hangs_up(self) -> None:
        line = self.network.accept()
        line.hang_up()
        await self.assert_refused(line, RedisErrorKind.DISCONNECTED)

    async def test_a_handshake_that_is_done_has_no_deadline(self) -> None:
        line = await self.connect()
        self.clock.advance(10)
        self.assertFalse(line.is_aborted)
        self.assertIsNotNone(self.pool.writer)

    async def test_a_connection_that_dies_before_its_turn_is_never_used(self) -> None:
        heard: list[object] = []
        self.pool.on_ready(heard.append)
        line = self.network.accept()
        line.shake_hands()
        line.hang_up()
        await turn()
        self.assertIsNone(self.pool.writer)
        self.assertEqual(heard, [])

    async def test_nobody_may_connect(self) -> None:
        self.network.refuse()
        assert self.pool.last_error is not None
        self.assertIs(self.pool.last_error.kind, RedisErrorKind.DISCONNECTED)
        self.assertIn("no", str(self.pool.last_error))


class PasswordTests(PoolCase):
    url = "redis://:s3cret@redis:6380/5"

    async def test_it_is_sent_and_the_database_chosen(self) -> None:
        self.assertEqual(self.network.where(), 6380)
        line = self.network.accept()
        self.assertEqual(line.shake_hands(), [[b"AUTH", b"s3cret"], [b"SELECT", b"5"], [b"PING"]])
        await turn()
        self.assertIsNotNone(self.pool.writer)

    async def test_each_step_can_fail(self) -> None:
        for answers, kind in (
            ({"AUTH": error("WRONGPASS invalid username-password pair")}, RedisErrorKind.NOAUTH),
            ({"AUTH": error("ERR AUTH called without any password")}, RedisErrorKind.OTHER),
            ({"SELECT": error("ERR DB index is out of range")}, RedisErrorKind.OTHER),
            ({"SELECT": error("NOPERM no permissions to run 'select'")}, RedisErrorKind.NOPERM),
        ):
            self.start_pool()
            line = self.network.accept()
            came = line.shake_hands(**answers)
            self.assertEqual(came[-1][0].decode(), next(iter(answers)))
            self.assertTrue(line.is_aborted)
            assert self.pool.last_error is not None
            self.assertIs(self.pool.last_error.kind, kind)

    async def test_a_password_that_was_mended_is_found_out(self) -> None:
        """Txredisapi would stop for good after the first failed AUTH."""
        for _ in range(2):
            line = self.network.accept()
            line.shake_hands(AUTH=error("WRONGPASS invalid username-password pair"))
        self.clock.advance(0)
        await until_attempts(self.network, 2)
        await self.connect()
        self.assertIsNotNone(self.pool.writer)

    async def test_no_log_and_no_repr_shows_it(self) -> None:
        self.network.accept().shake_hands(AUTH=error("WRONGPASS invalid username-password pair"))
        self.network.accept().shake_hands(
            AUTH=error("ERR unknown command 'AUTH', with args beginning with: 's3cret'")
        )
        self.clock.advance(0)
        await until_attempts(self.network, 2)
        await self.connect()
        url = RedisUrl.parse(self.url)
        shown = [
            self.log.everything(),
            repr(self.pool),
            str(self.pool.last_error),
            repr(self.pool.last_error),
        ]
        for text in *shown, repr(RedisEndpoint(self.clock, url, self.pool.failed)), repr(url), str(url):
            self.assertNotIn("s3cret", text)
        self.assertEqual(len(self.log.at(LogLevel.warn)), 2)


class UserTests(PoolCase):
    url = "unix://webhookd:s3cret@/redis.sock?db=2"

    async def test_user_and_password_are_sent(self) -> None:
        self.assertEqual(self.network.where(), "/redis.sock")
        came = self.network.accept().shake_hands()
        self.assertEqual(came, [[b"AUTH", b"webhookd", b"s3cret"], [b"SELECT", b"2"], [b"PING"]])


class AnswerTests(PoolCase):
    async def test_an_answer_in_time(self) -> None:
        line = await self.connect()
        connection = self.pool.writer
        assert connection is not None
        answer = ensureDeferred(connection.within(1.0, connection.ping()))
        line.expect(b"PING")
        line.reply(PONG)
        self.assertEqual(self.successResultOf(answer), b"PONG")
        self.clock.advance(1)
        self.assertFalse(line.is_aborted)

    async def test_digits_stay_text_and_bytes_stay_bytes(self) -> None:
        """By default, txredisapi converts digits to numbers, and bytes to text."""
        line = await self.connect()
        assert self.pool.writer is not None
        for value in (b"007", b"1e3", b"\xff\x00"):
            answer = self.pool.writer.get("key")
            line.expect(b"GET")
            line.reply(bulk(value))
            self.assertEqual(self.successResultOf(answer), value)

    async def test_an_answer_that_comes_too_late(self) -> None:
        line = await self.connect()
        connection = self.pool.writer
        assert connection is not None
        answer = ensureDeferred(connection.within(1.0, connection.ping()))
        self.clock.advance(1)
        reason = self.failureResultOf(answer, QueueUnavailable).value
        self.assertEqual((reason.kind, reason.unknown), (RedisErrorKind.TIMEOUT, True))
        self.assertTrue(line.is_aborted)

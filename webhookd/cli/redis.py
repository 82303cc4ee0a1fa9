"""The daemon's Redis, for the length of one command."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from attrs import frozen
from twisted.internet.defer import Deferred
from twisted.internet.defer import TimeoutError as DeadlinePassed
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger, LogPublisher

from webhookd.cli.reactor import run
from webhookd.cli.terminal import Unreachable
from webhookd.config import Config
from webhookd.model import QueueUnavailable, RedisErrorKind
from webhookd.reactor import IReactor
from webhookd.redis import embedded
from webhookd.redis.connection import RedisConnection, unavailable
from webhookd.redis.pool import RedisPool
from webhookd.redis.url import RedisUrl

CONNECT_DEADLINE_S = 5.0
ANSWER_DEADLINE_S = 4.0
_T = TypeVar("_T")


@frozen
class RedisSession:
    """The daemon's own pool, for the length of one command."""

    pool: RedisPool
    clock: IReactorTime

    async def ready(self) -> RedisConnection:
        """Return a connection, once there is one; raises `QueueUnavailable`."""
        try:
            return await self.pool.when_ready().addTimeout(CONNECT_DEADLINE_S, self.clock)
        except DeadlinePassed:
            raise QueueUnavailable(RedisErrorKind.TIMEOUT, "no connection in time") from None

    async def ask(self, *command: str | bytes | int) -> Any:
        """Return the answer to one command; raises `QueueUnavailable`."""
        connection = await self.ready()
        try:
            return await connection.execute_command(*command).addTimeout(ANSWER_DEADLINE_S, self.clock)
        except Exception as error:
            reason = unavailable(error)
            if reason.unknown:
                connection.give_up()
            raise reason from error


@asynccontextmanager
async def connected(reactor: IReactor, url: RedisUrl) -> AsyncIterator[RedisSession]:
    """Connect to Redis while the block lasts; raises `QueueUnavailable`."""
    silent = Logger(observer=LogPublisher())  # the command itself reports why Redis does not answer
    session = RedisSession(RedisPool(reactor, url, silent), reactor)
    session.pool.startService()
    try:
        await session.ready()
        yield session
    finally:
        await session.pool.stopService()


def find_redis(settings: Config) -> RedisUrl | None:
    """Return the URL of Redis; None for an embedded server that does not run below this directory."""
    if not settings.redis.embedded:
        return settings.redis
    url = embedded.running_url(embedded.DIRECTORY)
    return None if url is None else RedisUrl.parse(url)


def ask_redis(settings: Config, question: Callable[[RedisSession], Coroutine[Deferred[Any], Any, _T]]) -> _T:
    """Run one question to Redis, and return its result; raises `Unreachable` if Redis does not answer."""
    url = find_redis(settings)
    if url is None:
        raise Unreachable(NOT_RUNNING)

    async def ask(reactor: IReactor) -> _T:
        async with connected(reactor, url) as redis:
            return await question(redis)

    try:
        return run(ask)
    except QueueUnavailable as error:
        hint = "; conf/redis-acl.conf has what it needs" if error.kind is RedisErrorKind.NOPERM else ""
        raise Unreachable(f"Redis at {url}: {describe(error)}{hint}") from None


NOT_RUNNING = (
    f"no embedded Redis runs in {embedded.DIRECTORY}: "
    "it runs with the daemon, and is found only from the daemon's working directory"
)


def describe(error: QueueUnavailable) -> str:
    """Return in one line what Redis answered, or why it did not."""
    return " ".join(str(error).split()) or error.kind.value

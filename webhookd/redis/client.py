"""All parts of one Redis: its connections, its breaker, and the two queues that add jobs through them."""

from __future__ import annotations

import random

from attrs import frozen
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger, LogLevel

from webhookd.reactor import IReactor
from webhookd.redis.breaker import BreakerPolicy, CircuitBreaker, State
from webhookd.redis.pool import RedisPool
from webhookd.redis.queue import RedisQueue
from webhookd.redis.recent import RecentJobs
from webhookd.redis.settings import QueueSettings
from webhookd.redis.url import RedisUrl

#: Seconds; below the time after which the breaker gives a probe up for lost.
DRAIN_DEADLINE_S = 4.0

_log = Logger()


@frozen
class Redis:
    """The parts of one Redis: ``live`` adds events that wait for an answer, ``draining`` those on disk."""

    pool: RedisPool
    breaker: CircuitBreaker
    recent: RecentJobs
    live: RedisQueue
    draining: RedisQueue
    clock: IReactorTime

    def retry_in_s(self) -> float:
        """Return the seconds until Redis may be called."""
        return self.breaker.retry_in_s(self.clock.seconds())

    def may_call(self) -> bool:
        """Return whether Redis may be called now."""
        breaker_permits = self.breaker.state is State.CLOSED or self.retry_in_s() == 0.0
        return breaker_permits and self.pool.writer is not None

    def why_not(self) -> str | None:
        """Return why Redis may not be called now; None if it may."""
        if self.may_call():
            return None
        reason = "it is not connected" if self.pool.last_error is None else str(self.pool.last_error)
        if self.breaker.state is not State.CLOSED:
            reason += f"; the breaker is {self.breaker.state.value}, next try in {self.retry_in_s():.1f} s"
        return f"Redis at {self.pool.url}: {reason}"


def connect(reactor: IReactor, url: RedisUrl, queue_settings: QueueSettings, deadline_s: float) -> Redis:
    """Return the parts of the Redis at ``url``; they connect once ``pool`` is started as a service.

    ``deadline_s`` is that of a call for live events.
    """
    pool = RedisPool(reactor, url)
    breaker = CircuitBreaker(BreakerPolicy(slow_call_s=deadline_s / 2), random.random, _log_change)
    recent = RecentJobs(reactor)
    live, draining = (
        RedisQueue(reactor, pool, breaker, queue_settings, deadline_s=each, acknowledged=recent.add)
        for each in (deadline_s, DRAIN_DEADLINE_S)
    )
    return Redis(pool, breaker, recent, live, draining, reactor)


def _log_change(old: State, new: State) -> None:
    level = LogLevel.warn if new is State.OPEN else LogLevel.info
    _log.emit(level, "the circuit breaker is {state}, and was {before}", state=new.value, before=old.value)

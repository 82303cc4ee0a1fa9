"""The command ``webhookd spool drain``: move waiting events to Redis now."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

import click
from twisted.internet.task import deferLater

from webhookd.cli.spool.common import amount, progress, some_replicas, spool_options, with_replicas
from webhookd.cli.spool.replicas import Replica, Replicas, Running, short_name
from webhookd.cli.terminal import Unreachable, json_option, print_json
from webhookd.config import Config
from webhookd.spool.requests import DrainState, GetTotals, Totals
from webhookd.spool.schema import Table

_POLL_INTERVAL_S = 0.2


@click.command()
@click.option(
    "--patience",
    type=click.FloatRange(0.1),
    default=15.0,
    metavar="SECONDS",
    help="Give up if no record has left for this long.",
)
@some_replicas
@json_option
@spool_options
def drain(settings: Config, wanted: str | None, *, patience: float, as_json: bool) -> None:
    """Move waiting events to Redis now.

    This uses the code of the daemon, so events that are already in Redis are not added again. A running
    daemon drains its spool itself; the command only makes it try at once.
    """
    found = with_replicas(settings, partial(_drain, settings=settings, wanted=wanted, patience_s=patience))
    if as_json:
        print_json(found)
    else:
        for replica, moved in found.items():
            click.echo(f"{replica}  {amount(moved, 'event')} moved, none left")


async def _drain(
    replicas: Replicas, *, settings: Config, wanted: str | None, patience_s: float
) -> dict[str, int]:
    moved = {}
    for path in replicas.paths(wanted):
        async with replicas.open(path) as replica:
            totals: Totals = await replica.ask(GetTotals())
            moved[short_name(path)] = 0
            if totals.records[Table.LIVE]:
                async with _draining(replicas, replica, settings) as state:
                    moved[short_name(path)] = await _wait_until_empty(replicas, replica, patience_s, state)
    return moved


@asynccontextmanager
async def _draining(
    replicas: Replicas, replica: Replica, settings: Config
) -> AsyncIterator[Callable[[], Awaitable[DrainState]]]:
    """Drain a replica's spool while the block lasts; yield a function that returns the state of the drain."""
    if isinstance(replica, Running):
        await replica.wake_drain()
        yield replica.drain_state
        return

    from webhookd.delivery import Drain
    from webhookd.redis.client import connect

    if settings.redis.embedded:
        raise Unreachable("the embedded Redis runs only with its daemon: start that, and it drains the spool")
    spool = replica.spool()
    await replica.ask(GetTotals())  # opens it
    redis = connect(replicas.reactor, settings.redis, settings.queue_settings, settings.redis_deadline_s)
    mover = Drain(replicas.reactor, spool, redis.draining, redis.retry_in_s)
    redis.pool.on_ready(lambda _connection: mover.wake())

    async def state() -> DrainState:
        return DrainState(os.getpid(), spool.stats.records, redis.why_not())

    redis.pool.startService()
    try:
        yield state
    finally:
        mover.stop()
        await redis.pool.stopService()


async def _wait_until_empty(
    replicas: Replicas, replica: Replica, patience_s: float, state: Callable[[], Awaitable[DrainState]]
) -> int:
    """Return the number of records that have left; raise `Unreachable` if no more do."""
    begin = lowest = (await state()).records
    moved_s = time.monotonic()
    with progress("draining", replica, begin) as advance:
        while True:
            now = await state()
            if now.records < lowest:
                advance(lowest - now.records)
                lowest, moved_s = now.records, time.monotonic()
            if not now.records:
                return begin
            if time.monotonic() - moved_s > patience_s:
                break
            await deferLater(replicas.reactor, _POLL_INTERVAL_S)
    reason = now.problem or f"none has left for {patience_s:g} s"
    raise Unreachable(f"{replica.path}: {amount(now.records, 'event')} left: {reason}")

"""The commands ``webhookd spool requeue-dead`` and ``purge``, which change a spool."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial

import click

from webhookd.cli.spool.common import amount, one_replica, progress, spool_options, with_replicas
from webhookd.cli.spool.replicas import Replica, Replicas, short_name
from webhookd.cli.terminal import Negative, WrongUse, json_option, print_json
from webhookd.config import Config
from webhookd.spool.requests import (
    MAX_SEQUENCE,
    PAGE,
    GetTotals,
    ListRecords,
    Purge,
    Requeue,
    StoredRecord,
    Totals,
)
from webhookd.spool.schema import Table


@click.command("requeue-dead")
@click.argument("numbers", metavar="[SEQUENCE]...", nargs=-1, type=click.IntRange(1, MAX_SEQUENCE))
@click.option("--all", "wants_all", is_flag=True, help="All dead letters.")
@one_replica
@json_option
@spool_options
def requeue_dead(
    settings: Config, numbers: Sequence[int], wanted: str | None, *, wants_all: bool, as_json: bool
) -> None:
    """Try dead letters again.

    They move to the end of the queue. First remove the obstacle in Redis.
    """
    if bool(numbers) == wants_all:
        raise WrongUse("give sequences, or --all")
    count = with_replicas(settings, partial(_requeue, wanted=wanted, numbers=numbers))
    if as_json:
        print_json({"requeued": count})
    else:
        click.echo(f"{amount(count, 'dead letter')} put at the end of the queue")
    if count < len(numbers):
        raise Negative(f"{len(numbers) - count} of them not found")


async def _requeue(replicas: Replicas, *, wanted: str | None, numbers: Sequence[int]) -> int:
    async with replicas.open(replicas.path(wanted)) as replica:
        if not numbers:
            totals: Totals = await replica.ask(GetTotals())
            return await _change_all(replica, totals, Table.DEAD, Requeue, "requeuing")
        pages = [list(numbers[at : at + PAGE]) for at in range(0, len(numbers), PAGE)]
        return sum([await replica.ask(Requeue(page)) for page in pages])


@click.command()
@click.option("--dead", "table", flag_value=Table.DEAD.value, help="The dead letters.")
@click.option("--corrupt", "table", flag_value=Table.CORRUPT.value, help="The damaged records.")
@click.option("--live", "table", flag_value=Table.LIVE.value, help="The waiting events: they are LOST.")
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@one_replica
@json_option
@spool_options
def purge(settings: Config, table: str | None, wanted: str | None, *, yes: bool, as_json: bool) -> None:
    """Delete records for good."""
    if table is None:
        raise WrongUse("give --dead, --corrupt or --live")
    count = with_replicas(settings, partial(_purge, wanted=wanted, table=Table(table), yes=yes))
    if as_json:
        print_json({"purged": count})
    else:
        click.echo(f"{amount(count, f'{table} record')} deleted")


async def _purge(replicas: Replicas, *, wanted: str | None, table: Table, yes: bool) -> int:
    async with replicas.open(replicas.path(wanted)) as replica:
        totals: Totals = await replica.ask(GetTotals())
        if totals.records[table] and not yes:
            _confirm(short_name(replica.path), table, totals.records[table])
        return await _change_all(replica, totals, table, partial(Purge, table), "deleting")


def _confirm(replica: str, table: Table, count: int) -> None:
    """Ask for confirmation; to delete waiting events, the operator must type the replica's name."""
    if not sys.stdin.isatty():
        raise WrongUse("not on a terminal: confirm with --yes")
    what = f"{amount(count, f'{table.value} record')} of replica {replica}"
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # Twisted's handler would wait for the answer
    try:
        if table is Table.LIVE:
            click.echo(f"{what} were acknowledged, and exist only here.")
            prompt = "Type the replica's name to delete them"
            is_meant = click.prompt(prompt, default="", show_default=False) == replica
        else:
            is_meant = click.confirm(f"Delete {what}?")
    finally:
        signal.signal(signal.SIGINT, before)
    if not is_meant:
        raise Negative("nothing was deleted")


async def _change_all(
    replica: Replica, totals: Totals, table: Table, change: Callable[[list[int]], Requeue | Purge], verb: str
) -> int:
    """Change the records that a table had at ``totals``, page by page; return their number."""
    changed = after = 0
    with progress(verb, replica, totals.records[table]) as advance:
        while after < totals.last[table]:
            records: list[StoredRecord] = await replica.ask(ListRecords(table, after))
            page = [record.sequence for record in records if record.sequence <= totals.last[table]]
            if not page:
                break
            changed += await replica.ask(change(page))
            advance(len(page))
            after = page[-1]
    return changed

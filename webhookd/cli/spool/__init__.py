"""``webhookd spool``: what waits on disk, and what to do about it."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

import click
import msgspec
from twisted.internet.task import deferLater

from webhookd.cli.reactor import run
from webhookd.cli.settings import configured
from webhookd.cli.spool.replicas import Replica, Replicas, Running, Stopped, Unreadable, short_name
from webhookd.cli.terminal import (
    Negative,
    Progress,
    Unreachable,
    WrongUse,
    duration,
    json_option,
    print_json,
    print_table,
)
from webhookd.clock import wall_clock_ms
from webhookd.config import Config
from webhookd.model import Job
from webhookd.reactor import IReactor
from webhookd.spool.database import CorruptRecord, SpoolLimits, decode_record
from webhookd.spool.directory import SpoolRoot
from webhookd.spool.queue import SpoolThread
from webhookd.spool.requests import (
    PAGE,
    CheckFile,
    DrainState,
    Holdings,
    ListRows,
    Look,
    Purge,
    ReadRows,
    Requeue,
    Row,
    Table,
)
from webhookd.text import printable

_T = TypeVar("_T")

_POLL_INTERVAL_S = 0.2
_CUT_OFF = "its WAL is damaged, and hides records until a daemon takes this spool"


@click.group()
def command() -> None:
    """See what waits on disk, and rescue it.

    Each replica has a directory of its own below the spool (--spool, WEBHOOK_SPOOL). It may run or not: a
    running one is asked, a stopped one is locked meanwhile. Give the same configuration that the replicas
    have; what is for another Redis, prefix or queue can be read, and not changed.
    """


_settings = configured("spool", "redis", "queue", "prefix")
_one = click.option(
    "--replica",
    "wanted",
    metavar="NAME",
    help="How the replica's name begins, or its directory.  [default: the only one]",
)
_some = click.option(
    "--replica",
    "wanted",
    metavar="NAME",
    help="How the replica's name begins, or its directory.  [default: all]",
)


def _with_replicas(settings: Config, work: Callable[[Replicas], Coroutine[Any, Any, _T]]) -> _T:
    """Run ``work`` with the reactor, and with the thread in which spools do theirs."""
    if settings.spool is None:
        raise WrongUse("the spool is off")
    root = SpoolRoot(Path(settings.spool).absolute(), settings.destination)
    limits = SpoolLimits(max_bytes=settings.spool_max_bytes)

    async def main(reactor: IReactor) -> _T:
        thread = SpoolThread(reactor)
        thread.start()
        try:
            return await work(Replicas(root, reactor, thread, limits))
        finally:
            thread.stop()

    return run(main)


# -- list ---------------------------------------------------------------------------------------------------


@command.command("list")
@click.argument("wanted", metavar="[REPLICA]", required=False)
@click.option("--dead", "table", flag_value=Table.DEAD.value, help="Its dead letters, and why.")
@click.option("--corrupt", "table", flag_value=Table.CORRUPT.value, help="Its damaged records.")
@click.option(
    "--limit", type=click.IntRange(1, PAGE), default=20, show_default=True, help="How many records."
)
@click.option("--after", type=click.IntRange(0), default=0, help="Go on behind this sequence.")
@json_option
@_settings
def list_command(
    settings: Config, wanted: str | None, table: str | None, limit: int, after: int, *, as_json: bool
) -> None:
    """List the replicas, or the records of one.

    The oldest records come first; what is in them is not shown.
    """
    if wanted is None and table is None:
        _with_replicas(settings, partial(_list_replicas, as_json=as_json))
    else:
        request = ListRows(Table(table or "live"), after, limit)
        _with_replicas(settings, partial(_list_rows, wanted=wanted, request=request, as_json=as_json))


async def _list_replicas(replicas: Replicas, *, as_json: bool) -> None:
    found = [await _describe(replicas, path) for path in replicas.paths()]
    if as_json:
        print_json(found)
    elif not found:
        click.echo(f"{replicas.root.path}: no replica has a spool here")
    else:
        click.echo(f"{replicas.root.path}\n")
        headings = ("REPLICA", "STATE", "RECORDS", "SIZE", "OLDEST", "DEAD", "CORRUPT")
        print_table(headings, [_replica_cells(one) for one in found], numbers=range(2, len(headings)))
    problems = [one["problem"] for one in found if "problem" in one]
    if problems:
        raise Unreachable("; ".join(problems))


async def _describe(replicas: Replicas, path: Path) -> dict[str, Any]:
    description: dict[str, Any] = {"replica": short_name(path), "path": str(path)}
    try:
        async with replicas.open(path) as replica:
            holdings: Holdings = await replica.ask(Look())
            is_ours = replicas.root.is_ours(path)
    except Unreachable as error:
        return {**description, "state": "unreadable", "problem": error.message}
    oldest = holdings.oldest_received_at_ms
    return {
        **description,
        "state": "stopped" if replica.pid is None else "running",
        "pid": replica.pid,
        "foreign": not is_ours,
        "records": holdings.records,
        "bytes": holdings.bytes,
        "oldestAgeSeconds": None if oldest is None else _age_s(oldest),
        "dead": holdings.dead,
        "corrupt": holdings.corrupt,
    }


def _replica_cells(one: dict[str, Any]) -> Sequence[str]:
    if "problem" in one:
        return (one["replica"], one["state"], *"-----")
    state = f"pid {one['pid']}" if one["pid"] else one["state"]
    age_s = one["oldestAgeSeconds"]
    return (
        one["replica"],
        f"{state}, foreign" if one["foreign"] else state,
        f"{one['records']:,}",
        _size(one["bytes"]),
        "-" if age_s is None else duration(age_s),
        f"{one['dead']:,}",
        f"{one['corrupt']:,}",
    )


async def _list_rows(replicas: Replicas, *, wanted: str | None, request: ListRows, as_json: bool) -> None:
    async with replicas.open(replicas.path(wanted)) as replica:
        holdings: Holdings = await replica.ask(Look())
        rows: list[Row] = await replica.ask(request)
    if as_json:
        print_json([_facts(row) for row in rows])
        return
    if rows:
        lines = [line for row in rows for line in _row_lines(row)]
        print_table(("SEQUENCE", "SIZE", "AGE", "JOB ID"), lines, numbers=range(3))
    total = holdings.count(request.table)
    more = rows and rows[-1].sequence < holdings.last[request.table]
    click.echo(
        f"{len(rows):,} of {total:,} {request.table.value} records"
        + (f"; the next ones: --after {rows[-1].sequence}" if more else "")
    )


def _row_lines(row: Row) -> Iterator[Sequence[str]]:
    """The line of a record, and one below it for why it was set aside."""
    age = duration(_age_s(row.received_at_ms))
    yield (str(row.sequence), _size(row.size_bytes), age, printable(row.job_id))
    if row.reason is not None:
        yield ("", "", "", f"  {printable(row.reason)}")


def _facts(row: Row) -> dict[str, Any]:
    """A record for programs; its content is not among it."""
    facts = msgspec.to_builtins(row)
    del facts["record"]
    return facts  # type: ignore[no-any-return]  # a dict: it was a struct


# -- show ---------------------------------------------------------------------------------------------------


@command.command()
@click.argument("sequence", type=click.IntRange(1))
@click.option("--data", "wants_data", is_flag=True, help="The job's data alone: what somebody wrote.")
@_one
@json_option
@_settings
def show(settings: Config, sequence: int, wanted: str | None, *, wants_data: bool, as_json: bool) -> None:
    """Show what one record is, or its data."""
    table, row = _with_replicas(settings, partial(_find, wanted=wanted, sequence=sequence))
    try:
        job = decode_record(row.record)
    except CorruptRecord as error:
        job, checksum = None, str(error)
    else:
        checksum = "ok"
    if wants_data:
        if job is None:
            raise Negative(f"record {sequence} is damaged: {checksum}")
        click.echo(job.data)
        return
    facts = {"table": table.value, **_facts(row), "checksum": checksum}
    if job is not None:
        facts |= {"event": job.name, "options": json.loads(job.options), "data_bytes": len(job.data)}
    if as_json:
        print_json(facts)
    else:
        _print_facts(facts)


async def _find(replicas: Replicas, *, wanted: str | None, sequence: int) -> tuple[Table, Row]:
    async with replicas.open(replicas.path(wanted)) as replica:
        for table in Table:
            rows: list[Row] = await replica.ask(ReadRows(table, sequence - 1, 1))
            if rows and rows[0].sequence == sequence:
                return table, rows[0]
    raise Negative(f"{replica.path}: there is no record {sequence}")


def _print_facts(facts: dict[str, Any]) -> None:
    for name, value in facts.items():
        if value is None:
            continue
        text = json.dumps(value) if isinstance(value, dict) else printable(str(value))
        if name.endswith("_ms"):
            text = f"{time.strftime('%F %T', time.gmtime(value / 1000))} UTC, {duration(_age_s(value))} ago"
        elif name.endswith("_bytes"):
            text = _size(value)
        heading = name.removesuffix("_ms").removesuffix("_bytes").replace("_", " ")
        click.echo(f"{click.style(f'{heading:<14}', bold=True)}{text}")


# -- export and verify --------------------------------------------------------------------------------------


@command.command()
@click.option(
    "--only", type=click.Choice(["live", "dead"]), help="Events that wait, or dead letters.  [default: both]"
)
@click.option(
    "--output", type=click.Path(), help="A new file, for its owner alone.  [default: standard output]"
)
@_some
@_settings
def export(settings: Config, only: str | None, output: str | None, wanted: str | None) -> None:
    """Write the events as lines of JSON.

    For when all else fails. They stay where they are. Each line has what BullMQ's queue.add() needs (queue,
    name, data, opts), and the job's id: whoever adds it under that id adds it once. The lines hold what
    people wrote.
    """
    tables = [Table(only)] if only else [Table.LIVE, Table.DEAD]
    try:
        with nullcontext(sys.stdout.buffer) if output is None else _created(output) as out:
            done, damaged = _with_replicas(settings, partial(_export, wanted=wanted, tables=tables, out=out))
            out.flush()
    except BrokenPipeError:
        raise  # click's own: whoever reads has seen enough
    except OSError as error:
        raise Unreachable(f"{output or 'standard output'}: cannot write: {error.strerror}") from None
    click.echo(f"{_amount(done, 'event')} exported", err=True)
    if damaged:
        raise Negative(f"{_amount(damaged, 'record')} could not be read: see `webhookd spool verify`")


@contextmanager
def _created(path: str) -> Iterator[IO[bytes]]:
    """A new file that is on disk in the end; where nothing comes to be in it, there is none."""
    try:
        file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")
    except OSError as error:
        raise WrongUse(f"{path}: {error.strerror}") from None
    try:
        with file:
            yield file
            os.fsync(file.fileno())
    except BaseException:
        if not Path(path).stat().st_size:
            Path(path).unlink()
        raise


async def _export(
    replicas: Replicas, *, wanted: str | None, tables: Sequence[Table], out: IO[bytes]
) -> tuple[int, int]:
    done = damaged = 0
    for path in replicas.paths(wanted):
        async with replicas.open(path) as replica:
            if await replica.is_cut_off():
                click.echo(f"{path}: {_CUT_OFF}", err=True)
                damaged += 1
            async for _table, row in _read_all(replica, tables, "exporting"):
                try:
                    line = _export_line(decode_record(row.record), row)
                except CorruptRecord:
                    damaged += 1
                    continue
                out.write(line)
                done += 1
    return done, damaged


def _export_line(job: Job, row: Row) -> bytes:
    """A job as one line of JSON: its data may be written over several."""
    try:
        data, options = (
            msgspec.Raw(msgspec.json.format(text, indent=-1)) for text in (job.data, job.options)
        )
    except msgspec.DecodeError as error:
        raise CorruptRecord(str(error)) from error
    line = {
        "queue": job.queue,
        "id": job.id,
        "name": job.name,
        "data": data,
        "opts": options,
        "timestamp": job.timestamp_ms,
    }
    if row.reason is not None:
        line["reason"] = row.reason
    return msgspec.json.encode(line) + b"\n"


@command.command()
@_some
@json_option
@_settings
def verify(settings: Config, wanted: str | None, *, as_json: bool) -> None:
    """Read every record, and check it.

    The structure of the file is checked, too; nothing is changed.
    """
    found = _with_replicas(settings, partial(_verify, wanted=wanted))
    if as_json:
        print_json(found)
    else:
        for one in found:
            _print_verdict(one)
    damaged = sum(bool(one["problems"]) for one in found)
    if damaged:
        raise Negative(f"{damaged} of {_amount(len(found), 'spool')} damaged")


async def _verify(replicas: Replicas, *, wanted: str | None) -> Sequence[dict[str, Any]]:
    return [await _verify_one(replicas, path) for path in replicas.paths(wanted)]


async def _verify_one(replicas: Replicas, path: Path) -> dict[str, Any]:
    counts = dict.fromkeys(Table, 0)
    problems = [f"{name} is a damaged file that was kept" for name in _evidence(path)]
    async with replicas.open(path) as replica:
        if await replica.is_cut_off():
            problems.append(_CUT_OFF)
        try:
            structure: list[str] | None = await replica.ask(CheckFile(full=replica.pid is None))
            problems += [f"the file's structure: {text}" for text in structure or ()]
            async for table, row in _read_all(replica, list(Table), "verifying"):
                counts[table] += 1
                problem = _problem(table, row)
                if problem is not None:
                    problems.append(f"{table.value} record {row.sequence}: {problem}")
        except Unreadable as error:
            structure = []
            problems.append(error.message)
    return {
        "replica": short_name(path),
        **{table.value: count for table, count in counts.items()},
        "structure": "not checked" if structure is None else "checked",
        "problems": problems,
    }


def _evidence(path: Path) -> Sequence[str]:
    return sorted(kept.name for kept in path.glob("*.corrupt-*"))


def _problem(table: Table, row: Row) -> str | None:
    if table is Table.CORRUPT:
        return f"set aside: {row.reason}"
    try:
        job = decode_record(row.record)
    except CorruptRecord as error:
        return str(error)
    return None if (job.queue, job.id) == (row.queue, row.job_id) else "its row names another job"


def _print_verdict(one: dict[str, Any]) -> None:
    good = not one["problems"]
    word = click.style("ok", fg="green") if good else click.style("damaged", fg="red")
    click.echo(
        f"{one['replica']}  {one['live']:,} live, {one['dead']:,} dead, {one['corrupt']:,} corrupt: {word}"
    )
    if one["structure"] == "not checked":
        click.echo("  the file's structure is not checked while events may come: it is too large for that")
    for problem in one["problems"]:
        click.echo(f"  {printable(problem)}")


async def _read_all(replica: Replica, tables: Sequence[Table], verb: str) -> AsyncIterator[tuple[Table, Row]]:
    """Every record that is there now, page by page; what comes meanwhile is not waited for."""
    holdings: Holdings = await replica.ask(Look())
    with _progress(verb, replica, sum(map(holdings.count, tables))) as advance:
        for table in tables:
            after, last = 0, holdings.last[table]
            while after < last:
                rows: list[Row] = await replica.ask(ReadRows(table, after))
                for row in rows:
                    yield table, row
                advance(len(rows))
                after = rows[-1].sequence if rows else last


# -- drain --------------------------------------------------------------------------------------------------


@command.command()
@click.option(
    "--patience",
    type=click.FloatRange(0.1),
    default=15.0,
    show_default=True,
    metavar="SECONDS",
    help="Give up when no record has left for so long.",
)
@_some
@json_option
@_settings
def drain(settings: Config, wanted: str | None, *, patience: float, as_json: bool) -> None:
    """Move what waits to Redis, now.

    It goes the daemon's own way, so what is in Redis already is not added again. A running daemon does it
    itself, and is only told not to wait for its next attempt.
    """
    found = _with_replicas(settings, partial(_drain, settings=settings, wanted=wanted, patience_s=patience))
    if as_json:
        print_json(found)
    else:
        for replica, moved in found.items():
            click.echo(f"{replica}  {_amount(moved, 'event')} moved, none waits")


async def _drain(
    replicas: Replicas, *, settings: Config, wanted: str | None, patience_s: float
) -> dict[str, int]:
    moved = {}
    for path in replicas.paths(wanted):
        async with replicas.open(path) as replica:
            wait = partial(_wait_until_empty, replicas, replica, patience_s)
            if isinstance(replica, Running):
                await replica.wake_drain()
                moved[short_name(path)] = await wait(replica.drain_state)
            else:
                moved[short_name(path)] = await _drain_stopped(replicas, replica, settings, wait)
    return moved


async def _drain_stopped(
    replicas: Replicas,
    replica: Stopped,
    settings: Config,
    wait: Callable[[Callable[[], Awaitable[DrainState]]], Coroutine[Any, Any, int]],
) -> int:
    from webhookd.delivery import Drain
    from webhookd.redis.client import connect

    holdings: Holdings = await replica.ask(Look())
    if not holdings.records:
        return 0
    if settings.redis.embedded:
        raise Unreachable("the embedded Redis runs with its daemon only: start that, and it drains the spool")
    spool = replica.spool()
    await replica.ask(Look())  # opens it
    redis = connect(replicas.reactor, settings.redis, settings.queue_settings, settings.redis_deadline_s)
    mover = Drain(replicas.reactor, spool, redis.draining, redis.retry_in_s)
    redis.pool.on_ready(lambda _connection: mover.wake())

    async def state() -> DrainState:
        return DrainState(os.getpid(), spool.stats.records, redis.why_not())

    redis.pool.startService()
    try:
        return await wait(state)
    finally:
        mover.stop()
        await redis.pool.stopService()


async def _wait_until_empty(
    replicas: Replicas, replica: Replica, patience_s: float, state: Callable[[], Awaitable[DrainState]]
) -> int:
    """How many records have left; raises `Unreachable` once none does any more."""
    begin = lowest = (await state()).records
    moved_s = time.monotonic()
    with _progress("draining", replica, begin) as advance:
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
    raise Unreachable(f"{replica.path}: {_amount(now.records, 'event')} left: {reason}")


# -- requeue-dead and purge ---------------------------------------------------------------------------------


@command.command("requeue-dead")
@click.argument("numbers", metavar="[SEQUENCE]...", nargs=-1, type=click.IntRange(1))
@click.option("--all", "wants_all", is_flag=True, help="All that there are now.")
@_one
@json_option
@_settings
def requeue_dead(
    settings: Config, numbers: Sequence[int], wanted: str | None, *, wants_all: bool, as_json: bool
) -> None:
    """Have dead letters tried again.

    They go to the end of the queue. Remove first what was in their way in Redis.
    """
    if bool(numbers) == wants_all:
        raise WrongUse("say which: their sequences, or --all")
    count = _with_replicas(settings, partial(_requeue, wanted=wanted, numbers=numbers))
    if as_json:
        print_json({"requeued": count})
    else:
        click.echo(f"{_amount(count, 'dead letter')} put at the end of the queue")
    if count < len(numbers):
        raise Negative(f"{len(numbers) - count} of them were not there")


async def _requeue(replicas: Replicas, *, wanted: str | None, numbers: Sequence[int]) -> int:
    async with replicas.open(replicas.path(wanted)) as replica:
        if not numbers:
            holdings: Holdings = await replica.ask(Look())
            return await _change_all(replica, holdings, Table.DEAD, Requeue, "requeuing")
        pages = [list(numbers[at : at + PAGE]) for at in range(0, len(numbers), PAGE)]
        return sum([await replica.ask(Requeue(page)) for page in pages])


@command.command()
@click.option("--dead", "table", flag_value=Table.DEAD.value, help="The dead letters.")
@click.option("--corrupt", "table", flag_value=Table.CORRUPT.value, help="The damaged records.")
@click.option("--live", "table", flag_value=Table.LIVE.value, help="The events that wait: they are LOST.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_one
@json_option
@_settings
def purge(settings: Config, table: str | None, wanted: str | None, *, yes: bool, as_json: bool) -> None:
    """Delete records for good."""
    if table is None:
        raise WrongUse("say what: --dead, --corrupt or --live")
    count = _with_replicas(settings, partial(_purge, wanted=wanted, table=Table(table), yes=yes))
    if as_json:
        print_json({"purged": count})
    else:
        click.echo(f"{_amount(count, f'{table} record')} deleted")


async def _purge(replicas: Replicas, *, wanted: str | None, table: Table, yes: bool) -> int:
    async with replicas.open(replicas.path(wanted)) as replica:
        holdings: Holdings = await replica.ask(Look())
        count = holdings.count(table)
        if count and not yes:
            _confirm(short_name(replica.path), table, count)
        return await _change_all(replica, holdings, table, partial(Purge, table), "deleting")


def _confirm(replica: str, table: Table, count: int) -> None:
    """Ask whether it is meant; what waits is deleted by whoever types the replica's name."""
    if not sys.stdin.isatty():
        raise WrongUse("nobody can be asked here: say --yes if it is meant")
    what = f"{_amount(count, f'{table.value} record')} of replica {replica}"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # Twisted's would wait for an answer
    try:
        if table is Table.LIVE:
            click.echo(f"{what} were acknowledged, and are nowhere else.")
            is_meant = (
                click.prompt("Type the replica's name to delete them", default="", show_default=False)
                == replica
            )
        else:
            is_meant = click.confirm(f"Delete {what}?")
    finally:
        signal.signal(signal.SIGINT, before)
    if not is_meant:
        raise Negative("nothing was deleted")


async def _change_all(
    replica: Replica,
    holdings: Holdings,
    table: Table,
    change: Callable[[list[int]], Requeue | Purge],
    verb: str,
) -> int:
    """Change all records that a table had, page by page; not those that have come since."""
    changed = after = 0
    with _progress(verb, replica, holdings.count(table)) as advance:
        while after < holdings.last[table]:
            rows: list[Row] = await replica.ask(ListRows(table, after))
            page = [row.sequence for row in rows if row.sequence <= holdings.last[table]]
            if not page:
                break
            changed += await replica.ask(change(page))
            advance(len(page))
            after = page[-1]
    return changed


# -- how it looks -------------------------------------------------------------------------------------------


@contextmanager
def _progress(verb: str, replica: Replica, length: int) -> Iterator[Callable[[int], None]]:
    """A progress bar; it gets how much was done since."""
    bar, done = Progress(f"{verb} {short_name(replica.path)[:8]}", length, time.monotonic), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        bar.show(done)

    try:
        yield advance
    finally:
        bar.end(done)


def _amount(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def _size(size_bytes: int) -> str:
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.1f} {unit}"
    return f"{size_bytes} B"


def _age_s(at_ms: int) -> int:
    return max(0, wall_clock_ms() - at_ms) // 1000

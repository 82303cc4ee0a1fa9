"""The commands ``webhookd spool list``, ``show``, ``export`` and ``verify``, which only read."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import IO, Any

import click
import msgspec
from msgspec.structs import asdict

from webhookd.cli.spool.common import (
    age_s,
    amount,
    one_replica,
    progress,
    size,
    some_replicas,
    spool_options,
    with_replicas,
)
from webhookd.cli.spool.replicas import Replica, Replicas, Unreadable, short_name
from webhookd.cli.terminal import (
    Negative,
    Unreachable,
    WrongUse,
    duration,
    json_option,
    print_json,
    print_table,
)
from webhookd.config import Config
from webhookd.model import Job
from webhookd.spool.record import CorruptRecord, decode_record
from webhookd.spool.requests import (
    MAX_SEQUENCE,
    PAGE,
    CheckFile,
    GetTotals,
    ListRecords,
    StoredRecord,
    Totals,
)
from webhookd.spool.schema import Table
from webhookd.text import printable

_CUT_OFF = "its WAL is damaged, and hides records until a daemon takes this spool"

# -- list ---------------------------------------------------------------------------------------------------


@click.command("list")
@click.argument("wanted", metavar="[REPLICA]", required=False)
@click.option("--dead", "table", flag_value=Table.DEAD.value, help="Its dead letters, with the reasons.")
@click.option("--corrupt", "table", flag_value=Table.CORRUPT.value, help="Its damaged records.")
@click.option("--limit", type=click.IntRange(1, PAGE), default=20, help="Maximum number of records.")
@click.option("--after", type=click.IntRange(0, MAX_SEQUENCE), default=0, help="Start after this sequence.")
@json_option
@spool_options
def list_command(
    settings: Config, wanted: str | None, table: str | None, limit: int, after: int, *, as_json: bool
) -> None:
    """List the replicas, or the records of one.

    The oldest records come first. Their content is not shown.
    """
    if wanted is None and table is None:
        with_replicas(settings, partial(_list_replicas, as_json=as_json))
    else:
        request = ListRecords(Table(table or "live"), after, limit)
        with_replicas(settings, partial(_list_records, wanted=wanted, request=request, as_json=as_json))


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
            totals: Totals = await replica.ask(GetTotals())
            is_ours = replicas.root.is_ours(path)
    except Unreachable as error:
        return {**description, "state": "unreadable", "problem": error.message}
    oldest = totals.oldest_received_at_ms
    return {
        **description,
        "state": "stopped" if replica.pid is None else "running",
        "pid": replica.pid,
        "foreign": not is_ours,
        "records": totals.records[Table.LIVE],
        "bytes": totals.bytes,
        "oldestAgeSeconds": None if oldest is None else age_s(oldest),
        "dead": totals.records[Table.DEAD],
        "corrupt": totals.records[Table.CORRUPT],
    }


def _replica_cells(one: dict[str, Any]) -> Sequence[str]:
    if "problem" in one:
        return (one["replica"], one["state"], *"-----")
    state = f"pid {one['pid']}" if one["pid"] else one["state"]
    oldest_s = one["oldestAgeSeconds"]
    return (
        one["replica"],
        f"{state}, foreign" if one["foreign"] else state,
        f"{one['records']:,}",
        size(one["bytes"]),
        "-" if oldest_s is None else duration(oldest_s),
        f"{one['dead']:,}",
        f"{one['corrupt']:,}",
    )


async def _list_records(
    replicas: Replicas, *, wanted: str | None, request: ListRecords, as_json: bool
) -> None:
    async with replicas.open(replicas.path(wanted)) as replica:
        totals: Totals = await replica.ask(GetTotals())
        records: list[StoredRecord] = await replica.ask(request)
    if as_json:
        print_json([_facts(record) for record in records])
        return
    if records:
        lines = [line for record in records for line in _record_lines(record)]
        print_table(("SEQUENCE", "SIZE", "AGE", "JOB ID"), lines, numbers=range(3))
    total = totals.records[request.table]
    more = records and records[-1].sequence < totals.last[request.table]
    click.echo(
        f"{len(records):,} of {total:,} {request.table.value} records"
        + (f"; next page: --after {records[-1].sequence}" if more else "")
    )


def _record_lines(record: StoredRecord) -> Iterator[Sequence[str]]:
    """Yield the line of a record, and a second one with the reason if it was set aside."""
    age = duration(age_s(record.received_at_ms))
    yield (str(record.sequence), size(record.size_bytes), age, printable(record.job_id))
    if record.reason is not None:
        yield ("", "", "", f"  {printable(record.reason)}")


def _facts(record: StoredRecord) -> dict[str, Any]:
    """Return a record as JSON values, without its content."""
    return {name: value for name, value in asdict(record).items() if name != "content"}


# -- show ---------------------------------------------------------------------------------------------------


@click.command()
@click.argument("sequence", type=click.IntRange(1, MAX_SEQUENCE))
@click.option("--data", "wants_data", is_flag=True, help="Only the job's data: it contains messages.")
@one_replica
@json_option
@spool_options
def show(settings: Config, sequence: int, wanted: str | None, *, wants_data: bool, as_json: bool) -> None:
    """Show the facts of one record, or its data."""
    table, record = with_replicas(settings, partial(_find, wanted=wanted, sequence=sequence))
    try:
        job = decode_record(record.content)
    except CorruptRecord as error:
        job, checksum = None, str(error)
    else:
        checksum = "ok"
    if wants_data:
        if job is None:
            raise Negative(f"record {sequence} is damaged: {checksum}")
        click.echo(job.data)
        return
    facts = {"table": table.value, **_facts(record), "checksum": checksum}
    if job is not None:
        facts |= {"event": job.name, "options": json.loads(job.options), "data_bytes": len(job.data)}
    if as_json:
        print_json(facts)
    else:
        _print_facts(facts)


async def _find(replicas: Replicas, *, wanted: str | None, sequence: int) -> tuple[Table, StoredRecord]:
    async with replicas.open(replicas.path(wanted)) as replica:
        for table in Table:
            records: list[StoredRecord] = await replica.ask(
                ListRecords(table, sequence - 1, 1, with_content=True)
            )
            if records and records[0].sequence == sequence:
                return table, records[0]
    raise Negative(f"{replica.path}: there is no record {sequence}")


def _print_facts(facts: dict[str, Any]) -> None:
    for name, value in facts.items():
        if value is None:
            continue
        text = json.dumps(value) if isinstance(value, dict) else printable(str(value))
        if name.endswith("_ms"):
            text = f"{time.strftime('%F %T', time.gmtime(value / 1000))} UTC, {duration(age_s(value))} ago"
        elif name.endswith("_bytes"):
            text = size(value)
        heading = name.removesuffix("_ms").removesuffix("_bytes").replace("_", " ")
        click.echo(f"{click.style(f'{heading:<14}', bold=True)}{text}")


# -- export and verify --------------------------------------------------------------------------------------


@click.command()
@click.option(
    "--only",
    type=click.Choice(["live", "dead"]),
    show_default="both",
    help="Only waiting events, or only dead letters.",
)
@click.option(
    "--output",
    type=click.Path(),
    show_default="standard output",
    help="A new file, which only its owner can read.",
)
@some_replicas
@spool_options
def export(settings: Config, only: str | None, output: str | None, wanted: str | None) -> None:
    """Write the events as lines of JSON.

    A last resort. The events stay in the spool. Each line has the arguments of BullMQ's queue.add() (queue,
    name, data, opts), and the job's id: added with this id, the job is added once. The lines contain
    messages.
    """
    tables = [Table(only)] if only else [Table.LIVE, Table.DEAD]
    try:
        with nullcontext(sys.stdout.buffer) if output is None else _created(output) as out:
            done, damaged = with_replicas(settings, partial(_export, wanted=wanted, tables=tables, out=out))
            out.flush()
    except BrokenPipeError:
        raise  # for click: the reader has closed the pipe
    except OSError as error:
        raise Unreachable(f"{output or 'standard output'}: cannot write: {error.strerror}") from None
    click.echo(f"{amount(done, 'event')} exported", err=True)
    if damaged:
        raise Negative(f"{amount(damaged, 'record')} could not be read: see `webhookd spool verify`")


@contextmanager
def _created(path: str) -> Iterator[IO[bytes]]:
    """Create a file, and fsync it at the end; after an error, remove it if it is empty."""
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
            async for _table, record in _read_all(replica, tables, "exporting"):
                try:
                    line = _export_line(decode_record(record.content), record)
                except CorruptRecord:
                    damaged += 1
                    continue
                out.write(line)
                done += 1
    return done, damaged


def _export_line(job: Job, record: StoredRecord) -> bytes:
    """Return a job as one line of JSON, even if its data has several."""
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
    if record.reason is not None:
        line["reason"] = record.reason
    return msgspec.json.encode(line) + b"\n"


@click.command()
@some_replicas
@json_option
@spool_options
def verify(settings: Config, wanted: str | None, *, as_json: bool) -> None:
    """Read and check every record.

    This also checks the structure of the file. It changes nothing.
    """
    found = with_replicas(settings, partial(_verify, wanted=wanted))
    if as_json:
        print_json(found)
    else:
        for one in found:
            _print_verdict(one)
    damaged = sum(bool(one["problems"]) for one in found)
    if damaged:
        raise Negative(f"{damaged} of {amount(len(found), 'spool')} damaged")


async def _verify(replicas: Replicas, *, wanted: str | None) -> Sequence[dict[str, Any]]:
    return [await _verify_one(replicas, path) for path in replicas.paths(wanted)]


async def _verify_one(replicas: Replicas, path: Path) -> dict[str, Any]:
    counts = dict.fromkeys(Table, 0)
    problems = [f"{kept.name} is a damaged file that was kept" for kept in _evidence(path)]
    async with replicas.open(path) as replica:
        if await replica.is_cut_off():
            problems.append(_CUT_OFF)
        try:
            structure: list[str] | None = await replica.ask(CheckFile(full=replica.pid is None))
            problems += [f"the file's structure: {text}" for text in structure or ()]
            async for table, record in _read_all(replica, list(Table), "verifying"):
                counts[table] += 1
                problem = _problem(table, record)
                if problem is not None:
                    problems.append(f"{table.value} record {record.sequence}: {problem}")
        except Unreadable as error:
            structure = []
            problems.append(error.message)
    return {
        "replica": short_name(path),
        **{table.value: count for table, count in counts.items()},
        "structure": "not checked" if structure is None else "checked",
        "problems": problems,
    }


def _evidence(path: Path) -> Sequence[Path]:
    return sorted(path.glob("*.corrupt-*"))


def _problem(table: Table, record: StoredRecord) -> str | None:
    if table is Table.CORRUPT:
        return f"set aside: {record.reason}"
    try:
        job = decode_record(record.content)
    except CorruptRecord as error:
        return str(error)
    return None if (job.queue, job.id) == (record.queue, record.job_id) else "its row names another job"


def _print_verdict(one: dict[str, Any]) -> None:
    good = not one["problems"]
    word = click.style("ok", fg="green") if good else click.style("damaged", fg="red")
    click.echo(
        f"{one['replica']}  {one['live']:,} live, {one['dead']:,} dead, {one['corrupt']:,} corrupt: {word}"
    )
    if one["structure"] == "not checked":
        click.echo("  the file's structure is not checked: it is too large for that while events may arrive")
    for problem in one["problems"]:
        click.echo(f"  {printable(problem)}")


async def _read_all(
    replica: Replica, tables: Sequence[Table], verb: str
) -> AsyncIterator[tuple[Table, StoredRecord]]:
    """Yield every record that is there now, page by page, but not those that arrive meanwhile."""
    totals: Totals = await replica.ask(GetTotals())
    with progress(verb, replica, sum(totals.records[table] for table in tables)) as advance:
        for table in tables:
            after, last = 0, totals.last[table]
            while after < last:
                records: list[StoredRecord] = await replica.ask(ListRecords(table, after, with_content=True))
                for record in records:
                    yield table, record
                advance(len(records))
                after = records[-1].sequence if records else last

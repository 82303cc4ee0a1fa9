"""What an operator may ask of a spool, as values: each is an operation on its database.

A spool in this process gets them as they are; a running daemon gets them as JSON, on the socket in its
spool's directory (``control.py``). Either way the same code answers. Each takes a few milliseconds, so that
events that arrive meanwhile do not wait: whoever wants more asks again, from behind the last sequence.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import Annotated, Any, ClassVar, TypeAlias

from msgspec import Meta, Struct

from webhookd.spool.database import SpoolDatabase
from webhookd.spool.schema import Table, in_table

PAGE = 500
_PAGE_BYTES = 1_048_576
#: About 0.1 s of a disk's time, and a fifth of that where the file is in memory.
_MAX_CHECKED_BYTES = 33_554_432

_TOTALS = """
SELECT bytes, (SELECT received_at_ms FROM live ORDER BY sequence LIMIT 1), records, dead, corrupt,
coalesce((SELECT max(sequence) FROM live), 0), coalesce((SELECT max(sequence) FROM dead), 0),
coalesce((SELECT max(sequence) FROM corrupt), 0) FROM totals
"""
# The casts are for damaged rows, which may hold anything. length() reads no content.
_RECORDS = """
SELECT sequence, CAST(coalesce(queue, '') AS TEXT), CAST(coalesce(job_id, '') AS TEXT),
CAST(coalesce(received_at_ms, 0) AS INTEGER), coalesce(length(record), 0), $aside,
CAST(coalesce($record, '') AS BLOB) FROM $table WHERE sequence > ? ORDER BY sequence LIMIT ?
"""
_ASIDE = "CAST(coalesce(reason, '') AS TEXT), CAST(coalesce(set_aside_at_ms, 0) AS INTEGER)"

Limit: TypeAlias = Annotated[int, Meta(ge=1, le=PAGE)]
Sequences: TypeAlias = Annotated[list[int], Meta(max_length=PAGE)]


class Totals(Struct):
    """What a spool holds.

    ``bytes`` and ``oldest_received_at_ms`` are of the live records. ``last`` is the highest sequence of each
    table, or 0.
    """

    bytes: int
    oldest_received_at_ms: int | None
    records: dict[Table, int]
    last: dict[Table, int]


class StoredRecord(Struct):
    """One record as its table has it; ``content`` is what was written, where it was asked for.

    ``reason`` and ``set_aside_at_ms`` are None for live records.
    """

    sequence: int
    queue: str
    job_id: str
    received_at_ms: int
    size_bytes: int
    reason: str | None
    set_aside_at_ms: int | None
    content: bytes = b""


class DrainState(Struct):
    """Whose drain it is, how many records the spool holds, and why they do not get less; None if they do."""

    pid: int
    records: int
    problem: str | None


class Query(Struct, tag=True):
    """Something that changes nothing. ``answer_type`` is what it returns."""

    answer_type: ClassVar[Any]

    def answer(self, connection: sqlite3.Connection) -> Any:
        """The answer, by SELECTs alone."""
        raise NotImplementedError

    def __call__(self, database: SpoolDatabase) -> Any:
        """Do it as an operation of a spool."""
        return self.answer(database.open())


class GetTotals(Query):
    """How much it holds."""

    answer_type: ClassVar[Any] = Totals

    def answer(self, connection: sqlite3.Connection) -> Totals:
        """By the totals that each transaction keeps; to count would take long."""
        size_bytes, oldest_received_at_ms, *counts = connection.execute(_TOTALS).fetchone()
        records, last = (dict(zip(Table, part, strict=True)) for part in (counts[:3], counts[3:]))
        return Totals(size_bytes, oldest_received_at_ms, records, last)


class ListRecords(Query):
    """The records of a table behind a sequence, in their order.

    With their content it is up to 1 MiB of that, but for the first.
    """

    table: Table
    after: int = 0
    limit: Limit = PAGE
    with_content: bool = False

    answer_type: ClassVar[Any] = list[StoredRecord]

    def answer(self, connection: sqlite3.Connection) -> list[StoredRecord]:
        """Up to ``limit`` of them."""
        statement = in_table(self.table, _RECORDS).replace(
            "$record", "record" if self.with_content else "x''"
        )
        statement = statement.replace("$aside", "NULL, NULL" if self.table is Table.LIVE else _ASIDE)
        found: list[StoredRecord] = []
        content_bytes = 0
        with closing(connection.execute(statement, (self.after, self.limit))) as rows:
            for values in rows:
                record = StoredRecord(*values)
                content_bytes += len(record.content)
                if found and content_bytes > _PAGE_BYTES:
                    break
                found.append(record)
        return found


class CheckFile(Query):
    """What is wrong with the structure of the file; None where it is so large that to look would take long.

    With ``full`` it is looked at anyway: nobody waits for a stopped replica's.
    """

    full: bool = False

    answer_type: ClassVar[Any] = list[str] | None

    def answer(self, connection: sqlite3.Connection) -> list[str] | None:
        """By SQLite's own check."""
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        (page_bytes,) = connection.execute("PRAGMA page_size").fetchone()
        if pages * page_bytes > _MAX_CHECKED_BYTES and not self.full:
            return None
        return [text for (text,) in connection.execute("PRAGMA quick_check(10)") if text != "ok"]


class Requeue(Struct, tag=True):
    """Put dead letters at the end of the queue again, beyond any bound; answers how many there were."""

    sequences: Sequences

    answer_type: ClassVar[Any] = int

    def __call__(self, database: SpoolDatabase) -> int:
        """Do it as an operation of a spool."""
        return database.requeue_dead(self.sequences)


class Purge(Struct, tag=True):
    """Delete records for good; answers how many there were."""

    table: Table
    sequences: Sequences

    answer_type: ClassVar[Any] = int

    def __call__(self, database: SpoolDatabase) -> int:
        """Do it as an operation of a spool."""
        return database.delete(self.table, self.sequences)


#: All of them: what the socket takes.
SpoolRequest: TypeAlias = GetTotals | ListRecords | CheckFile | Requeue | Purge

"""The requests of the operator's command to a spool: values, and operations on its database.

A spool in this process runs them as they are. A running daemon receives them as JSON, on the socket in the
directory of its spool (`webhookd.spool.control`). The same code answers both. Each request takes a few
milliseconds, so that arriving events do not wait. For more records, the client asks again, from the last
sequence on.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import Annotated, Any, ClassVar, TypeAlias

from msgspec import Meta, Struct

from webhookd.spool.database import SpoolDatabase
from webhookd.spool.schema import Table, in_table

PAGE = 500
#: SQLite has no larger integers: a larger one would fail the whole group, with the events in it.
MAX_SEQUENCE = (1 << 63) - 1
_PAGE_BYTES = 1_048_576
#: Checking this much takes a disk about 0.1 s, and a fifth of that if the file is in memory.
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
CAST(coalesce($content, '') AS BLOB) FROM $table WHERE sequence > ? ORDER BY sequence LIMIT ?
"""
_ASIDE = "CAST(coalesce(reason, '') AS TEXT), CAST(coalesce(set_aside_at_ms, 0) AS INTEGER)"

Limit: TypeAlias = Annotated[int, Meta(ge=1, le=PAGE)]
Sequence: TypeAlias = Annotated[int, Meta(ge=0, le=MAX_SEQUENCE)]
Sequences: TypeAlias = Annotated[list[Sequence], Meta(max_length=PAGE)]


class Totals(Struct):
    """The totals of a spool.

    ``bytes`` and ``oldest_received_at_ms`` describe the live records. ``last`` is the highest sequence of
    each table, or 0.
    """

    bytes: int
    oldest_received_at_ms: int | None
    records: dict[Table, int]
    last: dict[Table, int]


class StoredRecord(Struct):
    """One record as its table holds it.

    ``content`` is the encoded record, or empty if it was not requested. ``reason`` and ``set_aside_at_ms``
    are None for live records.
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
    """The state of a drain.

    ``pid`` is the process that drains, ``records`` the number of records left, and ``problem`` the reason why
    the drain waits, or None.
    """

    pid: int
    records: int
    problem: str | None


class Query(Struct, tag=True):
    """A request that changes nothing; ``answer_type`` is the type of its answer."""

    answer_type: ClassVar[Any]

    def answer(self, connection: sqlite3.Connection) -> Any:
        """Return the answer; only read."""
        raise NotImplementedError

    def __call__(self, database: SpoolDatabase) -> Any:
        """Run as an operation of a spool."""
        return self.answer(database.open())


class GetTotals(Query):
    """A query for the totals."""

    answer_type: ClassVar[Any] = Totals

    def answer(self, connection: sqlite3.Connection) -> Totals:
        size_bytes, oldest_received_at_ms, *counts = connection.execute(_TOTALS).fetchone()
        records, last = (dict(zip(Table, part, strict=True)) for part in (counts[:3], counts[3:]))
        return Totals(size_bytes, oldest_received_at_ms, records, last)


class ListRecords(Query):
    """A query for the records of a table after a sequence, in order.

    If their content is requested, the answer has at most 1 MiB of it, unless the first record alone has more.
    """

    table: Table
    after: Sequence = 0
    limit: Limit = PAGE
    with_content: bool = False

    answer_type: ClassVar[Any] = list[StoredRecord]

    def answer(self, connection: sqlite3.Connection) -> list[StoredRecord]:
        content = "record" if self.with_content else "x''"
        aside = "NULL, NULL" if self.table is Table.LIVE else _ASIDE
        statement = in_table(self.table, _RECORDS).replace("$content", content).replace("$aside", aside)
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
    """A query for the defects in the structure of the file; None if it is too large to check quickly.

    With ``full``, a large file is checked, too: no event waits for the file of a stopped replica.
    """

    full: bool = False

    answer_type: ClassVar[Any] = list[str] | None

    def answer(self, connection: sqlite3.Connection) -> list[str] | None:
        size = "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size"
        if not self.full and connection.execute(size).fetchone() > (_MAX_CHECKED_BYTES,):
            return None
        return [text for (text,) in connection.execute("PRAGMA quick_check(10)") if text != "ok"]


class Requeue(Struct, tag=True):
    """Move dead letters to the end of the queue, beyond its limits, too; the answer is the number moved."""

    sequences: Sequences

    answer_type: ClassVar[Any] = int

    def __call__(self, database: SpoolDatabase) -> int:
        return database.requeue_dead(self.sequences)


class Purge(Struct, tag=True):
    """Delete records for good; the answer is the number deleted."""

    table: Table
    sequences: Sequences

    answer_type: ClassVar[Any] = int

    def __call__(self, database: SpoolDatabase) -> int:
        return database.delete(self.table, self.sequences)


#: The requests that the socket accepts.
SpoolRequest: TypeAlias = GetTotals | ListRecords | CheckFile | Requeue | Purge

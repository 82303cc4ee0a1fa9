"""What an operator may ask of a spool, as values: each is an operation on its database.

A spool in this process gets them as they are; a running daemon gets them as JSON, on the socket in its
spool's directory (``control.py``). Either way the same code answers. Each takes a few milliseconds, so that
events that arrive meanwhile do not wait: whoever wants more asks again, from behind the last sequence.
"""

from __future__ import annotations

from contextlib import closing
from enum import Enum
from typing import Annotated, Any, ClassVar, TypeAlias

from msgspec import Meta, Struct

from webhookd.spool.database import Execute, SpoolDatabase

PAGE = 500
_PAGE_BYTES = 1_048_576
#: About 0.1 s of a disk's time, and a fifth of that where the file is in memory.
_MAX_CHECKED_BYTES = 33_554_432

Limit: TypeAlias = Annotated[int, Meta(ge=1, le=PAGE)]
Sequences: TypeAlias = Annotated[list[int], Meta(max_length=PAGE)]


class Table(Enum):
    """Where a record is: in the queue, among the dead letters, or among those that are damaged."""

    LIVE = "live"
    DEAD = "dead"
    CORRUPT = "corrupt"


class Holdings(Struct):
    """What a spool holds. ``last`` is the highest sequence of each table; 0 where there is none."""

    records: int
    bytes: int
    dead: int
    corrupt: int
    oldest_received_at_ms: int | None
    last: dict[Table, int]

    def count(self, table: Table) -> int:
        """How many records a table has."""
        return {Table.LIVE: self.records, Table.DEAD: self.dead, Table.CORRUPT: self.corrupt}[table]


class Row(Struct):
    """One record as its table has it; ``record`` is what was written, where it was asked for.

    ``reason`` and ``set_aside_at_ms`` are None for live records.
    """

    sequence: int
    queue: str
    job_id: str
    received_at_ms: int
    size_bytes: int
    reason: str | None
    set_aside_at_ms: int | None
    record: bytes = b""


class DrainState(Struct):
    """Whose drain it is, how many records the spool holds, and why they do not get less; None if they do."""

    pid: int
    records: int
    problem: str | None


class Question(Struct, tag=True):
    """Something that changes nothing. ``answer_type`` is what it returns."""

    answer_type: ClassVar[Any]

    def answer(self, execute: Execute) -> Any:
        """The answer, by SELECTs alone."""
        raise NotImplementedError

    def __call__(self, database: SpoolDatabase) -> Any:
        """Do it as an operation of a spool."""
        return database.ask(self.answer)


class Look(Question):
    """How much it holds."""

    answer_type: ClassVar[Any] = Holdings

    def answer(self, execute: Execute) -> Holdings:
        """By the totals that each transaction keeps; to count would take long."""
        records, size, dead, corrupt, oldest, *last = execute(_LOOK).fetchone()
        return Holdings(records, size, dead, corrupt, oldest, dict(zip(Table, last, strict=True)))


class ListRows(Question):
    """The records of a table behind a sequence, in their order, without their content."""

    table: Table
    after: int = 0
    limit: Limit = PAGE

    answer_type: ClassVar[Any] = list[Row]

    def answer(self, execute: Execute) -> list[Row]:
        """Up to ``limit`` of them."""
        return [Row(*row) for row in execute(_list(self.table, "x''"), (self.after, self.limit))]


class ReadRows(Question):
    """The same with their content: up to 1 MiB of it, but for the first."""

    table: Table
    after: int = 0
    limit: Limit = PAGE

    answer_type: ClassVar[Any] = list[Row]

    def answer(self, execute: Execute) -> list[Row]:
        """As many as that allows."""
        found: list[Row] = []
        size_bytes = 0
        with closing(execute(_list(self.table, "record"), (self.after, self.limit))) as rows:
            for values in rows:
                row = Row(*values)
                size_bytes += row.size_bytes
                if found and size_bytes > _PAGE_BYTES:
                    break
                found.append(row)
        return found


class CheckFile(Question):
    """What is wrong with the structure of the file; None where it is so large that to look would take long.

    With ``full`` it is looked at anyway: nobody waits for a stopped replica's.
    """

    full: bool = False

    answer_type: ClassVar[Any] = list[str] | None

    def answer(self, execute: Execute) -> list[str] | None:
        """By SQLite's own check."""
        (pages,), (page_bytes,) = (execute(f"PRAGMA page_{name}").fetchone() for name in ("count", "size"))
        if pages * page_bytes > _MAX_CHECKED_BYTES and not self.full:
            return None
        return [text for (text,) in execute("PRAGMA quick_check(10)") if text != "ok"]


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
        if self.table is Table.LIVE:
            return database.remove(self.sequences)
        if self.table is Table.DEAD:
            return database.purge_dead(self.sequences)
        return database.purge_corrupt(self.sequences)


#: All of them: what the socket takes.
Request: TypeAlias = Look | ListRows | ReadRows | CheckFile | Requeue | Purge

_LOOK = """
SELECT records, bytes, dead, corrupt, (SELECT received_at_ms FROM live ORDER BY sequence LIMIT 1),
coalesce((SELECT max(sequence) FROM live), 0), coalesce((SELECT max(sequence) FROM dead), 0),
coalesce((SELECT max(sequence) FROM corrupt), 0) FROM totals
"""
# The casts are for damaged rows, which may hold anything. length() reads no content.
_LIST = """
SELECT sequence, CAST(coalesce(queue, '') AS TEXT), CAST(coalesce(job_id, '') AS TEXT),
CAST(coalesce(received_at_ms, 0) AS INTEGER), coalesce(length(record), 0), $aside,
CAST(coalesce($record, '') AS BLOB) FROM $table WHERE sequence > ? ORDER BY sequence LIMIT ?
"""
_ASIDE = "CAST(coalesce(reason, '') AS TEXT), CAST(coalesce(set_aside_at_ms, 0) AS INTEGER)"


def _list(table: Table, record: str) -> str:
    aside = "NULL, NULL" if table is Table.LIVE else _ASIDE
    return _LIST.replace("$aside", aside).replace("$record", record).replace("$table", table.value)

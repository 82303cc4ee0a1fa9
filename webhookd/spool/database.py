"""The file of a spool: an SQLite database that is written in groups, and that outlives damage.

Everything here blocks and belongs to one thread. The holder of the directory's lock is the only user of
the file, so SQLite takes its own lock for good (``locking_mode=EXCLUSIVE``): there is no shared memory
to map, and nobody else can get in between.
"""

from __future__ import annotations

import errno
import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import quote

from attrs import define, field, frozen
from twisted.logger import Logger

from webhookd.model import Job, Outcome, Receipt, SpoolRecord, SpoolStats, SpoolUnavailable
from webhookd.spool.record import CorruptRecord, decode_record
from webhookd.spool.salvage import (
    Damage,
    beside,
    check_structure,
    keep_evidence,
    lenient_text,
    make_database,
    primary_code,
    write_again,
)
from webhookd.spool.schema import COUNT_TOTALS, SCHEMA, Table, in_table

_APPEND = "INSERT INTO live VALUES (?, ?, ?, ?, ?) ON CONFLICT (queue, job_id) DO NOTHING"
_FIRST = "SELECT sequence, CAST(coalesce(record, '') AS BLOB) FROM live ORDER BY sequence"
_DELETE = "DELETE FROM $table WHERE sequence = ? RETURNING coalesce(length(record), 0)"
_SET_ASIDE = "INSERT OR REPLACE INTO $table SELECT *, ?, ? FROM live WHERE sequence = ?"
_EXPIRE = "DELETE FROM $table WHERE set_aside_at_ms < ?"
_REQUEUE = """
INSERT INTO live SELECT ?, queue, job_id, received_at_ms, record FROM dead WHERE sequence = ?
ON CONFLICT (queue, job_id) DO NOTHING RETURNING length(record)
"""
_GET_TOTALS = "SELECT records, bytes, dead, corrupt FROM totals"
_SET_TOTALS = "UPDATE totals SET records = ?, bytes = ?, dead = ?, corrupt = ?"
_HIGHEST = """
SELECT max(coalesce((SELECT max(sequence) FROM live), 0), coalesce((SELECT max(sequence) FROM dead), 0),
coalesce((SELECT max(sequence) FROM corrupt), 0))
"""
_IS_EMPTY = """
SELECT NOT (EXISTS (SELECT 1 FROM live) OR EXISTS (SELECT 1 FROM dead) OR EXISTS (SELECT 1 FROM corrupt))
"""
# An empty spool gives its room back in bites of 16 MiB, a tenth of a second each, one with each group.
_TIDY = "PRAGMA incremental_vacuum(4096); PRAGMA wal_checkpoint(TRUNCATE);"
_LARGE_RECORD_BYTES = 65_536
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)

EMPTY = SpoolStats(records=0, bytes=0, oldest_received_at_ms=None, dead_records=0, corrupt_records=0)
#: Something to do inside a group's transaction; raises `SpoolUnavailable` to fail alone.
Operation: TypeAlias = "Callable[[SpoolDatabase], Any]"

_log = Logger()


@frozen
class SpoolLimits:
    """How much a spool may hold.

    ``max_bytes`` bounds the live records; ``min_free_bytes`` of the disk are left free for everyone else, and
    for the WAL to be written back; ``max_waiting`` bounds the appends that wait for the disk, and so their
    delay; dead letters and corrupt records are deleted when they are older than ``dead_max_age_ms``.
    """

    max_bytes: int = 1 << 30
    min_free_bytes: int = 64 << 20
    max_waiting: int = 10_000
    dead_max_age_ms: int = 30 * 24 * 3600 * 1000


def connect(path: Path) -> sqlite3.Connection:
    """Open an SQLite file with explicit transactions, for whichever one thread uses it."""
    return sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=1.0)


def connect_to_read(path: Path) -> sqlite3.Connection:
    """Open a spool's file, with what its WAL holds, and change neither: no repair, no writing back.

    The caller holds the directory's lock. SQLite would lock the file itself, and map shared memory from a
    file beside it: both need a right to write, and who is alone needs neither.

    :raises sqlite3.Error: it cannot be read.
    """
    if not path.exists():
        if beside(path, ".old").exists():
            raise Damage("its repair was cut short")
        connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        connection.executescript(SCHEMA)  # a replica that ended before it began
        return connection
    # Without locks a WAL is read, and made where there is none; with "immutable" it is neither.
    how = "vfs=unix-none" if beside(path, "-wal").exists() else "immutable=1"
    uri = f"file:{quote(str(path))}?mode=ro&{how}"
    connection = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
    connection.text_factory = lenient_text
    connection.execute("PRAGMA locking_mode = EXCLUSIVE")
    return connection


def free_disk_bytes(path: Path) -> int:
    """How much an ordinary user may still write to a path's file system."""
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


@define
class SpoolDatabase:
    """The records of one spool, in an SQLite file that is opened when needed, and again after it failed.

    The methods below `commit` may be called by its operations only.
    """

    _path: Path
    _limits: SpoolLimits
    _free_bytes: Callable[[Path], int] = free_disk_bytes
    _connect: Callable[[Path], sqlite3.Connection] = connect
    _connection: sqlite3.Connection | None = field(default=None, init=False)
    _records: Counter[Table] = field(factory=Counter, init=False)
    _live_bytes: int = field(default=0, init=False)
    _damaged: bool = field(default=False, init=False)
    _untidy: bool = field(default=True, init=False)  # there may be something to give back
    # One more than the highest sequence ever given out. It survives a reopening, because a drain may still
    # hold sequences from before; it need not survive the process, because nobody else holds any.
    _next_sequence: int = field(default=1, init=False)
    _room_bytes: int = field(default=0, init=False)
    # What was last refused for want of room. There is none as long as there is none for that; but one huge
    # record must not speak for all.
    _wanted_bytes: int = field(default=1, init=False)

    def commit(self, operations: Sequence[Operation]) -> tuple[list[Any], SpoolStats]:
        """Run operations in one transaction, and return their results once it is on disk.

        The result of an operation that failed alone is its `SpoolUnavailable`.

        :raises SpoolUnavailable: nothing of it counts. Its rows may be there after all once the file is open
            again (SQLite may have failed after its last write); nobody was told so, and ids stay unique.
        """
        failure: Exception
        for _ in range(2):  # again, if the file was found damaged: then a new one takes its place
            try:
                return self._transact(operations)
            except (sqlite3.Error, OSError) as error:
                failure, reason = error, self._give_up(error)
            except BaseException:
                self._abandon()
                raise
            if not self._damaged:
                break
        raise SpoolUnavailable(reason) from failure

    def close(self) -> bool:
        """Write the WAL back and close the file; true if the file is known to hold nothing any more."""
        is_empty = False
        if self._connection is not None:
            with suppress(sqlite3.Error):
                (is_empty,) = self._connection.execute(_IS_EMPTY).fetchone()
        self._abandon()
        return bool(is_empty) and not beside(self._path, "-wal").exists()

    # -- operations

    def append(self, job: Job, record: bytes) -> Receipt:
        """Put a job at the end, unless it is in already, or there is no room."""
        problem = self._why_full(len(record))
        if problem is not None:
            if self._holds(job):
                return Receipt(Outcome.ALREADY_QUEUED, job.id, job.name)
            self._wanted_bytes = min(len(record), _LARGE_RECORD_BYTES)
            raise SpoolUnavailable(problem)
        values = (self._next_sequence, job.queue, job.id, job.timestamp_ms, record)
        if not self.open().execute(_APPEND, values).rowcount:
            return Receipt(Outcome.ALREADY_QUEUED, job.id, job.name)
        self._added(len(record))
        self._room_bytes -= len(record)
        return Receipt(Outcome.SPOOLED, job.id, job.name)

    def first(self, limit: int, max_bytes: int, now_ms: int) -> list[SpoolRecord]:
        """The oldest records; corrupt ones on the way are set aside."""
        found: list[SpoolRecord] = []
        corrupt: list[tuple[int, str]] = []
        size = 0
        rows = self.open().execute(_FIRST)
        for sequence, record in rows:
            size += len(record)
            if len(found) == limit or (found and size > max_bytes):
                break
            try:
                found.append(SpoolRecord(sequence, decode_record(record)))
            except CorruptRecord as error:
                corrupt.append((sequence, str(error)))
        rows.close()  # it must not read on while rows are deleted
        for sequence, reason in corrupt:
            _log.error("spool record {sequence} is corrupt: {reason}", sequence=sequence, reason=reason)
            self.set_aside(Table.CORRUPT, sequence, reason, now_ms)
        return found

    def delete(self, table: Table, sequences: Sequence[int]) -> int:
        """Delete records of a table, and return how many there were."""
        connection, statement = self.open(), in_table(table, _DELETE)
        sizes = [size for sequence in sequences for (size,) in connection.execute(statement, (sequence,))]
        self._untidy = True
        self._records[table] -= len(sizes)
        if table is Table.LIVE:
            self._live_bytes -= sum(sizes)
        return len(sizes)

    def set_aside(self, table: Table, sequence: int, reason: str, now_ms: int) -> None:
        """Move a live record to the dead letters, or to the corrupt records."""
        self.open().execute(in_table(table, _SET_ASIDE), (reason, now_ms, sequence))
        self._records[table] += self.delete(Table.LIVE, [sequence])

    def requeue_dead(self, sequences: Sequence[int]) -> int:
        """Put dead letters at the end of the queue, and return how many there were.

        One whose job has come in again meanwhile is dropped: the job is in the queue.
        """
        for sequence in sequences:
            for (size,) in self.open().execute(_REQUEUE, (self._next_sequence, sequence)).fetchall():
                self._added(size)
        return self.delete(Table.DEAD, sequences)

    def expire_dead(self, now_ms: int) -> None:
        """Delete dead letters and corrupt records that are past their age."""
        before_ms = now_ms - self._limits.dead_max_age_ms
        for table in (Table.DEAD, Table.CORRUPT):
            self._records[table] -= self.open().execute(in_table(table, _EXPIRE), (before_ms,)).rowcount

    def check(self, now_ms: int) -> None:
        """Write something, to see whether the disk takes it."""
        problem = self._why_full(self._wanted_bytes)
        if problem is not None:
            raise SpoolUnavailable(problem)
        self.open().execute("UPDATE totals SET checked_at_ms = ?", (now_ms,))

    def open(self) -> sqlite3.Connection:
        """The connection to the file; opens it if it is not open, and replaces it if it is damaged."""
        if self._connection is None:
            if self._path.exists():
                keep_evidence(self._path)  # after a crash just before that
            if self._damaged or not self._path.exists():
                make_database(self._path, self._connect)
                self._damaged = False
            self._connection = self._open_file()
        return self._connection

    # -- inside a transaction

    def _transact(self, operations: Sequence[Operation]) -> tuple[list[Any], SpoolStats]:
        """Do what `commit` does; after a failure, the file must be opened again."""
        connection = self.open()
        before = self._totals()
        connection.execute("BEGIN IMMEDIATE")
        self._room_bytes = self._free_bytes(self._path.parent) - self._limits.min_free_bytes
        results = [self._attempt(operation) for operation in operations]
        if self._totals() != before:
            connection.execute(_SET_TOTALS, self._totals())
        stats = self._take_stats(connection)
        # A crash before the end of this: nobody was told, and the group is there whole or not at all.
        connection.execute("COMMIT")
        # A crash from here on: the group is there, and its senders will send it again.
        if self._untidy and not stats.records:
            self._tidy(connection)
        return results, stats

    def _attempt(self, operation: Operation) -> Any:
        try:
            return operation(self)
        except SpoolUnavailable as refusal:
            return refusal

    def _totals(self) -> tuple[int, int, int, int]:
        records = self._records
        return records[Table.LIVE], self._live_bytes, records[Table.DEAD], records[Table.CORRUPT]

    def _take_stats(self, connection: sqlite3.Connection) -> SpoolStats:
        row = connection.execute("SELECT received_at_ms FROM live ORDER BY sequence LIMIT 1").fetchone()
        oldest_received_at_ms = None if row is None else row[0]
        problem = self._why_full(self._wanted_bytes)
        if problem is None:
            self._wanted_bytes = 1
        records, size, dead, corrupt = self._totals()
        return SpoolStats(records, size, oldest_received_at_ms, dead, corrupt, problem)

    def _why_full(self, size: int) -> str | None:
        if self._live_bytes + size > self._limits.max_bytes:
            return "full"
        if size > self._room_bytes:
            return "disk full"
        return None

    def _holds(self, job: Job) -> bool:
        query = "SELECT 1 FROM live WHERE queue = ? AND job_id = ?"
        return self.open().execute(query, (job.queue, job.id)).fetchone() is not None

    def _added(self, size: int) -> None:
        """Count a record that was put at the end."""
        self._next_sequence += 1
        self._records[Table.LIVE] += 1
        self._live_bytes += size

    # -- the file

    def _open_file(self) -> sqlite3.Connection:
        if self._path.stat().st_size == 0:
            raise Damage("file is empty")
        is_resealed = write_again(self._path)
        connection = self._connect(self._path)
        try:
            if is_resealed:
                check_structure(connection)
            connection.text_factory = lenient_text
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA secure_delete = ON")
            connection.execute("PRAGMA journal_size_limit = 16777216")
            self._take_stock(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _take_stock(self, connection: sqlite3.Connection) -> None:
        """See what the file holds, by its totals; they are made anew where they cannot be true."""
        totals = connection.execute(_GET_TOTALS).fetchone()
        if totals is None:
            raise Damage("totals are missing")
        if totals[:1] != connection.execute("SELECT count(*) FROM live").fetchone():  # by its index: small
            connection.execute(COUNT_TOTALS)
            totals = connection.execute(_GET_TOTALS).fetchone()
        records, self._live_bytes, dead, corrupt = totals
        self._records = Counter({Table.LIVE: records, Table.DEAD: dead, Table.CORRUPT: corrupt})
        (highest,) = connection.execute(_HIGHEST).fetchone()
        self._next_sequence = max(self._next_sequence, highest + 1)

    def _tidy(self, connection: sqlite3.Connection) -> None:
        """Give the room of an empty spool back; the WAL's old frames still hold what was removed."""
        try:
            connection.executescript(_TIDY)
            (free_pages,) = connection.execute("PRAGMA freelist_count").fetchone()
            self._untidy = free_pages > 0
        except sqlite3.Error as error:
            self._give_up(error)  # the group itself is on disk

    def _give_up(self, error: sqlite3.Error | OSError) -> str:
        """Close the file, so that the next group opens it again, and return what is wrong.

        On a full disk this makes room: the WAL, written back, is deleted.
        """
        self._abandon()
        if isinstance(error, OSError):
            return "disk full" if error.errno == errno.ENOSPC else f"broken: {error.strerror}"
        if primary_code(error) in _DAMAGE:
            _log.critical("spool file {path} is damaged: {error}", path=str(self._path), error=str(error))
            self._damaged = True
        return "disk full" if primary_code(error) == sqlite3.SQLITE_FULL else f"broken: {error}"

    def _abandon(self) -> None:
        """Close the connection, and forget what was not committed.

        SQLite then writes the WAL back up to the last commit that worked, and not what a failed fsync
        left behind it; if it cannot, the WAL stays for `write_again`.
        """
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(sqlite3.Error):
                connection.close()

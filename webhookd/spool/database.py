"""The file of a spool: an SQLite database that is written in groups, and that outlives damage.

Everything here blocks and belongs to one thread. The holder of the directory's lock is the only user of
the file, so SQLite keeps its own lock (``locking_mode=EXCLUSIVE``): it needs no shared memory, and no other
process can write in between.
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
    check_structure,
    keep_evidence,
    lenient_text,
    make_database,
    primary_code,
    sibling,
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
# An empty spool frees 16 MiB of disk space after each group, which takes a tenth of a second.
_TIDY = "PRAGMA incremental_vacuum(4096); PRAGMA wal_checkpoint(TRUNCATE);"
_LARGE_RECORD_BYTES = 65_536
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)

EMPTY = SpoolStats(records=0, bytes=0, oldest_received_at_ms=None, dead_records=0, corrupt_records=0)
#: One operation of a group, inside its transaction; raises `SpoolUnavailable` to fail alone.
Operation: TypeAlias = "Callable[[SpoolDatabase], Any]"

_log = Logger()


@frozen
class SpoolLimits:
    """The limits of a spool.

    ``max_bytes`` limits the live records. ``min_free_bytes`` of the disk stay free for other programs, and
    for writing the WAL back. ``max_waiting`` limits the appends that wait for the disk, and so their delay.
    Dead letters and corrupt records are deleted when they are older than ``dead_max_age_ms``.
    """

    max_bytes: int = 1 << 30
    min_free_bytes: int = 64 << 20
    max_waiting: int = 10_000
    dead_max_age_ms: int = 30 * 24 * 3600 * 1000


def connect(path: Path) -> sqlite3.Connection:
    """Open an SQLite file with explicit transactions, for use by one thread, which may be another one."""
    return sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=1.0)


def connect_to_read(path: Path) -> sqlite3.Connection:
    """Open a spool's file and its WAL for reading, and change neither: no repair, no writing back.

    The caller must hold the directory's lock. By itself SQLite would lock the file, and map shared memory
    from another one. Both need permission to write, and the only user of the file needs neither.

    :raises sqlite3.Error: the file is unreadable.
    """
    if not path.exists():
        if sibling(path, ".old").exists():
            raise Damage("its repair was cut short")
        connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        connection.executescript(SCHEMA)  # the replica ended before it made its file
        return connection
    # Without locks, SQLite reads the WAL, and creates a missing one; with "immutable" it does neither.
    how = "vfs=unix-none" if sibling(path, "-wal").exists() else "immutable=1"
    uri = f"file:{quote(str(path))}?mode=ro&{how}"
    connection = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
    connection.text_factory = lenient_text
    connection.execute("PRAGMA locking_mode = EXCLUSIVE")
    return connection


def free_disk_bytes(path: Path) -> int:
    """Return the bytes that an ordinary user may still write to the file system of a path."""
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


@define
class SpoolDatabase:
    """The records of one spool, in an SQLite file that is opened when needed, and again after a failure.

    Only operations that run in `commit` may call the methods from `append` to `open`.
    """

    _path: Path
    _limits: SpoolLimits
    _free_bytes: Callable[[Path], int] = free_disk_bytes
    _connect: Callable[[Path], sqlite3.Connection] = connect
    _connection: sqlite3.Connection | None = field(default=None, init=False)
    _records: Counter[Table] = field(factory=Counter, init=False)
    _live_bytes: int = field(default=0, init=False)
    _damaged: bool = field(default=False, init=False)
    _untidy: bool = field(default=True, init=False)  # there may be disk space to free
    # One more than the highest sequence ever used. It survives reopening the file, because a drain may still
    # hold earlier sequences. It need not survive the process, because no other process holds any.
    _next_sequence: int = field(default=1, init=False)
    _room_bytes: int = field(default=0, init=False)
    # Size of the last record refused for lack of space, up to a limit: one huge record must not decide for
    # all. The spool is full until there is room for this.
    _wanted_bytes: int = field(default=1, init=False)

    def commit(self, operations: Sequence[Operation]) -> tuple[list[Any], SpoolStats]:
        """Run operations in one transaction; return their results, and the stats, once it is on disk.

        The result of an operation that failed alone is its `SpoolUnavailable`.

        :raises SpoolUnavailable: none of the operations counts. Their rows may be there after all when the
            file is open again (SQLite may have failed after its last write). No sender got an answer, and
            ids stay unique.
        """
        failure: Exception
        for _ in range(2):  # if the file is damaged, a new one replaces it
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
        """Write the WAL back and close the file; return whether the spool is known to be empty."""
        is_empty = False
        if self._connection is not None:
            with suppress(sqlite3.Error):
                (is_empty,) = self._connection.execute(_IS_EMPTY).fetchone()
        self._abandon()
        return bool(is_empty) and not sibling(self._path, "-wal").exists()

    # -- operations

    def append(self, job: Job, record: bytes) -> Receipt:
        """Add a job at the end, unless the spool holds it already, or has no room."""
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
        """Read the oldest records, and set aside the corrupt ones among them."""
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
        rows.close()  # an open cursor must not read while rows are deleted
        for sequence, reason in corrupt:
            _log.error("spool record {sequence} is corrupt: {reason}", sequence=sequence, reason=reason)
            self.set_aside(Table.CORRUPT, sequence, reason, now_ms)
        return found

    def delete(self, table: Table, sequences: Sequence[int]) -> int:
        """Delete records of a table; return the number of those found."""
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
        """Move dead letters to the end of the queue; return the number of those found.

        If the queue holds the job of a dead letter again, the dead letter is only deleted.
        """
        for sequence in sequences:
            for (size,) in self.open().execute(_REQUEUE, (self._next_sequence, sequence)).fetchall():
                self._added(size)
        return self.delete(Table.DEAD, sequences)

    def expire_dead(self, now_ms: int) -> None:
        """Delete dead letters and corrupt records that are older than the limit."""
        before_ms = now_ms - self._limits.dead_max_age_ms
        for table in (Table.DEAD, Table.CORRUPT):
            self._records[table] -= self.open().execute(in_table(table, _EXPIRE), (before_ms,)).rowcount

    def check(self, now_ms: int) -> None:
        """Write something, to test the disk."""
        problem = self._why_full(self._wanted_bytes)
        if problem is not None:
            raise SpoolUnavailable(problem)
        self.open().execute("UPDATE totals SET checked_at_ms = ?", (now_ms,))

    def open(self) -> sqlite3.Connection:
        """Return the connection to the file; open the file first if necessary, and replace a damaged one."""
        if self._connection is None:
            if self._path.exists():
                keep_evidence(self._path)  # if a crash prevented it
            if self._damaged or not self._path.exists():
                make_database(self._path, self._connect)
                self._damaged = False
            self._connection = self._open_file()
        return self._connection

    # -- inside a transaction

    def _transact(self, operations: Sequence[Operation]) -> tuple[list[Any], SpoolStats]:
        """Do what `commit` does, once; after a failure, the file must be opened again."""
        connection = self.open()
        before = self._totals()
        connection.execute("BEGIN IMMEDIATE")
        self._room_bytes = self._free_bytes(self._path.parent) - self._limits.min_free_bytes
        results = [self._attempt(operation) for operation in operations]
        if self._totals() != before:
            connection.execute(_SET_TOTALS, self._totals())
        stats = self._take_stats(connection)
        # Crash window, before this ends: no sender has an answer, and the group is there whole or not at all.
        connection.execute("COMMIT")
        # Crash window, from here on: the group is there, and its senders may send it again.
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
        """Count a record that was added at the end."""
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
        """Read the totals of the file, and count them again if they cannot be true."""
        totals = connection.execute(_GET_TOTALS).fetchone()
        if totals is None:
            raise Damage("totals are missing")
        if totals[:1] != connection.execute("SELECT count(*) FROM live").fetchone():  # reads a small index
            connection.execute(COUNT_TOTALS)
            totals = connection.execute(_GET_TOTALS).fetchone()
        records, self._live_bytes, dead, corrupt = totals
        self._records = Counter({Table.LIVE: records, Table.DEAD: dead, Table.CORRUPT: corrupt})
        (highest,) = connection.execute(_HIGHEST).fetchone()
        self._next_sequence = max(self._next_sequence, highest + 1)

    def _tidy(self, connection: sqlite3.Connection) -> None:
        """Free the disk space of an empty spool, and empty the WAL, whose old frames hold removed records."""
        try:
            connection.executescript(_TIDY)
            (free_pages,) = connection.execute("PRAGMA freelist_count").fetchone()
            self._untidy = free_pages > 0
        except sqlite3.Error as error:
            self._give_up(error)  # the group itself is safe on disk

    def _give_up(self, error: sqlite3.Error | OSError) -> str:
        """Close the file, so that the next group opens it again; return the problem.

        On a full disk this makes room: SQLite writes the WAL back and deletes it.
        """
        self._abandon()
        if isinstance(error, OSError):
            return "disk full" if error.errno == errno.ENOSPC else f"broken: {error.strerror}"
        if primary_code(error) in _DAMAGE:
            _log.critical("spool file {path} is damaged: {error}", path=str(self._path), error=str(error))
            self._damaged = True
        return "disk full" if primary_code(error) == sqlite3.SQLITE_FULL else f"broken: {error}"

    def _abandon(self) -> None:
        """Close the connection, and drop what was not committed.

        SQLite then writes the WAL back up to the last successful commit, without what a failed fsync
        left after it. If that fails, the WAL stays for `write_again`.
        """
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(sqlite3.Error):
                connection.close()

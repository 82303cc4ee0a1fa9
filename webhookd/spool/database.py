"""The file of a spool: an SQLite database that is written in groups, and that outlives damage.

Everything here blocks and belongs to one thread. The holder of the directory's lock is the only user of
the file, so SQLite takes its own lock for good (``locking_mode=EXCLUSIVE``): there is no shared memory
to map, and nobody else can get in between.

A record is ``crc32 of the rest | version | length of header | length of options | header | options | data``,
with the job's small values in the header as JSON. It stands alone, whatever becomes of the table around it.

What becomes of a file that is damaged as a whole (not SQLite's, or its structure is broken), step by step.
A crash after any step leaves a state from which the next opening goes on:

1. the database and its WAL are renamed to ``*.old``;
2. ``*.new`` is built, with every row of ``*.old`` that can still be read;
3. ``*.new`` is renamed to the database's name;
4. ``*.old`` is renamed to ``*.corrupt-<n>``, and stays until an operator has looked at it.

A first start is steps 2 and 3, with nothing to carry over. So an empty file is never a young one: it is
damaged too.
"""

from __future__ import annotations

import errno
import json
import os
import sqlite3
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from itertools import count
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

from attrs import define, evolve, field, frozen
from twisted.logger import Logger

from webhookd.model import Job, Outcome, Receipt, SpoolRecord, SpoolStats, SpoolUnavailable
from webhookd.spool.directory import fsync_directory
from webhookd.spool.wal import reseal

_RECORD_VERSION = 1
_CRC = struct.Struct(">I")
_HEAD = struct.Struct(">BII")

_SCHEMA = """
CREATE TABLE live (
    sequence INTEGER PRIMARY KEY, queue TEXT NOT NULL, job_id TEXT NOT NULL,
    received_at_ms INTEGER NOT NULL, record BLOB NOT NULL, UNIQUE (queue, job_id));
CREATE TABLE dead (
    sequence INTEGER PRIMARY KEY, queue TEXT, job_id TEXT, received_at_ms INTEGER, record BLOB,
    reason TEXT, set_aside_at_ms INTEGER);
CREATE TABLE corrupt (
    sequence INTEGER PRIMARY KEY, queue TEXT, job_id TEXT, received_at_ms INTEGER, record BLOB,
    reason TEXT, set_aside_at_ms INTEGER);
CREATE TABLE totals (records INTEGER, bytes INTEGER, dead INTEGER, corrupt INTEGER, checked_at_ms INTEGER);
INSERT INTO totals VALUES (0, 0, 0, 0, 0);
"""
_APPEND = "INSERT INTO live VALUES (?, ?, ?, ?, ?) ON CONFLICT (queue, job_id) DO NOTHING"
_DELETE = "DELETE FROM live WHERE sequence = ? RETURNING coalesce(length(record), 0)"
_FIRST = "SELECT sequence, CAST(coalesce(record, '') AS BLOB) FROM live ORDER BY sequence"
_BURY = "INSERT OR REPLACE INTO dead SELECT *, ?, ? FROM live WHERE sequence = ?"
_SET_ASIDE = "INSERT OR REPLACE INTO corrupt SELECT *, ?, ? FROM live WHERE sequence = ?"
_REQUEUE = """
INSERT INTO live SELECT ?, queue, job_id, received_at_ms, record FROM dead WHERE sequence = ?
ON CONFLICT (queue, job_id) DO NOTHING RETURNING length(record)
"""
# What the tables hold, kept in step by each transaction: to count a full spool at start can take half a
# minute.
_GET_TOTALS = "SELECT records, bytes, dead, corrupt FROM totals"
_SET_TOTALS = "UPDATE totals SET records = ?, bytes = ?, dead = ?, corrupt = ?"
_COUNT_TOTALS = """
UPDATE totals SET (records, bytes) = (SELECT count(*), coalesce(sum(length(record)), 0) FROM live),
dead = (SELECT count(*) FROM dead), corrupt = (SELECT count(*) FROM corrupt)
"""
_HIGHEST = """
SELECT max(coalesce((SELECT max(sequence) FROM live), 0), coalesce((SELECT max(sequence) FROM dead), 0),
coalesce((SELECT max(sequence) FROM corrupt), 0))
"""
_IS_EMPTY = """
SELECT NOT (EXISTS (SELECT 1 FROM live) OR EXISTS (SELECT 1 FROM dead) OR EXISTS (SELECT 1 FROM corrupt))
"""
# For each table: its next row from either end, and how to write one. (A row at a time: Python's cursors read
# one row ahead, and lose the row before one that cannot be read.)
_SALVAGE = (
    (
        "SELECT * FROM live WHERE sequence >= ? ORDER BY sequence LIMIT 1",
        "SELECT * FROM live WHERE sequence <= ? ORDER BY sequence DESC LIMIT 1",
        "INSERT OR IGNORE INTO live VALUES (?, ?, ?, ?, ?)",
    ),
    (
        "SELECT * FROM dead WHERE sequence >= ? ORDER BY sequence LIMIT 1",
        "SELECT * FROM dead WHERE sequence <= ? ORDER BY sequence DESC LIMIT 1",
        "INSERT OR IGNORE INTO dead VALUES (?, ?, ?, ?, ?, ?, ?)",
    ),
    (
        "SELECT * FROM corrupt WHERE sequence >= ? ORDER BY sequence LIMIT 1",
        "SELECT * FROM corrupt WHERE sequence <= ? ORDER BY sequence DESC LIMIT 1",
        "INSERT OR IGNORE INTO corrupt VALUES (?, ?, ?, ?, ?, ?, ?)",
    ),
)
# After so many sequences in a row that cannot be read, a salvage takes the rest of the way for lost.
_SALVAGE_PATIENCE = 20_000
# An empty spool gives its room back in bites of 16 MiB, a tenth of a second each, one with each group.
_TIDY = "PRAGMA incremental_vacuum(4096); PRAGMA wal_checkpoint(TRUNCATE);"
_LARGE_RECORD_BYTES = 65_536
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)

EMPTY = SpoolStats(records=0, bytes=0, oldest_received_at_ms=None, dead_records=0, corrupt_records=0)
_log = Logger()


class CorruptRecord(ValueError):
    """A record is not what was written."""


def encode_record(job: Job) -> bytes:
    """Encode a job for the disk, with all that it is made of."""
    header = json.dumps(
        {
            "queue": job.queue,
            "id": job.id,
            "name": job.name,
            "timestamp_ms": job.timestamp_ms,
            "delay_ms": job.delay_ms,
            "priority": job.priority,
            "lifo": job.lifo,
        }
    ).encode()
    head = _HEAD.pack(_RECORD_VERSION, len(header), len(job.options))
    rest = b"".join((head, header, job.options, job.data))
    return _CRC.pack(zlib.crc32(rest)) + rest


def decode_record(record: bytes) -> Job:
    """Decode what `encode_record` made.

    :raises CorruptRecord: the checksum, the version or the content is wrong.
    """
    try:
        return _decode(record)
    except (TypeError, ValueError, struct.error) as error:
        raise CorruptRecord(str(error)) from error


def _decode(record: bytes) -> Job:
    (checksum,) = _CRC.unpack_from(record)
    if zlib.crc32(memoryview(record)[_CRC.size :]) != checksum:
        raise ValueError("wrong checksum")
    version, header_length, options_length = _HEAD.unpack_from(record, _CRC.size)
    if version != _RECORD_VERSION:
        raise ValueError(f"unknown version {version}")
    header_at = _CRC.size + _HEAD.size
    options_at = header_at + header_length
    data_at = options_at + options_length
    header = json.loads(record[header_at:options_at])
    return Job(options=record[options_at:data_at], data=record[data_at:], **header)


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


class Operation(Protocol):
    """Something to do inside a group's transaction; raises `SpoolUnavailable` to fail alone."""

    def __call__(self, database: SpoolDatabase, /) -> Any: ...


class Execute(Protocol):
    """Runs a statement of SQLite's."""

    def __call__(self, statement: str, values: Sequence[Any] = ..., /) -> sqlite3.Cursor: ...


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
        if path.with_name(f"{path.name}.old").exists():
            raise _Damage("its repair was cut short")
        connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        connection.executescript(_SCHEMA)  # a replica that ended before it began
        return connection
    # Without locks a WAL is read, and made where there is none; with "immutable" it is neither.
    how = "vfs=unix-none" if path.with_name(f"{path.name}-wal").exists() else "immutable=1"
    uri = f"file:{quote(str(path))}?mode=ro&{how}"
    connection = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
    connection.text_factory = _lenient_text
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
    _stats: SpoolStats = field(default=EMPTY, init=False)
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

    def _transact(self, operations: Sequence[Operation]) -> tuple[list[Any], SpoolStats]:
        """Do what `commit` does; after a failure, the file must be opened again."""
        connection = self._open()
        before = self._stats
        connection.execute("BEGIN IMMEDIATE")
        self._room_bytes = self._free_bytes(self._path.parent) - self._limits.min_free_bytes
        results = [self._attempt(operation) for operation in operations]
        self._settle(before)
        # A crash before the end of this: nobody was told, and the group is there whole or not at all.
        connection.execute("COMMIT")
        # A crash from here on: the group is there, and its senders will send it again.
        if self._untidy and not self._stats.records:
            self._tidy(connection)
        return results, self._stats

    def close(self) -> bool:
        """Write the WAL back and close the file; true if the file is known to hold nothing any more."""
        is_empty = False
        if self._connection is not None:
            with suppress(sqlite3.Error):
                (is_empty,) = self._connection.execute(_IS_EMPTY).fetchone()
        self._abandon()
        return bool(is_empty) and not self._beside("-wal").exists()

    # -- operations

    def append(self, job: Job, record: bytes) -> Receipt:
        """Put a job at the end, unless it is in already, or there is no room."""
        problem = self._why_full(len(record))
        if problem is not None:
            if self._holds(job):
                return Receipt(Outcome.ALREADY_QUEUED, job.id, job.name)
            self._wanted_bytes = min(len(record), _LARGE_RECORD_BYTES)
            raise SpoolUnavailable(problem)
        added = self._execute(
            _APPEND, (self._next_sequence, job.queue, job.id, job.timestamp_ms, record)
        ).rowcount
        if not added:
            return Receipt(Outcome.ALREADY_QUEUED, job.id, job.name)
        self._next_sequence += 1
        self._room_bytes -= len(record)
        self._count(records=1, size=len(record))
        return Receipt(Outcome.SPOOLED, job.id, job.name)

    def first(self, limit: int, max_bytes: int, now_ms: int) -> list[SpoolRecord]:
        """The oldest records; corrupt ones on the way are set aside."""
        found: list[SpoolRecord] = []
        corrupt: list[tuple[int, str]] = []
        size = 0
        rows = self._execute(_FIRST)
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
            if self._move(_SET_ASIDE, sequence, reason, now_ms):
                self._stats = evolve(self._stats, corrupt_records=self._stats.corrupt_records + 1)
        return found

    def remove(self, sequences: Sequence[int]) -> int:
        """Delete live records, and return how many there were."""
        return sum(self._delete_live(sequence) for sequence in sequences)

    def bury(self, sequence: int, reason: str, now_ms: int) -> None:
        """Move a live record to the dead letters."""
        if self._move(_BURY, sequence, reason, now_ms):
            self._stats = evolve(self._stats, dead_records=self._stats.dead_records + 1)

    def beat(self, now_ms: int) -> None:
        """Write something, to see whether the disk takes it."""
        problem = self._why_full(self._wanted_bytes)
        if problem is not None:
            raise SpoolUnavailable(problem)
        self._execute("UPDATE totals SET checked_at_ms = ?", (now_ms,))

    def ask(self, answer: Callable[[Execute], Any]) -> Any:
        """What a question finds; it gets what runs a SELECT."""
        return answer(self._execute)

    def requeue_dead(self, sequences: Sequence[int]) -> int:
        """Put dead letters at the end of the queue, and return how many there were.

        One whose job has come in again meanwhile is dropped: the job is in the queue.
        """
        found = 0
        for sequence in sequences:
            rows = self._execute(_REQUEUE, (self._next_sequence, sequence)).fetchall()
            for (size,) in rows:
                self._next_sequence += 1
                self._count(records=1, size=size)
            found += self.purge_dead([sequence])
        return found

    def purge_dead(self, sequences: Sequence[int]) -> int:
        """Delete dead letters, and return how many there were."""
        found = self._delete("DELETE FROM dead WHERE sequence = ?", sequences)
        self._stats = evolve(self._stats, dead_records=self._stats.dead_records - found)
        return found

    def purge_corrupt(self, sequences: Sequence[int]) -> int:
        """Delete corrupt records, and return how many there were."""
        found = self._delete("DELETE FROM corrupt WHERE sequence = ?", sequences)
        self._stats = evolve(self._stats, corrupt_records=self._stats.corrupt_records - found)
        return found

    def expire_dead(self, now_ms: int) -> int:
        """Delete dead letters and corrupt records that are past their age, and return how many there were."""
        before_ms = now_ms - self._limits.dead_max_age_ms
        dead = self._execute("DELETE FROM dead WHERE set_aside_at_ms < ?", (before_ms,)).rowcount
        corrupt = self._execute("DELETE FROM corrupt WHERE set_aside_at_ms < ?", (before_ms,)).rowcount
        self._stats = evolve(
            self._stats,
            dead_records=self._stats.dead_records - dead,
            corrupt_records=self._stats.corrupt_records - corrupt,
        )
        return dead + corrupt

    # -- inside a transaction

    def _attempt(self, operation: Operation) -> Any:
        try:
            return operation(self)
        except SpoolUnavailable as refusal:
            return refusal

    def _execute(self, statement: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        return self._open().execute(statement, values)

    def _settle(self, before: SpoolStats) -> None:
        """Bring the totals up to date, in the same transaction as what they count."""
        stats = self._stats
        if _totals(stats) != _totals(before):
            self._execute(_SET_TOTALS, _totals(stats))
        row = self._execute("SELECT received_at_ms FROM live ORDER BY sequence LIMIT 1").fetchone()
        oldest_received_at_ms = None if row is None else row[0]
        problem = self._why_full(self._wanted_bytes)
        if problem is None:
            self._wanted_bytes = 1
        self._stats = evolve(stats, oldest_received_at_ms=oldest_received_at_ms, problem=problem)

    def _why_full(self, size: int) -> str | None:
        if self._stats.bytes + size > self._limits.max_bytes:
            return "full"
        if size > self._room_bytes:
            return "disk full"
        return None

    def _holds(self, job: Job) -> bool:
        found = self._execute("SELECT 1 FROM live WHERE queue = ? AND job_id = ?", (job.queue, job.id))
        return found.fetchone() is not None

    def _move(self, statement: str, sequence: int, reason: str, now_ms: int) -> bool:
        self._execute(statement, (reason, now_ms, sequence))
        return self._delete_live(sequence)

    def _delete_live(self, sequence: int) -> bool:
        rows = self._execute(_DELETE, (sequence,)).fetchall()
        self._untidy = True
        for (size,) in rows:
            self._count(records=-1, size=-size)
        return bool(rows)

    def _delete(self, statement: str, sequences: Sequence[int]) -> int:
        self._untidy = True
        return sum(self._execute(statement, (sequence,)).rowcount for sequence in sequences)

    def _count(self, *, records: int, size: int) -> None:
        stats = self._stats
        self._stats = evolve(stats, records=stats.records + records, bytes=stats.bytes + size)

    # -- the file

    def _beside(self, suffix: str) -> Path:
        return self._path.with_name(self._path.name + suffix)

    def _open(self) -> sqlite3.Connection:
        if self._connection is not None:
            return self._connection
        if self._path.exists() and self._beside(".old").exists():
            self._keep_evidence()  # a crash after step 3
        if self._damaged or not self._path.exists():
            self._begin_anew()
        self._connection = self._open_file()
        return self._connection

    def _open_file(self) -> sqlite3.Connection:
        if self._path.stat().st_size == 0:
            raise _Damage("file is empty")
        is_resealed = self._write_again(self._beside("-wal"))
        connection = self._connect(self._path)
        try:
            if is_resealed:
                _check_structure(connection)
            connection.text_factory = _lenient_text
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA secure_delete = ON")
            connection.execute("PRAGMA journal_size_limit = 16777216")
            self._stats = _take_stock(connection)
            (highest,) = connection.execute(_HIGHEST).fetchone()
        except BaseException:
            connection.close()
            raise
        self._next_sequence = max(self._next_sequence, highest + 1)
        return connection

    def _write_again(self, wal: Path) -> bool:
        """Write a WAL that was left behind over itself, and fsync it; true if it was damaged.

        Its last frames may be of a group whose fsync failed. The kernel then takes the pages for clean and
        never writes them, yet SQLite would read them back, and put new groups behind them that a power
        failure cuts off. Written again they are durable like the rest; or this fails, and nothing is opened.

        Damage in its middle would make SQLite forget what comes behind it. As it was, it is kept for
        inspection.
        """
        try:
            content = wal.read_bytes()
        except FileNotFoundError:
            return False
        resealed = reseal(content)
        if resealed is None:
            _write_durably(wal, content)
            return False
        kept = self._name_for_evidence()
        kept = kept.with_name(f"{kept.name}-wal")
        _write_durably(kept, content)
        _log.critical("a damaged WAL of a spool is kept as {path}, and read to its end", path=str(kept))
        new = self._beside(".new-wal")
        new.unlink(missing_ok=True)
        _write_durably(new, resealed)
        new.rename(wal)
        fsync_directory(wal.parent)
        return True

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
        if _code(error) in _DAMAGE:
            _log.critical("spool file {path} is damaged: {error}", path=str(self._path), error=str(error))
            self._damaged = True
        return "disk full" if _code(error) == sqlite3.SQLITE_FULL else f"broken: {error}"

    def _abandon(self) -> None:
        """Close the connection, and forget what was not committed.

        SQLite then writes the WAL back up to the last commit that worked, and not what a failed fsync
        left behind it; if it cannot, the WAL stays for `_write_again`.
        """
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(sqlite3.Error):
                connection.close()

    # -- a new file, and what was in the old one

    def _begin_anew(self) -> None:
        """Put a new file in place; see the steps at the top of this module."""
        for suffix in ("", "-wal", "-journal"):
            with suppress(FileNotFoundError):
                self._beside(suffix).rename(self._beside(".old" + suffix))
        for suffix in (".new", ".new-wal", ".new-journal"):
            self._beside(suffix).unlink(missing_ok=True)
        new, old = self._beside(".new"), self._beside(".old")
        os.close(os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        new.chmod(0o600)  # whatever the umask took away; the WAL gets the same mode from SQLite
        with closing(self._connect(new)) as connection:
            connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
            connection.execute("PRAGMA journal_mode = MEMORY")  # it counts only when it has its name
            connection.executescript(_SCHEMA)
            if old.exists():
                carried = _salvage(old, connection)
                _log.critical("{carried} rows of a damaged spool file were saved", carried=carried)
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            connection.execute("PRAGMA journal_mode = WAL")
        new.rename(self._path)
        fsync_directory(self._path.parent)
        self._damaged = False
        if any(self._beside(".old" + suffix).exists() for suffix in ("", "-wal", "-journal")):
            self._keep_evidence()

    def _keep_evidence(self) -> None:
        self._beside(".old-shm").unlink(missing_ok=True)  # SQLite's index of the WAL, made for the salvage
        kept = self._name_for_evidence()
        # The main file goes last: as long as it is there, this is done again.
        for suffix in ("-wal", "-journal", ""):
            with suppress(FileNotFoundError):
                self._beside(".old" + suffix).rename(kept.with_name(kept.name + suffix))
        _log.critical("the damaged spool file is kept as {path}", path=str(kept))

    def _name_for_evidence(self) -> Path:
        names = (self._beside(f".corrupt-{number}") for number in count(1))
        return next(
            name for name in names if not name.exists() and not name.with_name(f"{name.name}-wal").exists()
        )


def _write_durably(path: Path, content: bytes) -> None:
    """Write a file, or write over what is in it, and fsync it."""
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _check_structure(connection: sqlite3.Connection) -> None:
    """:raises _Damage: tables and indices are not whole."""
    if connection.execute("PRAGMA integrity_check(1)").fetchone() != ("ok",):
        raise _Damage("its structure is not whole")


class _Damage(sqlite3.DatabaseError):
    """The structure of a file is broken, by our own finding."""

    sqlite_errorcode = sqlite3.SQLITE_CORRUPT


def _code(error: sqlite3.Error) -> int:
    """The primary result code of an SQLite error; 0 where it is one of the sqlite3 module itself."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _lenient_text(text: bytes) -> str:
    """Text columns are for look-up and for people; a flipped bit in one must not hide its row."""
    return text.decode(errors="replace")


def _totals(stats: SpoolStats) -> tuple[int, int, int, int]:
    return stats.records, stats.bytes, stats.dead_records, stats.corrupt_records


def _take_stock(connection: sqlite3.Connection) -> SpoolStats:
    """What a database holds, by its totals; they are made anew where they cannot be true."""
    totals = connection.execute(_GET_TOTALS).fetchone()
    if totals is None:
        raise _Damage("totals are missing")
    (records,) = connection.execute("SELECT count(*) FROM live").fetchone()  # asks the index, which is small
    if totals[0] != records:
        connection.execute(_COUNT_TOTALS)
        totals = connection.execute(_GET_TOTALS).fetchone()
    records, size, dead, corrupt = totals
    return evolve(EMPTY, records=records, bytes=size, dead_records=dead, corrupt_records=corrupt)


def _salvage(old: Path, new: sqlite3.Connection) -> int:
    """Copy all rows of a damaged file that can be read, good or not, and return how many."""
    carried = 0
    with closing(sqlite3.connect(f"file:{quote(str(old))}?mode=ro", uri=True)) as source:
        source.text_factory = _lenient_text
        new.execute("BEGIN")
        for upwards, downwards, insert in _SALVAGE:
            for row in _readable_rows(source, upwards, downwards):
                carried += new.execute(insert, row).rowcount
        new.execute(_COUNT_TOTALS)
        new.execute("COMMIT")
    return carried


def _readable_rows(source: sqlite3.Connection, upwards: str, downwards: str) -> Iterator[tuple[Any, ...]]:
    """The rows of a table, from both ends past what cannot be read; some of them twice."""
    for select, start, step in ((upwards, 0, 1), (downwards, 1 << 62, -1)):
        at, failures = start, 0
        while failures < _SALVAGE_PATIENCE:
            try:
                row = source.execute(select, (at,)).fetchone()
            except sqlite3.DatabaseError as error:
                if _code(error) not in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_IOERR):
                    return  # it is not SQLite's at all, or the table is not there
                at, failures = at + step, failures + 1
                continue
            if row is None:
                return
            yield row
            at, failures = row[0] + step, 0

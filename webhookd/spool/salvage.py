"""The making of a spool's file, and the repair of a damaged one.

If a file is damaged as a whole (it is not SQLite's, or its structure is broken), a new one replaces it. After
a crash between any two of these steps, the next opening continues:

1. the database and its WAL are renamed to ``*.old``;
2. ``*.new`` is built, with every row of ``*.old`` that can still be read;
3. ``*.new`` is renamed to the database's name;
4. ``*.old`` is renamed to ``*.corrupt-<n>``, and stays until an operator has looked at it.

A first start is steps 2 and 3, with nothing to carry over. So an empty file is never a new one: it is
damaged too.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import quote

from twisted.logger import Logger

from webhookd.spool.directory import fsync_directory
from webhookd.spool.schema import COUNT_TOTALS, SCHEMA, Table, in_table
from webhookd.spool.wal import repair

# One row per query, from either end: Python's cursors read one row ahead, and lose the row before one that
# cannot be read.
_NEXT_ROW = "SELECT * FROM $table WHERE sequence >= ? ORDER BY sequence LIMIT 1"
_PREVIOUS_ROW = "SELECT * FROM $table WHERE sequence <= ? ORDER BY sequence DESC LIMIT 1"
_INSERT = "INSERT OR IGNORE INTO $table VALUES ($values)"
# After this many unreadable sequences in a row, the rest in this direction is given up.
_MAX_FAILURES = 20_000
_FILES = ("", "-wal", "-journal")  # of one database

_log = Logger()


class Damage(sqlite3.DatabaseError):
    """A broken structure of a file that webhookd found, not SQLite."""

    sqlite_errorcode = sqlite3.SQLITE_CORRUPT


def primary_code(error: sqlite3.Error) -> int:
    """Return the primary result code of an SQLite error; 0 if the sqlite3 module itself raised it."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def lenient_text(text: bytes) -> str:
    """Decode a text column.

    These columns serve look-ups and people, so a flipped bit in one must not hide its row.
    """
    return text.decode(errors="replace")


def sibling(path: Path, suffix: str) -> Path:
    """Return the path of a file in the same directory, with ``suffix`` added to the name."""
    return path.with_name(path.name + suffix)


def make_database(path: Path, connect: Callable[[Path], sqlite3.Connection]) -> None:
    """Put a new database in place, by the steps at the top of this module."""
    old, new = sibling(path, ".old"), sibling(path, ".new")
    for suffix in _FILES:
        with suppress(FileNotFoundError):
            sibling(path, suffix).rename(sibling(old, suffix))
        sibling(new, suffix).unlink(missing_ok=True)
    os.close(os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    new.chmod(0o600)  # despite the umask; SQLite gives the WAL the same mode
    with closing(connect(new)) as connection:
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        connection.execute("PRAGMA journal_mode = MEMORY")  # a crash before the renaming loses nothing
        connection.executescript(SCHEMA)
        if old.exists():
            carried = _carry_over(old, connection)
            _log.critical("{carried} rows of a damaged spool file were saved", carried=carried)
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        connection.execute("PRAGMA journal_mode = WAL")
    new.rename(path)
    fsync_directory(path.parent)
    keep_evidence(path)


def keep_evidence(path: Path) -> None:
    """Do step 4, if a damaged database was replaced."""
    old = sibling(path, ".old")
    if not any(sibling(old, suffix).exists() for suffix in _FILES):
        return
    sibling(old, "-shm").unlink(missing_ok=True)  # SQLite's index of the WAL, from reading the old file
    kept = _name_for_evidence(path)
    # The main file goes last: while it is there, the next opening repeats this.
    for suffix in reversed(_FILES):
        with suppress(FileNotFoundError):
            sibling(old, suffix).rename(sibling(kept, suffix))
    _log.critical("the damaged spool file is kept as {path}", path=str(kept))


def write_again(path: Path) -> bool:
    """Write the WAL of a database over itself, and fsync it; return whether it was damaged.

    Its last frames may be of a group whose fsync failed. The kernel then takes the pages for clean and
    never writes them, yet SQLite would read them back, and put new groups after them that a power
    failure cuts off. Written again they are durable like the rest; or this fails, and nothing is opened.

    Its torn end is cut off. Because of damage in its middle, SQLite would ignore everything after it. So
    `repair` mends the WAL, and the damaged one is kept for inspection.
    """
    wal = sibling(path, "-wal")
    try:
        content = wal.read_bytes()
    except FileNotFoundError:
        return False
    repaired, is_damaged = repair(content)
    if not is_damaged:
        _write_durably(wal, repaired)
        return False
    kept = sibling(_name_for_evidence(path), "-wal")
    _write_durably(kept, content)
    _log.critical("a damaged WAL of a spool is kept as {path}, and read to its end", path=str(kept))
    new = sibling(path, ".new-wal")
    new.unlink(missing_ok=True)
    _write_durably(new, repaired)
    new.rename(wal)
    fsync_directory(wal.parent)
    return True


def check_structure(connection: sqlite3.Connection) -> None:
    """Check that tables and indices are intact.

    :raises Damage: they are not.
    """
    if connection.execute("PRAGMA integrity_check(1)").fetchone() != ("ok",):
        raise Damage("its structure is broken")


def _name_for_evidence(path: Path) -> Path:
    names = (sibling(path, f".corrupt-{number}") for number in count(1))
    return next(name for name in names if not name.exists() and not sibling(name, "-wal").exists())


def _write_durably(path: Path, content: bytes) -> None:
    """Write a file, or write over what is in it and cut off the rest, and fsync it."""
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
        file.write(content)
        file.truncate()
        file.flush()
        os.fsync(file.fileno())


def _carry_over(old: Path, new: sqlite3.Connection) -> int:
    """Copy all rows of a damaged file that can be read, good or not; return their number."""
    carried = 0
    with closing(sqlite3.connect(f"file:{quote(str(old))}?mode=ro", uri=True)) as source:
        source.text_factory = lenient_text
        new.execute("BEGIN")
        for table in Table:
            for row in _readable_rows(source, table):
                insert = in_table(table, _INSERT).replace("$values", ", ".join("?" * len(row)))
                carried += new.execute(insert, row).rowcount
        new.execute(COUNT_TOTALS)
        new.execute("COMMIT")
    return carried


def _readable_rows(source: sqlite3.Connection, table: Table) -> Iterator[tuple[Any, ...]]:
    """Yield the rows of a table, from both ends past what cannot be read; some of them twice."""
    for select, start, step in ((_NEXT_ROW, 0, 1), (_PREVIOUS_ROW, 1 << 62, -1)):
        at, failures = start, 0
        while failures < _MAX_FAILURES:
            try:
                row = source.execute(in_table(table, select), (at,)).fetchone()
            except sqlite3.DatabaseError as error:
                if primary_code(error) not in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_IOERR):
                    return  # it is no SQLite file, or the table is missing
                at, failures = at + step, failures + 1
                continue
            if row is None:
                return
            yield row
            at, failures = row[0] + step, 0

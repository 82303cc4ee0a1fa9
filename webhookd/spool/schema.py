"""The tables of a spool's database."""

from __future__ import annotations

from enum import Enum


class Table(Enum):
    """The table of a record: the queue itself, the dead letters, or the damaged records."""

    LIVE = "live"
    DEAD = "dead"
    CORRUPT = "corrupt"


def in_table(table: Table, statement: str) -> str:
    """Replace ``$table`` in an SQL statement by the name of a table."""
    return statement.replace("$table", table.value)


SCHEMA = """
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
# Every transaction keeps the totals up to date: counting a full spool at start can take half a minute.
COUNT_TOTALS = """
UPDATE totals SET (records, bytes) = (SELECT count(*), coalesce(sum(length(record)), 0) FROM live),
dead = (SELECT count(*) FROM dead), corrupt = (SELECT count(*) FROM corrupt)
"""

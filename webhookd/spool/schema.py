"""The tables of a spool's database."""

from __future__ import annotations

from enum import Enum


class Table(Enum):
    """Where a record is: in the queue, among the dead letters, or among those that are damaged."""

    LIVE = "live"
    DEAD = "dead"
    CORRUPT = "corrupt"


def in_table(table: Table, statement: str) -> str:
    """A statement of SQL with the name of a table in the place of ``$table``."""
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
# What the tables hold, kept in step by each transaction: to count a full spool at start can take half a
# minute.
COUNT_TOTALS = """
UPDATE totals SET (records, bytes) = (SELECT count(*), coalesce(sum(length(record)), 0) FROM live),
dead = (SELECT count(*) FROM dead), corrupt = (SELECT count(*) FROM corrupt)
"""

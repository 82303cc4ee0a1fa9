"""All rows of the table: each fault, its scenario, and the expected result."""

from __future__ import annotations

from collections.abc import Mapping

from tests.faults.bench import Row

from . import disks, processes, redis, senders

ROWS: Mapping[str, Row] = {
    row.name: row for row in (*redis.ROWS, *processes.ROWS, *disks.ROWS, *senders.ROWS)
}
"""All rows by name, in the order of the table."""

"""The requests of operators, to an open spool, and to the spool of a dead replica."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec

from tests.support.spools import as_after_a_crash, make_job
from tests.unit.spool.case import SpoolCase
from webhookd.spool.database import connect_to_read
from webhookd.spool.record import decode_record, encode_record
from webhookd.spool.requests import (
    MAX_SEQUENCE,
    PAGE,
    CheckFile,
    GetTotals,
    ListRecords,
    Purge,
    Requeue,
    SpoolRequest,
    StoredRecord,
    Totals,
)
from webhookd.spool.schema import Table

REQUESTS = [
    GetTotals(),
    ListRecords(Table.DEAD, 3, 5),
    ListRecords(Table.CORRUPT, 7, with_content=True),
    CheckFile(full=True),
    Requeue([1, 2]),
    Purge(Table.LIVE, [3]),
]


class RequestCase(SpoolCase):
    def setUp(self) -> None:
        super().setUp()
        self.spool = self.open()

    def fill(self, *numbers: int, data: bytes = b"{}") -> None:
        for number in numbers:
            self.now(self.spool.append(make_job(number, data=data)))

    def ask(self, request: SpoolRequest) -> Any:
        """Return the spool's answer, encoded and decoded as for the socket."""
        sent = msgspec.json.decode(msgspec.json.encode(request), type=SpoolRequest)
        answer = msgspec.json.encode(self.now(self.spool.do(sent)))
        return msgspec.json.decode(answer, type=request.answer_type)

    def rows(self, table: Table) -> list[int]:
        return [row.sequence for row in self.ask(ListRecords(table))]


class RequestTests(RequestCase):
    def test_a_sequence_that_sqlite_does_not_know_is_refused_before_it_fails_a_group(self) -> None:
        kinds: list[Callable[[int], SpoolRequest]] = [
            lambda sequence: Requeue([sequence]),
            lambda sequence: Purge(Table.LIVE, [sequence]),
            lambda sequence: ListRecords(Table.LIVE, sequence),
        ]
        for request in kinds:
            self.ask(request(MAX_SEQUENCE))
            with self.assertRaises(msgspec.ValidationError):
                self.ask(request(MAX_SEQUENCE + 1))

    def test_each_arrives_as_it_was_sent(self) -> None:
        for request in REQUESTS:
            self.assertEqual(msgspec.json.decode(msgspec.json.encode(request), type=SpoolRequest), request)

    def test_none_asks_for_more_than_a_page(self) -> None:
        for request in (
            ListRecords(Table.LIVE, 0, PAGE + 1),
            Requeue([1] * (PAGE + 1)),
            Purge(Table.DEAD, [1] * (PAGE + 1)),
        ):
            text = msgspec.json.encode(request)
            self.assertRaises(msgspec.ValidationError, msgspec.json.decode, text, type=SpoolRequest)

    def test_totals(self) -> None:
        self.fill(1, 2, 3)
        self.now(self.spool.bury(1, "no"))
        size = sum(len(encode_record(make_job(number, data=b"{}"))) for number in (2, 3))
        records = {Table.LIVE: 2, Table.DEAD: 1, Table.CORRUPT: 0}
        last = {Table.LIVE: 3, Table.DEAD: 1, Table.CORRUPT: 0}
        self.assertEqual(self.ask(GetTotals()), Totals(size, make_job(2).timestamp_ms, records, last))

    def test_rows_have_no_content_unless_it_is_asked_for(self) -> None:
        self.fill(1)
        record = encode_record(make_job(1, data=b"{}"))
        row = StoredRecord(1, "chatwoot", make_job(1).id, make_job(1).timestamp_ms, len(record), None, None)
        self.assertEqual(self.ask(ListRecords(Table.LIVE)), [row])
        (row,) = self.ask(ListRecords(Table.LIVE, with_content=True))
        self.assertEqual(decode_record(row.content), make_job(1, data=b"{}"))

    def test_content_comes_in_pages_of_a_mebibyte(self) -> None:
        self.fill(1, 2, 3, 4, data=bytes(400_000))
        self.fill(5, data=bytes(3_000_000))
        pages, after = [], 0
        while rows := self.ask(ListRecords(Table.LIVE, after, with_content=True)):
            pages.append([row.sequence for row in rows])
            after = rows[-1].sequence
        self.assertEqual(pages, [[1, 2], [3, 4], [5]])

    def test_each_table_can_be_purged(self) -> None:
        self.fill(1, 2, 3, 4)
        self.now(self.spool.bury(1, "no"))
        with closing(sqlite3.connect(self.database_of(self.spool))) as connection:
            connection.execute("UPDATE live SET record = x'00' WHERE sequence = 2")
            connection.commit()
        self.spool = self.open()
        self.now(self.spool.first(10, 1 << 20))
        self.assertEqual([self.rows(table) for table in Table], [[3, 4], [1], [2]])
        for table, sequences in ((Table.LIVE, [3, 99]), (Table.DEAD, [1]), (Table.CORRUPT, [2])):
            self.assertEqual(self.ask(Purge(table, sequences)), 1)
        self.assertEqual([self.rows(table) for table in Table], [[4], [], []])
        stats = self.spool.stats
        self.assertEqual((stats.records, stats.dead_records, stats.corrupt_records), (1, 0, 0))

    def test_a_damaged_row_is_a_row(self) -> None:
        self.fill(1)
        self.now(self.spool.bury(1, "no"))
        with closing(sqlite3.connect(self.database_of(self.spool))) as connection:
            connection.execute(
                "UPDATE dead SET queue = NULL, received_at_ms = 'x', record = NULL, reason = 7"
            )
            connection.commit()
        self.spool = self.open()
        (row,) = self.ask(ListRecords(Table.DEAD, with_content=True))
        self.assertEqual((row.queue, row.received_at_ms, row.size_bytes, row.reason), ("", 0, 0, "7"))

    def test_a_large_file_is_checked_only_if_no_event_waits(self) -> None:
        self.fill(1)
        self.assertEqual(self.ask(CheckFile()), [])
        self.fill(2, 3, 4, data=bytes(12_000_000))
        self.assertEqual(self.ask(CheckFile()), None)
        self.assertEqual(self.ask(CheckFile(full=True)), [])


class DeadReplicaTests(RequestCase):
    def contents(self, directory: Path) -> Mapping[str, bytes]:
        return {path.name: path.read_bytes() for path in directory.iterdir()}

    def after_its_death(self) -> Path:
        copy = as_after_a_crash(self.root, self.root.parent / "after the crash")
        (directory,) = copy.iterdir()
        return directory

    def records(self, directory: Path) -> int:
        with closing(connect_to_read(directory / "spool.sqlite")) as connection:
            return GetTotals().answer(connection).records[Table.LIVE]

    def test_what_its_wal_holds_is_read_and_nothing_is_changed(self) -> None:
        self.fill(1, 2, 3)
        directory = self.after_its_death()
        before = self.contents(directory)
        self.assertGreater(len(before["spool.sqlite-wal"]), 0)
        self.assertEqual(self.records(directory), 3)
        self.assertEqual(self.contents(directory), before)

    def test_one_that_ended_well_is_not_changed_either(self) -> None:
        self.fill(1)
        self.now(self.spool.close())
        before = self.contents(self.spool.directory.path)
        self.assertEqual(sorted(before), ["lock", "spool.sqlite"])
        self.assertEqual(self.records(self.spool.directory.path), 1)
        self.assertEqual(self.contents(self.spool.directory.path), before)

    def test_one_that_never_began_holds_nothing(self) -> None:
        directory = self.after_its_death()
        for path in directory.glob("spool.sqlite*"):
            path.unlink()
        self.assertEqual(self.records(directory), 0)

    def test_one_whose_repair_was_cut_short_is_not_empty(self) -> None:
        self.fill(1)
        directory = self.after_its_death()
        for path in directory.glob("spool.sqlite*"):
            path.rename(path.with_name(path.name.replace("sqlite", "sqlite.old")))
        self.assertRaises(sqlite3.DatabaseError, self.records, directory)

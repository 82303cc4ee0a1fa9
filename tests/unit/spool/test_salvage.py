"""Damage to a spool's file, or to its WAL."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import mkdtemp

from twisted.logger import LogLevel

from tests.support.spools import Replica, as_after_a_crash, make_job
from tests.unit.spool.case import SpoolCase, names_in
from webhookd.model import Job, Outcome
from webhookd.spool.database import SpoolLimits
from webhookd.spool.queue import Spool
from webhookd.spool.requests import ListRecords
from webhookd.spool.schema import Table
from webhookd.spool.wal import repair


class DamageTests(SpoolCase):
    """Records are so large that a page of the file holds only a few."""

    DATA = b"x" * 1500

    def fill(self, count: int) -> Path:
        """Return the closed file of a spool with ``count`` records."""
        spool = self.open()
        for number in range(count):
            self.now(spool.append(make_job(number, data=self.DATA)))
        return self.database_of(spool)

    def flip(self, database: Path, offset: int, length: int = 1) -> None:
        with database.open("r+b") as file:
            file.seek(offset)
            content = file.read(length)
            file.seek(offset)
            file.write(bytes(byte ^ 0xFF for byte in content))

    def evidence(self, database: Path) -> list[str]:
        return sorted(path.name for path in database.parent.glob("*.corrupt-*[0-9]"))

    def test_a_corrupt_record_is_set_aside_and_the_rest_drains(self) -> None:
        database = self.fill(30)
        content = database.read_bytes()
        self.flip(database, content.index(make_job(17).id.encode() + b'"'))
        spool = self.open()
        self.assertEqual(self.held(spool), [number for number in range(30) if number != 17])
        self.assertEqual((spool.stats.records, spool.stats.corrupt_records), (29, 1))
        self.assertEqual(self.evidence(database), [])
        self.now(spool.close())
        self.assertEqual(self.open().stats, spool.stats)

    def test_corrupt_records_expire_like_dead_letters(self) -> None:
        database = self.fill(1)
        self.flip(database, database.read_bytes().index(self.DATA))
        replica = self.replica(limits=SpoolLimits(min_free_bytes=0, dead_max_age_ms=1000))
        spool = self.now(replica.spools.open_own())
        self.assertEqual(self.held(spool), [])
        replica.clock.advance(1.5)
        self.now(spool.expire_dead())
        self.assertEqual(spool.stats.corrupt_records, 0)

    def test_a_page_that_is_broken_costs_its_records_alone(self) -> None:
        database = self.fill(200)
        page = database.read_bytes().index(make_job(100).id.encode() + b'"') // 4096 * 4096
        self.flip(database, page, 16)
        spool = self.open()
        held = self.held(spool)  # finds the damage, and reads again
        lost = set(range(200)) - set(held)
        self.assertEqual(held, sorted(held))
        self.assertIn(100, lost)
        self.assertLessEqual(len(lost), 2)
        self.assertEqual(spool.stats.records, len(held))
        self.assertEqual(self.evidence(database), ["spool.sqlite.corrupt-1"])
        self.assertEqual([name for name in names_in(database.parent) if ".old" in name], [])
        self.append(spool, 1000)
        self.assertGreater(self.logged_at(LogLevel.critical), 0)

    def test_a_broken_first_or_last_page_too(self) -> None:
        for number, lost_at_most in ((0, 2), (199, 2)):
            database = self.fill(200)
            page = database.read_bytes().index(make_job(number).id.encode() + b'"') // 4096 * 4096
            self.flip(database, page, 16)
            spool = self.open()
            self.assertGreaterEqual(len(self.held(spool)), 200 - lost_at_most)
            self.now(spool.close())
            shutil.rmtree(self.root)

    def test_a_file_that_is_not_a_database_is_replaced(self) -> None:
        for garbage in (b"", b"no database, but some text that is long enough" * 100):
            database = self.fill(3)
            database.write_bytes(garbage)
            spool = self.open()
            self.assertEqual(self.held(spool), [])
            self.append(spool, 1)
            self.assertEqual(self.evidence(database), ["spool.sqlite.corrupt-1"])
            self.assertEqual((database.parent / "spool.sqlite.corrupt-1").read_bytes(), garbage)
            self.now(spool.close())
            shutil.rmtree(self.root)

    def test_evidence_is_not_overwritten_and_keeps_the_directory(self) -> None:
        database = self.fill(1)
        for _ in range(2):
            database.write_bytes(b"")
            self.now(self.open().close())
        self.assertEqual(self.evidence(database), ["spool.sqlite.corrupt-1", "spool.sqlite.corrupt-2"])

    def test_a_crash_in_each_step_of_the_replacement(self) -> None:
        replacements = {
            "the WAL is not renamed yet": {"spool.sqlite": ".old", "spool.sqlite-wal": "-wal"},
            "all is renamed": {"spool.sqlite": ".old", "spool.sqlite-wal": ".old-wal"},
        }
        for name, renamed in replacements.items():
            spool = self.open()
            self.append(spool, 1, 2, 3)
            copy = as_after_a_crash(self.root, self.root.parent / name)
            directory = copy / spool.directory.path.name
            for old, suffix in renamed.items():
                (directory / old).rename(directory / f"spool.sqlite{suffix}")
            (directory / "spool.sqlite.new").write_bytes(b"half of it")
            after = self.now(Replica(copy).spools.open_own())
            self.assertEqual(after.directory.path, directory, name)
            self.assertEqual(self.held(after), [1, 2, 3], name)
            self.assertEqual(self.evidence(after.directory.database)[:1], ["spool.sqlite.corrupt-1"], name)
            self.now(spool.remove(self.sequences(spool)))
            self.now(spool.close())

    def test_a_crash_before_the_evidence_has_its_name(self) -> None:
        database = self.fill(3)
        (database.parent / "spool.sqlite.old").write_bytes(b"the damaged one")
        spool = self.open()
        self.assertEqual(self.held(spool), [0, 1, 2])
        self.assertEqual(self.evidence(database), ["spool.sqlite.corrupt-1"])
        self.assertEqual((database.parent / "spool.sqlite.corrupt-1").read_bytes(), b"the damaged one")

    def test_dead_letters_are_carried_over(self) -> None:
        spool = self.open()
        self.append(spool, *range(100))
        self.now(spool.bury(self.sequences(spool)[0], "no"))
        database = self.database_of(spool)
        self.flip(database, database.read_bytes().index(make_job(50).id.encode() + b'"') // 4096 * 4096, 16)
        spool = self.open()
        self.held(spool)
        self.assertEqual([letter.reason for letter in self.now(spool.do(ListRecords(Table.DEAD)))], ["no"])
        self.assertEqual(spool.stats.dead_records, 1)


class WalTests(SpoolCase):
    """A replica is killed, and then a bit of its WAL flips."""

    COUNT = 8
    FRAMES_OF_A_COMMIT = 3
    FRAME_BYTES = 24 + 4096

    def setUp(self) -> None:
        super().setUp()
        spool = self.open()
        for number in range(self.COUNT):
            self.append(spool, number)  # one commit each
        self.database = spool.directory.database
        self.wal = self.database.with_name("spool.sqlite-wal").read_bytes()
        self.last_commit_at = len(self.wal) - self.FRAMES_OF_A_COMMIT * self.FRAME_BYTES

    def restart_on(self, wal: bytes) -> tuple[Spool, int]:
        """Return the spool that the next replica opens, and the number of critical lines it logs."""
        self.database.with_name("spool.sqlite-wal").write_bytes(wal)
        copy = Path(mkdtemp(dir=self.root.parent)) / "spool"
        before = self.logged_at(LogLevel.critical)
        spool = self.now(Replica(as_after_a_crash(self.root, copy)).spools.open_own())
        return spool, self.logged_at(LogLevel.critical) - before

    def flipped(self, offset: int) -> bytes:
        return self.wal[:offset] + bytes([self.wal[offset] ^ 0x10]) + self.wal[offset + 1 :]

    def test_a_flipped_bit_cuts_nothing_off(self) -> None:
        in_heads = [32 + frame * self.FRAME_BYTES + byte for frame in (0, 4, 11) for byte in range(0, 24, 3)]
        for offset in (26, *in_heads, *range(60, self.last_commit_at, 1999)):
            spool, criticals = self.restart_on(self.flipped(offset))
            self.assertEqual(self.held(spool), list(range(self.COUNT)), offset)
            self.assertEqual(self.now(spool.append(make_job(3))).outcome, Outcome.ALREADY_QUEUED)
            self.append(spool, 1000)
            self.assertGreater(criticals, 0, offset)
            kept = spool.directory.path / "spool.sqlite.corrupt-1-wal"
            self.assertEqual(kept.read_bytes(), self.flipped(offset))

    def test_a_damaged_record_in_it_is_set_aside(self) -> None:
        name = make_job(3).id.encode() + b'", "name"'
        wal = self.wal.replace(name, name.swapcase())  # in each copy of its page
        spool, criticals = self.restart_on(wal)
        self.assertEqual(self.held(spool), [0, 1, 2, 4, 5, 6, 7])
        self.assertEqual((spool.stats.corrupt_records, criticals), (1, 1))

    def test_what_a_crash_tore_is_not_damage(self) -> None:
        for cut in range(self.last_commit_at, len(self.wal) - 512, 499):
            for torn in (self.wal[:cut], self.wal[:cut] + b"garbage." * 64 + self.wal[cut + 512 :]):
                spool, criticals = self.restart_on(torn)
                self.assertEqual((self.held(spool), criticals), (list(range(self.COUNT - 1)), 0), cut)


class HeaderTests(SpoolCase):
    def test_a_wal_with_damaged_salts_or_sums_in_its_header_is_never_cut_in_silence(self) -> None:
        spool = self.open()
        self.append(spool, 1, 2)
        wal = spool.directory.database.with_name("spool.sqlite-wal").read_bytes()
        for bit in range(8 * 16, 8 * 32):
            damaged = bytearray(wal)
            damaged[bit // 8] ^= 1 << bit % 8
            repaired, is_damaged = repair(bytes(damaged))
            with self.subTest(bit=bit):
                self.assertTrue(is_damaged or repaired == damaged)


class RepeatedCrashTests(SpoolCase):
    """The power fails while a group is written, and fails again after the restart."""

    def append_torn(self, spool: Spool, job: Job) -> Spool:
        """Append a job, but tear what the commit adds to the WAL; return the spool of the next replica."""
        wal = spool.directory.database.with_name("spool.sqlite-wal")
        before = wal.read_bytes()
        self.now(spool.append(job))
        after = wal.read_bytes()
        torn_at = 64 + next(at for at, byte in enumerate(after) if before[at : at + 1] != bytes([byte]))
        self.root = as_after_a_crash(self.root, Path(mkdtemp(dir=self.root.parent)) / "spool")
        (self.root / wal.parent.name / wal.name).write_bytes(
            after[:torn_at] + b"garbage." + after[torn_at + 8 :]
        )
        return self.open()

    def test_what_a_crash_tore_does_not_pass_for_commits_after_the_next_crash(self) -> None:
        spool = self.open()
        self.append(spool, 1, 2, 3)
        spool = self.append_torn(spool, make_job(4, data=b"x" * 100_000))
        self.append(spool, 5, 6)
        spool = self.append_torn(spool, make_job(7))
        self.assertEqual(self.held(spool), [1, 2, 3, 5, 6])
        self.assertEqual(self.logged_at(LogLevel.critical), 0)

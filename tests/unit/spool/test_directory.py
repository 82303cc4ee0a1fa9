"""The directories of replicas, their locks, and the file systems that a spool accepts."""

from __future__ import annotations

import contextlib
import fcntl
import sys
import threading
from pathlib import Path

from twisted.logger import LogLevel

from tests.unit.spool.case import SpoolCase, names_in
from webhookd.model import ConfigError
from webhookd.spool.database import SpoolLimits
from webhookd.spool.directory import SpoolDirectory, SpoolRoot, file_system_type, hold


class DirectoryTests(SpoolCase):
    def test_each_replica_has_its_own_directory(self) -> None:
        one, other = self.open(), self.open()
        self.assertNotEqual(one.directory.path, other.directory.path)
        self.append(one, 1)
        self.append(other, 1)

    def test_a_replica_continues_with_what_it_finds(self) -> None:
        spool = self.open()
        self.append(spool, 1, 2)
        self.now(spool.close())
        again = self.open()
        self.assertEqual(again.directory.path, spool.directory.path)
        self.assertEqual(self.held(again), [1, 2])

    def test_an_empty_directory_is_removed(self) -> None:
        spool = self.open()
        self.append(spool, 1)
        self.now(spool.remove(self.sequences(spool)))
        self.now(spool.close())
        self.assertEqual(names_in(self.root), [])

    def test_a_socket_in_it_is_no_content(self) -> None:
        dead, replica = self.open(), self.replica()
        self.now(replica.spools.open_own())
        self.append(dead, 1)
        self.now(dead.close())
        (dead.directory.path / "control").touch()
        orphan = self.now(replica.spools.claim_orphan())
        assert orphan is not None
        self.now(orphan.remove(self.sequences(orphan)))
        self.now(orphan.close())
        self.assertFalse(dead.directory.path.exists())
        dead.directory.path.mkdir()
        (dead.directory.path / "control").touch()
        self.assertIsNone(self.now(replica.spools.claim_orphan()))
        self.assertFalse(dead.directory.path.exists())

    def test_holding_a_directory_changes_nothing(self) -> None:
        own = self.open(fingerprint="another Redis")
        path = own.directory.path
        self.assertIsNone(hold(path))
        self.append(own, 1)
        self.now(own.close())
        held = hold(path)
        assert held is not None
        self.assertIsNone(hold(path))
        self.assertIsNone(self.now(self.replica(fingerprint="another Redis").spools.claim_orphan()))
        held.release()
        self.assertEqual(names_in(path), ["lock", "spool.sqlite"])
        self.assertRaises(FileNotFoundError, hold, self.root / "replica-0")

    def test_an_orphan_is_claimed_by_one_and_removed_when_it_is_drained(self) -> None:
        one, other, dead = self.replica(), self.replica(), self.open()
        self.append(dead, 1)
        owns = [self.now(replica.spools.open_own()) for replica in (one, other)]
        self.assertIsNone(self.now(one.spools.claim_orphan()))
        self.now(dead.close())
        orphan = self.now(one.spools.claim_orphan())
        assert orphan is not None
        self.assertIsNone(self.now(other.spools.claim_orphan()))
        self.assertEqual(self.held(orphan), [1])
        self.now(orphan.remove(self.sequences(orphan)))
        self.now(orphan.close())
        self.assertIsNone(self.now(other.spools.claim_orphan()))
        self.assertEqual(set(self.root.iterdir()), {own.directory.path for own in owns})

    def test_an_orphan_that_is_not_drained_stays(self) -> None:
        replica, dead = self.replica(), self.open()
        self.now(replica.spools.open_own())
        self.append(dead, 1)
        self.now(dead.close())
        for _ in range(2):
            orphan = self.now(replica.spools.claim_orphan())
            assert orphan is not None
            self.assertEqual(self.held(orphan), [1])
            self.now(orphan.close())

    def test_dead_letters_alone_are_no_reason_to_claim(self) -> None:
        replica, dead = self.replica(limits=SpoolLimits(min_free_bytes=0, dead_max_age_ms=1000)), self.open()
        self.now(replica.spools.open_own())
        self.append(dead, 1)
        self.now(dead.bury(self.sequences(dead)[0], "no"))
        self.now(dead.close())
        self.assertIsNone(self.now(replica.spools.claim_orphan()))
        self.assertTrue(dead.directory.path.exists())
        replica.clock.advance(2)
        self.assertIsNone(self.now(replica.spools.claim_orphan()))
        self.assertFalse(dead.directory.path.exists())

    def test_another_ones_directory_is_left_alone_with_one_warning(self) -> None:
        other = self.open(fingerprint="another Redis")
        self.append(other, 1)
        self.now(other.close())
        content = other.directory.database.read_bytes()
        replica = self.replica()
        own = self.now(replica.spools.open_own())
        self.assertNotEqual(own.directory.path, other.directory.path)
        for _ in range(3):
            self.assertIsNone(self.now(replica.spools.claim_orphan()))
        self.assertEqual(self.logged_at(LogLevel.warn), 1)
        self.assertEqual(other.directory.database.read_bytes(), content)
        again = self.open(fingerprint="another Redis")
        self.assertEqual(self.held(again), [1])

    def test_a_directory_that_was_being_made_is_used_or_removed(self) -> None:
        for label in (None, b"", b'{"schema": 1, "finge'):
            for starts in (True, False):
                replica = self.replica()
                own = None if starts else self.now(replica.spools.open_own())
                path = self.root / "replica-0123456789abcdef"
                path.mkdir(parents=True)
                if label is not None:
                    (path / "lock").write_bytes(label)
                if own is None:
                    own = self.now(replica.spools.open_own())
                    self.assertEqual(own.directory.path, path)
                else:
                    self.assertIsNone(self.now(replica.spools.claim_orphan()))
                    self.assertFalse(path.exists())
                self.now(own.close())

    def test_other_things_below_the_root_are_not_touched(self) -> None:
        (self.root / "lost+found").mkdir(parents=True)
        (self.root / "replica-notes.txt").write_text("not a directory")
        self.append(self.open(), 1)
        self.assertEqual(names_in(self.root / "lost+found"), [])
        self.assertEqual((self.root / "replica-notes.txt").read_text(), "not a directory")

    def test_if_no_directory_can_be_made_that_is_an_error(self) -> None:
        self.root.write_text("in the way")
        self.assert_unavailable(self.replica().spools.open_own(), "broken")

    def test_no_two_ever_hold_one_directory(self) -> None:
        """A directory has one holder at a time, however fast it is made and removed.

        All threads want the same directory. Each that gets it checks that it is alone, and removes it.
        """
        errors: list[str] = []
        wanted = self.root / "replica-0123456789abcdef"

        def come_and_go(root: SpoolRoot) -> None:
            with contextlib.suppress(FileExistsError):
                wanted.mkdir()
            for directory in root.orphans():
                mine = directory.path / "mine"
                mine.touch(exist_ok=False)
                mine.unlink()
                directory.remove()

        def work() -> None:
            root = SpoolRoot(self.root, "ours", "")
            for _ in range(100):
                try:
                    come_and_go(root)
                except OSError as error:
                    errors.append(str(error))

        SpoolRoot(self.root, "ours", "").prepare()
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(errors, [])

    def test_a_lock_counts_for_nothing_once_its_file_is_removed(self) -> None:
        """While a replica is between open and flock, the holder goes, and a third replica comes."""
        root = SpoolRoot(self.root, "ours", "")
        root.prepare()
        for a_third_comes in (False, True):
            first = root.take()
            others: list[SpoolDirectory] = []

            def before_flock(frame: object, event: str, called: object) -> None:
                if event == "c_call" and called is fcntl.flock:
                    sys.setprofile(None)
                    first.remove()  # noqa: B023 - it is called in this turn of the loop
                    if a_third_comes:  # noqa: B023
                        first.path.mkdir()  # noqa: B023
                        others.extend(SpoolRoot(self.root, "ours", "").orphans())  # noqa: B023

            sys.setprofile(before_flock)
            self.assertEqual(list(root.orphans()), [])
            self.assertEqual([other.path for other in others], [first.path] * a_third_comes)
            for other in others:
                other.remove()
            self.assertEqual(names_in(self.root), [])

    def test_a_new_directory_may_be_taken_before_its_maker_has_it(self) -> None:
        taken: list[SpoolDirectory] = []
        stop = threading.Event()

        def take_and_remove() -> None:
            root = SpoolRoot(self.root, "ours", "")
            while not stop.is_set():
                for directory in root.orphans():
                    directory.remove()

        root = SpoolRoot(self.root, "ours", "")
        root.prepare()
        thread = threading.Thread(target=take_and_remove)
        thread.start()
        try:
            taken.extend(root.take() for _ in range(100))
        finally:
            stop.set()
            thread.join()
        self.assertEqual(len({directory.path for directory in taken if directory.is_vacant}), 100)


class FileSystemTests(SpoolCase):
    MOUNTINFO = (
        "22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n"
        "30 22 0:25 / /srv rw - nfs4 server:/srv rw\n"
        "31 30 0:26 / /srv/local\\040disk rw - xfs /dev/vdb rw\n"
        "32 22 0:27 / /mnt rw - ext4 /dev/vdc rw\n"
        "33 22 0:28 / /mnt rw master:2 - fuse.sshfs host: rw\n"
    )

    def test_the_innermost_and_last_mount_counts(self) -> None:
        for path, expected in {
            "/var/spool": "ext4",
            "/srv": "nfs4",
            "/srv/a/b": "nfs4",
            "/srvx": "ext4",
            "/srv/local disk/a": "xfs",
            "/mnt/a": "fuse.sshfs",
        }.items():
            self.assertEqual(file_system_type(Path(path), self.MOUNTINFO), expected, path)

    def test_a_network_file_system_is_refused(self) -> None:
        mountinfo = (
            f"22 1 0:25 / / rw - ext4 /dev/vda rw\n30 22 0:25 / {self.root.resolve()} rw - cifs //a/b rw\n"
        )
        failure = self.failureResultOf(self.replica(mountinfo=mountinfo).spools.open_own(), ConfigError)
        self.assertNotIn("\n", str(failure.value))
        self.assertIn("cifs", str(failure.value))
        self.append(self.open(mountinfo=mountinfo.replace("cifs", "xfs")), 1)

"""The spool on real disks that are full, read-only, or broken, and in real processes that are killed."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.crash_spool import FINGERPRINT
from tests.support.process import ChildProcess, find_tool, wait_until
from tests.support.spools import inline, make_job, now, numbers
from webhookd.model import Outcome, SpoolUnavailable
from webhookd.spool.database import SpoolLimits
from webhookd.spool.directory import SpoolRoot
from webhookd.spool.queue import Spool, Spools

REPOSITORY = Path(__file__).parents[2]
KILLS = 10


def open_spool(root: Path, **limits: int) -> Spool:
    settings = SpoolLimits(**({"min_free_bytes": 0} | limits))
    return now(Spools(SpoolRoot(root, FINGERPRINT), inline, lambda: 0, settings).open_own())


def append_until_refused(spool: Spool, first: int, data: bytes) -> tuple[list[int], str]:
    """Return the numbers of the acknowledged jobs, and the reason why the next one was refused."""
    acknowledged: list[int] = []
    for number in range(first, first + 100_000):
        try:
            assert now(spool.append(make_job(number, data=data))).outcome is Outcome.SPOOLED
        except SpoolUnavailable as error:
            return acknowledged, str(error)
        acknowledged.append(number)
    raise AssertionError("it takes everything")


def held(spool: Spool) -> list[int]:
    return numbers(now(spool.first(1_000_000, 1 << 40)))


class CrashingSpool(ChildProcess):
    """A `tests.support.crash_spool` on a root that outlives it."""

    name = "spool"

    def __init__(self, root: Path, first: int, environ: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.arguments = [str(root), str(first)]
        self.more_environ = dict(environ or {})

    def argv(self) -> Sequence[str]:
        return [sys.executable, "-m", "tests.support.crash_spool", *self.arguments]

    def environ(self) -> Mapping[str, str]:
        return {**super().environ(), "PYTHONPATH": str(REPOSITORY), **self.more_environ}

    def is_ready(self) -> bool:
        return self.count("acknowledged") > 0

    def lines(self, word: str) -> list[str]:
        """Return the rest of the complete lines that begin with a word."""
        return [line.partition(" ")[2] for line in self.log.split("\n")[:-1] if line.startswith(f"{word} ")]

    def count(self, word: str) -> int:
        return len(self.lines(word))

    def numbers(self, word: str) -> set[int]:
        return {int(number) for number in self.lines(word)}

    def wait_for_more(self, word: str, more: int = 50) -> None:
        goal = self.count(word) + more
        wait_until(lambda: self.count(word) >= goal, f"{more} more {word}")


def check_after_kill(child: CrashingSpool, root: Path) -> list[int]:
    """Check that the spool holds what the dead child got an answer for; return all that it holds."""
    spool = open_spool(root)
    found = held(spool)
    records = spool.stats.records
    now(spool.close())
    assert records == len(found)
    assert found == sorted(set(found)), "once, and in order"
    acknowledged, removing, removed = map(child.numbers, ("acknowledged", "removing", "removed"))
    assert acknowledged - removing <= set(found), "acknowledged is there"
    assert not removed & set(found), "removed is gone"
    return found


def test_kill_9_loses_and_doubles_nothing(tmp_path: Path) -> None:
    root = tmp_path / "spool"
    before: set[int] = set()
    for kill in range(KILLS):
        first = kill * 1_000_000
        with CrashingSpool(root, first) as child:
            child.wait_for_more("acknowledged", random.randrange(1, 300))
            child.kill()
            found = set(check_after_kill(child, root))
            earlier = {number for number in found if number < first}
            assert earlier == before - child.numbers("removing") or earlier == before - child.numbers(
                "removed"
            )
            before = found
    assert [path.name.partition("-")[0] for path in root.iterdir()] == ["replica"], (
        "one directory, taken again"
    )


@pytest.fixture
def preload(tmp_path: Path) -> tuple[Mapping[str, str], Path]:
    """Return the environment of a process on a failing disk, and the file that makes it fail."""
    library, control = tmp_path / "failing_disk.so", tmp_path / "fail"
    compiler = find_tool("gcc", "apt-get install gcc libc6-dev")
    source = REPOSITORY / "tests/support/failing_disk.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return {"LD_PRELOAD": str(library), "FAILING_DISK": str(control)}, control


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (f"sync {errno.EIO}", "broken"),
        (f"write {errno.EIO}", "broken"),
        (f"write {errno.EROFS}", "broken"),
        (f"write {errno.ENOSPC}", "disk full"),
    ],
)
def test_a_disk_that_fails_and_heals(
    tmp_path: Path, preload: tuple[Mapping[str, str], Path], rule: str, reason: str
) -> None:
    environ, control = preload
    root = tmp_path / "spool"
    with CrashingSpool(root, 0, environ) as child:
        for _ in range(3):
            child.wait_for_more("acknowledged")
            refused = child.count("refused")
            control.write_text(rule)
            child.wait_for_more("refused", 20)
            acknowledged = child.count("acknowledged")
            child.wait_for_more("refused", 20)
            assert child.count("acknowledged") == acknowledged, "nothing is acknowledged"
            reasons = child.lines("refused")[refused:]
            assert {line.partition(":")[0] for line in reasons} == {reason}
            control.unlink()
        child.wait_for_more("acknowledged")
        child.kill()
        check_after_kill(child, root)


Mount = Callable[..., Path]


def run(program: str, *arguments: str) -> None:
    subprocess.run(
        [find_tool(program, "it is in Debian's package mount or e2fsprogs"), *arguments], check=True
    )


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """Return a function that mounts file systems, one at a time; fails without root."""
    place = tmp_path / "mounted"
    place.mkdir()

    def mount_it(*arguments: str) -> Path:
        run("mount", *arguments, str(place))
        return place

    yield mount_it
    if place.is_mount():
        run("umount", "--lazy", str(place))


def test_a_full_disk(mount: Mount) -> None:
    """Other programs fill the disk to its last byte, and free it later."""
    place = mount("-t", "tmpfs", "-o", "size=4m", "tmpfs")
    filler = place / "filler"
    filler.write_bytes(bytes(2 << 20))
    spool = open_spool(place / "spool")
    acknowledged, reason = append_until_refused(spool, 0, os.urandom(3000))
    assert reason == "disk full"
    assert len(acknowledged) > 50
    fill_up(place / "last bytes")
    assert append_until_refused(spool, 1000, os.urandom(3000)) == ([], "disk full")
    assert spool.stats.problem == "disk full"
    filler.unlink()
    assert held(spool) == acknowledged
    empty(spool)
    more, reason = append_until_refused(spool, 2000, os.urandom(3000))
    assert reason == "disk full"
    assert len(more) > 50
    assert held(spool) == more
    now(spool.close())


def fill_up(path: Path) -> None:
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))


def empty(spool: Spool) -> None:
    while records := now(spool.first(10, 1 << 20)):
        now(spool.remove([record.sequence for record in records]))


def test_the_last_of_a_disk_is_left_free(mount: Mount) -> None:
    place = mount("-t", "tmpfs", "-o", "size=4m", "tmpfs")
    spool = open_spool(place / "spool", min_free_bytes=2 << 20)
    acknowledged, reason = append_until_refused(spool, 0, os.urandom(3000))
    assert reason == "disk full"
    status = os.statvfs(place)
    assert status.f_bavail * status.f_frsize > 1 << 20
    empty(spool)
    assert now(spool.append(make_job(len(acknowledged)))).outcome is Outcome.SPOOLED
    now(spool.close())


def test_a_disk_that_was_remounted_read_only(tmp_path: Path, mount: Mount) -> None:
    """The kernel does this when it finds its file system broken; acknowledged events survive."""
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(16 << 20)
    run("mkfs.ext4", "-q", str(image))
    place = mount("-o", "loop,errors=remount-ro", str(image))
    spool = open_spool(place / "spool")
    acknowledged = list(range(20))
    for number in acknowledged:
        assert now(spool.append(make_job(number))).outcome is Outcome.SPOOLED
    device = Path(
        os.path.realpath(f"/sys/dev/block/{os.major(place.stat().st_dev)}:{os.minor(place.stat().st_dev)}")
    )
    (Path("/sys/fs/ext4") / device.name / "trigger_fs_error").write_text("a test's own error")
    for number in range(100, 103):
        with pytest.raises(SpoolUnavailable, match="broken"):
            now(spool.append(make_job(number)))
    now(spool.close())
    run("umount", str(place))
    mount("-o", "loop", str(image))
    again = open_spool(place / "spool")
    assert [number for number in held(again) if number < 100] == acknowledged
    now(again.close())


def test_flipped_bits_anywhere_cost_little(tmp_path: Path) -> None:
    """Any byte may be hit: the spool opens, accepts events, and holds nearly all, each once and unchanged."""
    root = tmp_path / "spool"
    spool = open_spool(root)
    count = 300
    data = os.urandom(1500)
    for number in range(count):
        now(spool.append(make_job(number, data=data)))
    now(spool.close())
    database = spool.directory.database
    pristine = database.read_bytes()
    for _ in range(60):
        for leftover in database.parent.glob("spool.sqlite*"):
            leftover.unlink()
        hit = bytearray(pristine)
        hit[random.randrange(8192, len(hit))] ^= 1 << random.randrange(8)
        database.write_bytes(hit)
        damaged = open_spool(root)
        records = now(damaged.first(1_000_000, 1 << 40))
        assert [record.job for record in records] == [make_job(n, data=data) for n in numbers(records)]
        assert numbers(records) == sorted(set(numbers(records)))
        assert len(records) >= count - 3
        now(damaged.append(make_job(count)))
        now(damaged.close())

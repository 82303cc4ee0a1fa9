"""D1 to D4 and M5: faults of the spool's disk."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

from tests.faults.bench import ALL_TAKEN, ORDERED, OWN, P95, SAFE, TRUTHFUL, Bench, Replica, Row
from tests.faults.disks import FragileDisk, SmallDisk
from tests.faults.preloads import FaultySync
from webhookd.spool.directory import DATABASE_NAME, LOCK_NAME

_PAGE = 4096
_INDEX_LEAF = b"\x0a"


def _check_refusal(bench: Bench, replica: Replica) -> None:
    """Check that a replica which cannot store events refuses them, and is alive, but not ready."""
    response = bench.send(replica, OWN)
    bench.check(response.status == 500, f"the answer is {response.status}, not 500")
    bench.check("retry-after" in response.headers, "there is no Retry-After")
    bench.check(replica.get("/health/ready").status == 503, "it says that it is ready")
    bench.check(replica.get("/health/live").status == 200, "it says that it is dead")


def _is_taking(replica: Replica) -> bool:
    return replica.get("/health/ready").status == 200


def full(bench: Bench) -> None:
    """Fill the spool up to its limit."""
    redis = bench.start_redis(*SAFE)
    replica = bench.start_replica(redis, "--spool-max-bytes", "2000000")
    with bench.load(replica):
        bench.pause(1)
        redis.kill()
        bench.pause(3)
        _check_refusal(bench, replica)
        redis.start()
        bench.wait_drained()
        bench.check(_is_taking(replica), "it is not ready again")
        bench.pause(1)


def disk_full_with_redis(bench: Bench) -> None:
    redis = bench.start_redis()
    disk = SmallDisk(bench)
    replica = bench.start_replica(redis, "--spool", str(disk.path / "spool"))
    with bench.load(replica):
        bench.pause(1)
        disk.fill()
        bench.pause(4)
        bench.check(_is_taking(replica), "it is not ready")
        disk.clear()
        bench.pause(1)


def disk_full_without_redis(bench: Bench) -> None:
    redis = bench.start_redis(*SAFE)
    disk = SmallDisk(bench)
    replica = bench.start_replica(redis, "--spool", str(disk.path / "spool"))
    with bench.fault(replica):
        redis.kill()
        bench.pause(1)
        disk.fill()
        bench.pause(2)
        _check_refusal(bench, replica)
        disk.clear()
        bench.wait(lambda: _is_taking(replica), "it heals without Redis")
        bench.pause(1)
        disk.fill()
        bench.pause(1)
        _check_refusal(bench, replica)
        redis.start()
        bench.wait(lambda: _is_taking(replica), "it heals without room on the disk")
        bench.pause(1)
        disk.clear()


def read_only(bench: Bench) -> None:
    """Make the file system read-only. Events go to Redis. Without Redis, none is acknowledged."""
    redis = bench.start_redis(*SAFE)
    disk = FragileDisk(bench)
    replica = bench.start_replica(redis, "--spool", str(disk.path / "spool"))
    with bench.load(replica):
        bench.pause(1)
        disk.fail()
        bench.pause(2)
        bench.check(_is_taking(replica), "it is not ready")
        bench.check(all(each.status in (0, 200, 202) for each in bench.attempts()), "Redis does not serve")
        redis.kill()
        bench.pause(1)
        _check_refusal(bench, replica)
    replica.stop()
    disk.repair()
    replica.start()
    with bench.load(replica):
        bench.pause(1)
        redis.start()
        bench.wait_drained()


def sync_fails(bench: Bench) -> None:
    redis = bench.start_redis(*SAFE)
    sync = FaultySync(bench)
    replica = bench.new_replica(redis)
    replica.extra.update(sync.environ)
    replica.start()
    with bench.fault(replica):
        redis.kill()
        bench.pause(1)
        with sync.faulty("EIO"):
            bench.pause(2)
            _check_refusal(bench, replica)
        bench.wait(lambda: _is_taking(replica), "it heals")
        bench.pause(1)
        replica.kill()
        replica.start()
        redis.start()


def sync_is_slow(bench: Bench) -> None:
    redis = bench.start_redis(*SAFE)
    sync = FaultySync(bench)
    replica = bench.new_replica(redis)
    replica.extra.update(sync.environ)
    replica.start()
    with bench.fault(replica):
        redis.kill()
        with sync.faulty("SLOW"):
            bench.pause(3)
        redis.start()


# -- damage -------------------------------------------------------------------------------------------------

Damage = Callable[[Bench, Path], None]


def damaged(damage: Damage, bench: Bench) -> None:
    """Kill the daemon while its spool has records, damage the file, and start the daemon again."""
    redis, replica = bench.start_pair(*SAFE)
    redis.kill()
    with bench.load(replica):
        bench.pause(2)
    replica.kill()
    (spool,) = replica.directory.glob(f"var/spool/replica-*/{DATABASE_NAME}")
    damage(bench, spool)
    replica.start()
    with bench.load(replica):
        bench.pause(0.5)
        redis.start()
        bench.wait_drained()


def _checkpoint(spool: Path) -> None:
    with closing(sqlite3.connect(spool)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _flip_bit(bench: Bench, path: Path) -> None:
    """Flip a bit in an event in the middle of the file."""
    taken = [attempt for attempt in bench.attempts() if attempt.is_acknowledged]
    victim = taken[len(taken) // 2]
    content = bytearray(path.read_bytes())
    place = content.find(b'"messages":[{"id":%d,' % victim.number)
    content[place + 20] ^= 1
    path.write_bytes(content)
    bench.check(place > 0, "the victim's record is not in the file")
    bench.deleted = frozenset({victim.key})


def bit_flip(bench: Bench, spool: Path) -> None:
    _checkpoint(spool)
    _flip_bit(bench, spool)
    bench.expected_corrupt = 1


def torn_tail(bench: Bench, spool: Path) -> None:
    """Append half a frame to the log, as a power failure during a write does."""
    wal = spool.with_name(f"{spool.name}-wal")
    frame = wal.read_bytes()[-(_PAGE + 24) :]
    with wal.open("ab") as file:
        file.write(frame[: _PAGE // 2])


def index_gone(bench: Bench, spool: Path) -> None:
    """Overwrite each page of an index with zeros."""
    _checkpoint(spool)
    content = bytearray(spool.read_bytes())
    pages = [at for at in range(_PAGE, len(content), _PAGE) if content[at : at + 1] == _INDEX_LEAF]
    for at in pages:
        content[at : at + _PAGE] = bytes(_PAGE)
    spool.write_bytes(content)
    bench.check(pages, "there is no index")


def emptied(bench: Bench, spool: Path) -> None:
    """Add a spool with an empty file. The daemon finds it first, so it uses it first."""
    hollow = spool.parent.with_name("replica-0")
    hollow.mkdir(mode=0o700)
    (hollow / LOCK_NAME).write_bytes((spool.parent / LOCK_NAME).read_bytes())
    (hollow / DATABASE_NAME).touch(mode=0o600)
    # The good spool is adopted later.
    bench.orphans_within_s = 40.0


ROWS = (
    Row(
        "D1",
        "the spool reaches its limit while Redis is down",
        "500 and Retry-After, not ready, nothing is acknowledged; recovers",
        full,
        demands=TRUTHFUL,
    ),
    Row(
        "D2a",
        "a bit flips in a record of a dead daemon's spool",
        "the record is set aside and counted; all others are drained",
        partial(damaged, bit_flip),
        demands=TRUTHFUL,
        short=True,
    ),
    Row(
        "D2b",
        "the last write to the spool is torn",
        "no acknowledged event is lost",
        partial(damaged, torn_tail),
        demands=TRUTHFUL,
    ),
    Row(
        "D2c",
        "the index of the spool is destroyed",
        "all records are copied to a new file",
        partial(damaged, index_gone),
        demands=TRUTHFUL,
    ),
    Row(
        "D2d",
        "there is an empty spool file in addition to the good one",
        "it is set aside; the good one is adopted",
        partial(damaged, emptied),
        demands=TRUTHFUL,
    ),
    Row(
        "D3a",
        "fsync fails with EIO while Redis is down; then SIGKILL",
        "500, nothing is acknowledged; recovers; I1",
        sync_fails,
        demands=TRUTHFUL,
    ),
    Row(
        "D3b",
        "fsync takes 200 ms while Redis is down",
        "only slower: no answer after 4 s",
        sync_is_slow,
        demands=ALL_TAKEN | TRUTHFUL,
    ),
    Row(
        "D4",
        "the kernel makes the spool's file system read-only",
        "queued in Redis; without Redis 500, not ready; recovers when it is mounted again",
        read_only,
        demands=TRUTHFUL,
        root=True,
    ),
    Row(
        "M5a",
        "the disk is full, and Redis is up",
        "no effect",
        disk_full_with_redis,
        demands=P95 | ALL_TAKEN | ORDERED | TRUTHFUL,
        root=True,
    ),
    Row(
        "M5b",
        "the disk is full, and Redis is down",
        "500 and Retry-After, not ready, nothing is acknowledged; recovers by itself",
        disk_full_without_redis,
        demands=TRUTHFUL,
        root=True,
    ),
)

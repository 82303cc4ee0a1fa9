"""P1 to P6, M2 and M3: faults of the daemon itself, and the two that operators ask about first."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

from tests.faults.bench import ALL_TAKEN, ORDERED, P95, SAFE, TRUTHFUL, Bench, Row
from tests.faults.builds import CRASH_AT, CRASH_POINTS, CRASHING
from tests.support.http import connect
from tests.support.nginx import Nginx

from .redis import killed

_ONLY_WHILE_SPOOLING = frozenset({"after spool append before fsync", "after fsync before ack"})
_POINTS = dict(zip("abcdef", CRASH_POINTS, strict=True))
_KILLS = 20
_MAX_DESCRIPTORS = 64


def crash_at(point: str, bench: Bench) -> None:
    """Let the daemon die at a crash point under load, and start it again while the load continues.

    It waits a moment at the crash point. So a daemon that acknowledges too early has time to do so.
    """
    redis = bench.start_redis(*SAFE)
    replica = bench.new_replica(redis)
    passes = 100 if point in _ONLY_WHILE_SPOOLING else 400
    replica.extra[CRASH_AT] = f"{point}:{passes}:0.05:die"
    replica.start()
    if point in _ONLY_WHILE_SPOOLING:
        redis.kill()
    with bench.load(replica):
        replica.come_back()
        bench.pause(0.5)
        if point in _ONLY_WHILE_SPOOLING:
            redis.start()
        bench.pause(1)


def rolling_restart(bench: Bench) -> None:
    redis = bench.start_redis()
    replicas = [bench.start_replica(redis) for _ in range(3)]
    nginx = bench.open(Nginx(*(replica.port for replica in replicas)))
    with bench.load(nginx):
        bench.pause(1)
        for replica in replicas:
            bench.check(replica.stop() == 0, "a replica does not end with exit code 0")
            replica.start()
            bench.pause(2.5)  # while nginx avoids it


def frozen(bench: Bench) -> None:
    redis = bench.start_redis()
    replicas = [bench.start_replica(redis) for _ in range(3)]
    nginx = bench.open(Nginx(*(replica.port for replica in replicas)))
    with bench.load(nginx):
        bench.pause(1)
        replicas[0].suspend()
        bench.pause(10)
        replicas[0].resume()
        bench.pause(2)


def adopted(bench: Bench) -> None:
    """Kill one of three replicas. The others look for orphans at the same time, and one adopts its spool."""
    redis = bench.start_redis(*SAFE)
    root = bench.directory / "spool"
    victim, *others = [bench.start_replica(redis, "--spool", str(root)) for _ in range(3)]
    redis.kill()
    with bench.load(victim, *others):
        bench.pause(2)
    victim.kill()
    bench.replicas.remove(victim)
    redis.start()
    with bench.load(*others, rate=50):
        bench.wait(lambda: len(list(root.glob("replica-*"))) == len(others), "the orphan is drained", 45.0)
    adoptions = sum(replica.log.count("adopted the spool") for replica in others)
    bench.check(adoptions == 1, f"it was adopted {adoptions} times")


def blocked(bench: Bench) -> None:
    redis = bench.start_redis()
    replica = bench.new_replica(redis)
    replica.extra[CRASH_AT] = "after verify:500:2:live"
    replica.start()
    with bench.load(replica):
        bench.pause(5)


def out_of_descriptors(bench: Bench) -> None:
    """Let idle connections take all descriptors, and kill Redis: the spool must work without a new one."""
    redis = bench.start_redis(*SAFE)
    limit = f"--nofile={_MAX_DESCRIPTORS}:{_MAX_DESCRIPTORS}"
    replica = bench.start_replica(redis, wrapper=("prlimit", limit, "--"))
    descriptors = Path(f"/proc/{replica.pid}/fd")
    with bench.load(replica):
        bench.pause(1)
        before = len(list(descriptors.iterdir()))
        with ExitStack() as idle:
            for _ in range(2 * _MAX_DESCRIPTORS):
                with suppress(OSError):
                    idle.enter_context(connect(replica.port))
            bench.pause(0.5)
            redis.kill()
            bench.pause(1.5)
        redis.start()
        bench.wait_drained()
        bench.pause(1)
        after = len(list(descriptors.iterdir()))
    bench.check(any(not attempt.is_acknowledged for attempt in bench.attempts()), "no connection was shed")
    bench.check(after <= before + 8, f"{after} descriptors after, {before} before")


def killed_again_and_again(bench: Bench) -> None:
    """Kill the daemon repeatedly, while Redis is killed, started, frozen and thawed in turn."""
    redis, replica = bench.start_pair(*SAFE)
    flaps = (redis.kill, redis.start, redis.suspend, redis.resume)
    with bench.load(replica):
        for kill in range(_KILLS):
            bench.pause(0.4)
            flaps[kill % len(flaps)]()
            bench.pause(0.4)
            replica.kill()
            replica.start()
        bench.wait_drained()
        bench.pause(1)


def suspended(bench: Bench) -> None:
    redis, replica = bench.start_pair()
    with bench.load(replica):
        bench.pause(5)
        redis.suspend()
        bench.pause(8)
        redis.resume()
        bench.note(f"spool empty after {bench.wait_drained():.1f} s")
        bench.pause(3)


ROWS = (
    *(
        Row(
            f"P1{letter}",
            f"SIGKILL of the daemon {point}, then a restart",
            "I1 I2 I3",
            partial(crash_at, point),
            build=CRASHING,
            short=letter in "cde",
        )
        for letter, point in _POINTS.items()
    ),
    Row(
        "P2",
        "SIGTERM to three replicas with nginx, one after the other",
        "no request fails; exit code 0",
        rolling_restart,
        demands=ALL_TAKEN,
    ),
    Row(
        "P3",
        "SIGSTOP for 10 s to one of three replicas with nginx",
        "nginx asks another replica in time; no event is doubled later",
        frozen,
        demands=ALL_TAKEN,
    ),
    Row(
        "P4",
        "SIGKILL to one of three replicas that share a spool volume",
        "one other replica adopts and drains its spool",
        adopted,
        demands=ALL_TAKEN,
    ),
    Row(
        "P5",
        "the event loop is blocked for 2 s",
        "answers are late; nothing is lost",
        blocked,
        build=CRASHING,
        demands=ALL_TAKEN | TRUTHFUL,
    ),
    Row(
        "P6",
        f"no file descriptor of {_MAX_DESCRIPTORS} is free, and Redis is killed",
        "new connections are shed; recovers; no leak",
        out_of_descriptors,
    ),
    Row(
        "M2a",
        "Redis SIGSTOPped for 8 s under 500 requests/s",
        "all 2xx, p95 < 50 ms, drained in 30 s, in order",
        suspended,
        demands=P95 | ALL_TAKEN | ORDERED | TRUTHFUL,
    ),
    Row(
        "M2b",
        "Redis killed for 8 s under 500 requests/s",
        "all 2xx, p95 < 50 ms, drained in 30 s, in order",
        partial(killed, down_s=8.0),
        demands=P95 | ALL_TAKEN | ORDERED | TRUTHFUL,
    ),
    Row(
        "M3",
        f"SIGKILL of the daemon {_KILLS} times in a row, Redis flapping",
        "I1 I2 I3",
        killed_again_and_again,
    ),
)

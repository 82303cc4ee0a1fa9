"""R1 to R21: faults of Redis, and of the network to it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tests.faults.bench import (
    ALL_TAKEN,
    EVERYSEC,
    ORDERED,
    OWN,
    P95,
    RATE,
    SAFE,
    TRUTHFUL,
    Bench,
    Replica,
    Row,
)
from tests.faults.builds import WITHOUT_MEMORY
from tests.support.nginx import Nginx
from tests.support.process import find_tool, node
from tests.support.proxy import Proxy
from tests.support.servers import ClusterNode, RedisServer, Sentinels
from tests.support.workers import LINES, Worker
from webhookd.bullmq.keys import QueueKeys

_TESTS = Path(__file__).parents[2]
_NOWHERE = "127.0.0.1", 1
"""A primary that does not answer."""


# -- Redis dies --------------------------------------------------------------------------------------------


def killed(bench: Bench, down_s: float = 4.0) -> None:
    redis, replica = bench.start_pair(*SAFE)
    with bench.fault(replica):
        redis.kill()
        bench.pause(down_s)
        bench.wait(replica.is_degraded, "health says degraded")
        redis.start()
        bench.note(f"spool empty after {bench.wait_drained():.1f} s")


def loses_its_last_second(bench: Bench) -> None:
    """Cut off the end of the AOF that was not synced, as a power failure does."""
    redis, replica = bench.start_pair(*EVERYSEC)
    with bench.fault(replica):
        (aof,) = redis.directory.glob("appendonlydir/*.incr.aof")
        synced_bytes = aof.stat().st_size
        bench.pause(1)
        redis.kill()
        os.truncate(aof, synced_bytes)
        bench.pause(2)
        redis.start()


def absent_at_start(bench: Bench) -> None:
    redis = bench.start_redis(*SAFE)
    redis.kill()
    replica = bench.start_replica(redis)
    with bench.fault(replica):
        bench.check(replica.get("/health/ready").status == 200, "it is not ready")
        redis.start()


def loading(bench: Bench) -> None:
    """Load ten thousand keys, with a pause after each."""
    redis = bench.start_redis(*SAFE)
    with redis.client() as client:
        client.eval("for i = 1, 10000 do redis.call('SET', 'filler:' .. i, i) end", 0)
        client.bgrewriteaof()
        bench.wait(lambda: not client.info("persistence")["aof_rewrite_in_progress"], "the AOF is rewritten")
    replica = bench.start_replica(redis)
    with bench.fault(replica):
        redis.kill()
        redis.config = (*redis.config, "key-load-delay 200", "loading-process-events-interval-bytes 1024")
        redis.launch()
        redis.wait_ready()
        bench.wait_for_log(replica, "loading")
        with redis.client() as client:
            connections = client.info("stats")["total_connections_received"]
        bench.check(connections < 300, f"a tight loop: {connections} connections")


# -- the network --------------------------------------------------------------------------------------------


def _through_proxy(bench: Bench) -> tuple[Proxy, Replica]:
    redis = bench.start_redis()
    proxy = bench.start_proxy(redis.port)
    return proxy, bench.start_replica(proxy)


def black_hole(bench: Bench) -> None:
    proxy, replica = _through_proxy(bench)
    with bench.load(replica):
        bench.pause(3)
        with proxy.faulty(black_hole=True):
            bench.pause(6)
        bench.wait_drained()
        bench.pause(3)


def replies_are_lost(bench: Bench, for_s: float = 1.5) -> None:
    proxy, replica = _through_proxy(bench)
    with bench.load(replica):
        bench.pause(0.5)
        with proxy.faulty(drops_replies=True):
            bench.pause(for_s)
        bench.wait_drained()
        with proxy.faulty(resets_on_reply=True):
            bench.pause(for_s)
        bench.wait_drained()
        bench.pause(0.5)


def answers_are_reset(bench: Bench) -> None:
    """Reset the answers of one of two replicas to nginx, after its work is done."""
    redis = bench.start_redis()
    first, second = bench.start_replica(redis), bench.start_replica(redis)
    proxy = bench.start_proxy(first.port)
    nginx = bench.open(Nginx(proxy.port, second.port))
    with bench.load(nginx):
        bench.pause(1)
        for _ in range(10):
            with proxy.faulty(resets_on_reply=True):
                bench.pause(0.3)
            bench.pause(0.2)
        bench.pause(1)


def slow(bench: Bench) -> None:
    """Delay replies by about half the deadline, and by the deadline, with jitter."""
    proxy, replica = _through_proxy(bench)
    with bench.fault(replica):
        for latency_s in (0.03, 0.1, 0.5):
            for jitter in (0.7, 1.0, 1.2, 0.8, 1.1):
                with proxy.faulty(reply_latency_s=latency_s * jitter):
                    bench.pause(0.4)


def sliced(bench: Bench) -> None:
    proxy, replica = _through_proxy(bench)
    with bench.load(replica), proxy.faulty(slice_bytes=1):
        bench.pause(4)


def replies_are_late_one_by_one(bench: Bench) -> None:
    """Delay the replies to events that travel alone, so that a late reply fits the next call.

    Then the network breaks: an event that was acknowledged because of another one's reply never arrives.
    """
    proxy, replica = _through_proxy(bench)
    bench.warm_up()
    with proxy.faulty(reply_latency_s=0.8):
        bench.send(replica, OWN)
        bench.wait_drained()
        bench.pause(1)
    with proxy.faulty(black_hole=True):
        bench.send(replica, OWN + 1)
        proxy.reset_all()
    bench.wait_drained()


def replies_are_late(bench: Bench) -> None:
    replies_are_late_one_by_one(bench)
    (replica,) = bench.replicas
    (proxy,) = bench.proxies
    with bench.fault(replica), proxy.faulty(reply_latency_s=0.8):
        bench.pause(2)


# -- Redis answers with errors ------------------------------------------------------------------------------


def becomes_a_replica(bench: Bench) -> None:
    redis, replica = bench.start_pair()
    with bench.fault(replica), redis.client() as client:
        client.replicaof(*_NOWHERE)
        bench.pause(3)
        bench.wait_for_log(replica, "readonly")
        client.replicaof("NO", "ONE")


@contextmanager
def _no_replication(primary: RedisServer) -> Iterator[None]:
    """Drop all that the primary sends to its replica, even what is already in the kernel."""
    iptables = find_tool("iptables", "it is in Debian's package iptables")
    with primary.client() as client:
        (replica,) = client.client_list(_type="replica")
    port = replica["addr"].rpartition(":")[2]
    rule = ["OUTPUT", "-p", "tcp", "--sport", str(primary.port), "--dport", port, "-j", "DROP"]
    subprocess.run([iptables, "-w", "-I", *rule], check=True)
    try:
        yield
    finally:
        subprocess.run([iptables, "-w", "-D", *rule], check=True)


def failover(bench: Bench) -> None:
    """Kill the primary half a second after the last data reached its replica."""
    sentinels = Sentinels()
    bench.defer(sentinels.close)
    sentinels.start()
    bench.redis = primary = sentinels.primary
    bench.keep_all_events()
    replica = bench.start_replica(sentinels.url)
    promoted = sentinels.replica
    with bench.fault(replica):
        with _no_replication(primary):
            bench.pause(0.5)
            primary.kill()
            sentinels.wait_for_primary(promoted)
        bench.note(f"spool empty {bench.wait_drained():.1f} s after the failover")
    bench.redis = promoted


def too_few_replicas(bench: Bench) -> None:
    redis = bench.start_redis("min-replicas-max-lag 2", "replica-serve-stale-data no")
    follower = bench.open(RedisServer(config=(f"replicaof {redis.host} {redis.port}",)))
    replica = bench.start_replica(redis)
    with bench.load(replica), redis.client() as client:
        bench.wait(lambda: client.info("replication")["connected_slaves"] == 1, "the replica is there")
        client.config_set("min-replicas-to-write", 1)
        bench.pause(1)
        follower.kill()
        bench.pause(2)
        bench.wait_for_log(replica, "noreplicas")
        follower.start()
        bench.wait_drained()
        client.config_set("min-replicas-to-write", 0)
        client.replicaof(*_NOWHERE)
        bench.pause(2)
        bench.wait_for_log(replica, "masterdown")
        client.replicaof("NO", "ONE")
        bench.wait_drained()
        bench.pause(1)


def out_of_memory(bench: Bench) -> None:
    redis, replica = bench.start_pair()
    with bench.fault(replica), redis.client() as client:
        client.config_set("maxmemory", client.info("memory")["used_memory"])
        bench.pause(3)
        bench.wait_for_log(replica, "oom")
        client.config_set("maxmemory", 0)


def cannot_save(bench: Bench) -> None:
    """Put a directory in the place of the snapshot, so that it cannot be written."""
    redis, replica = bench.start_pair("save 3600 1000000")
    obstacle = redis.directory / "dump.rdb" / "obstacle"
    with bench.fault(replica), redis.client() as client:
        obstacle.mkdir(parents=True)
        client.bgsave()
        bench.wait(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err", "BGSAVE fails")
        bench.pause(3)
        bench.wait_for_log(replica, "misconf")
        obstacle.rmdir()
        obstacle.parent.rmdir()
        client.bgsave()


def forgets_scripts(bench: Bench, for_s: float = 3.0) -> None:
    redis, replica = bench.start_pair()
    with bench.load(replica), redis.client() as client:
        for _ in range(int(for_s / 0.2)):
            bench.pause(0.2)
            client.script_flush()
    bench.check(replica.health["breaker"] == {"state": "closed"}, "the breaker is not closed")


def stalled(bench: Bench) -> None:
    redis, replica = bench.start_pair("enable-debug-command yes", "busy-reply-threshold 100")
    with bench.fault(replica), redis.client() as client, redis.connect() as other:
        other.sendall(b'EVAL "while true do end" 0\r\n')
        bench.pause(2)
        client.script_kill()
        bench.wait_drained()
        bench.pause(1)
        other.sendall(b"DEBUG SLEEP 3\r\n")
        bench.pause(3)
        bench.wait_drained()
        bench.pause(1)
        redis.suspend()
        bench.pause(3)
        redis.resume()


def rights_are_taken(bench: Bench) -> None:
    """Take rights and logins away. One replica sends a password, and one does not."""
    redis = bench.start_redis()
    polite = bench.start_replica(f"redis://default:first@{redis.host}:{redis.port}/0")
    plain = bench.start_replica(redis)
    with redis.client() as client:
        client.acl_setuser("admin", enabled=True, passwords=["+a"], keys=["*"], categories=["+@all"])
    with bench.fault(polite, plain), redis.client(username="admin", password="a") as admin:
        for command in ("evalsha", "lpush"):  # the whole script, and a part of it
            admin.execute_command("ACL", "SETUSER", "default", f"-{command}")
            bench.pause(1.5)
            admin.execute_command("ACL", "SETUSER", "default", f"+{command}")
            bench.wait_drained()
        bench.wait_for_log(plain, "noperm")
        admin.execute_command("ACL", "SETUSER", "default", "resetpass", ">second")
        admin.execute_command("CLIENT", "KILL", "TYPE", "normal")
        bench.pause(2)
        for replica in (polite, plain):
            bench.wait_for_log(replica, "noauth")
            bench.wait(replica.is_degraded, "health says degraded")
        admin.execute_command("ACL", "SETUSER", "default", "resetpass", "nopass")


def loses_one_right(bench: Bench) -> None:
    """Take away a right that the script needs after its first changes, as in R18."""
    redis, replica = bench.start_pair()
    with bench.load(replica), redis.client() as client:
        bench.pause(0.5)
        client.execute_command("ACL", "SETUSER", "default", "-lpush")
        bench.pause(1)
        client.execute_command("ACL", "SETUSER", "default", "+lpush")
        bench.wait_drained()
        bench.pause(0.5)


def cluster(bench: Bench) -> None:
    """Use a prefix with a hash tag, then one without: the daemon logs what to do, and spools."""
    bench.redis = node = bench.open(ClusterNode())
    bench.queue = QueueKeys("{bull}", "chatwoot")
    bench.keep_all_events()
    replica = bench.start_replica(node, "--prefix", "{bull}")
    with bench.load(replica):
        bench.pause(3)
    untagged = bench.start_replica(node)
    bench.wait(lambda: "this Redis is a cluster" in untagged.log, "the log says what is wrong")
    bench.check(untagged.stop() == 0, "it does not end")
    bench.replicas.remove(untagged)


def flushed(bench: Bench) -> None:
    """Delete everything under load. Later events are safe. The daemon warns of a policy that evicts."""
    redis, replica = bench.start_pair("maxmemory-policy allkeys-lru")
    bench.wait_for_log(replica, "maxmemory-policy allkeys-lru")
    with bench.load(replica), redis.client() as client:
        bench.pause(2)
        client.flushall()
        gone = {attempt.key for attempt in bench.attempts()}
        bench.keep_all_events()
        bench.pause(2)
    bench.deleted = frozenset(gone)
    bench.note(f"FLUSHALL deleted about {len(gone)} queued events")


def _operate(redis: RedisServer, line: str, action: str) -> None:
    script = _TESTS / "faults" / "queue.js"
    environ = {"PATH": os.defpath, "NODE_PATH": str(_TESTS / "node" / "node_modules")}
    command = [node(), str(script), line, str(redis.port), "bull", "chatwoot", action]
    subprocess.run(command, env=environ, check=True)


def paused(line: str, bench: Bench) -> None:
    """Pause and resume the queue of a running worker under load, and obliterate it later."""
    redis = bench.start_redis()
    replica = bench.start_replica(redis, "--job-options", "{}")
    worker = bench.open(Worker(line, redis.port))
    with bench.load(replica, rate=200):
        bench.pause(1)
        _operate(redis, line, "pause")
        bench.pause(1)
        _operate(redis, line, "resume")
        bench.pause(1)
    taken = {attempt.key for attempt in bench.attempts() if attempt.is_acknowledged}
    bench.wait(lambda: len(worker.processed) >= len(taken), "the worker finishes all jobs")
    bench.check(worker.stop() == 0, "the worker does not end")
    processed = [job.id for job in worker.processed]
    bench.check(sorted(processed) == sorted(taken), "not each job was processed once")
    _operate(redis, line, "obliterate")
    bench.keep_all_events()
    with bench.load(replica, rate=200):
        bench.pause(1)
    bench.deleted = frozenset(taken)


ROWS = (
    Row(
        "R1",
        "Redis killed, started again after 4 s (AOF always)",
        "spooled, p95 < 50 ms; drained in order; I1 I2",
        killed,
        demands=P95 | ALL_TAKEN | ORDERED | TRUTHFUL,
        short=True,
    ),
    Row(
        "R2",
        "Redis loses the last second of its AOF (everysec, power failure)",
        "nothing is lost: the daemon sends it again from memory",
        loses_its_last_second,
        demands=P95 | ALL_TAKEN,
        short=True,
    ),
    Row(
        "R2off",
        "like R2, without the memory of acknowledged jobs",
        "may lose the events of that second",
        loses_its_last_second,
        build=WITHOUT_MEMORY,
        demands=P95 | ALL_TAKEN,
        may_lose=int(1.2 * RATE),
    ),
    Row(
        "R3",
        "Redis is down when the daemon starts",
        "starts, is ready, spools, and connects later",
        absent_at_start,
        demands=P95 | ALL_TAKEN | ORDERED | TRUTHFUL,
    ),
    Row(
        "R4",
        "black hole: connections to Redis are accepted, and nothing is forwarded",
        "deadline, then spooled; the breaker opens; nothing hangs",
        black_hole,
        demands=P95 | ALL_TAKEN | TRUTHFUL,
    ),
    Row(
        "R5",
        "requests arrive, but replies are dropped, or the connection is reset",
        "outcome unknown: spooled, and the script finds the duplicates",
        replies_are_lost,
        demands=ALL_TAKEN,
        short=True,
    ),
    Row(
        "R6",
        "a replica's answers to nginx are reset after its work; nginx asks the other replica",
        "one job; the other replica finds the duplicate",
        answers_are_reset,
        demands=ALL_TAKEN,
    ),
    Row(
        "R7",
        "Redis answers after 30, 100, 500 ms, with jitter",
        "bounded by the deadline; the breaker opens on slow calls",
        slow,
        demands=ALL_TAKEN,
    ),
    Row(
        "R8",
        "replies arrive in segments of 1 byte",
        "no reply is taken for another",
        sliced,
        demands=ALL_TAKEN | TRUTHFUL,
    ),
    Row(
        "R9",
        "replies come after the deadline",
        "the connection is closed; no reply is taken for another",
        replies_are_late,
        demands=ALL_TAKEN | TRUTHFUL,
        short=True,
    ),
    Row(
        "R10",
        "READONLY: REPLICAOF on the live node, for 3 s",
        "spooled; recovers without a restart",
        becomes_a_replica,
        demands=P95 | ALL_TAKEN | TRUTHFUL,
    ),
    Row(
        "R11",
        "Sentinel failover: the primary dies, its replica lacks the last half second",
        "nothing is lost: the daemon sends it again from memory",
        failover,
        demands=P95 | ALL_TAKEN,
        root=True,
    ),
    Row(
        "R11off",
        "like R11, without the memory of acknowledged jobs",
        "may lose the events that were not replicated",
        failover,
        build=WITHOUT_MEMORY,
        demands=P95 | ALL_TAKEN,
        may_lose=int(1.2 * RATE),
        root=True,
    ),
    Row(
        "R12",
        "LOADING: after a restart, Redis loads for 2 s",
        "spooled; no tight loop of attempts",
        loading,
        demands=P95 | ALL_TAKEN | TRUTHFUL,
    ),
    Row(
        "R13",
        "NOREPLICAS, then MASTERDOWN",
        "spooled; the log names the class",
        too_few_replicas,
        demands=P95 | ALL_TAKEN | TRUTHFUL,
    ),
    Row(
        "R14",
        "OOM: maxmemory reached, noeviction",
        "spooled; no lock without a job",
        out_of_memory,
        demands=P95 | ALL_TAKEN | TRUTHFUL,
        short=True,
    ),
    Row(
        "R15",
        "MISCONF: the snapshot cannot be written",
        "spooled",
        cannot_save,
        demands=P95 | ALL_TAKEN | TRUTHFUL,
    ),
    Row(
        "R16",
        "SCRIPT FLUSH five times a second",
        "no effect",
        forgets_scripts,
        demands=P95 | ALL_TAKEN | ORDERED | TRUTHFUL,
    ),
    Row(
        "R17",
        "BUSY, then DEBUG SLEEP, then SIGSTOP, 2 to 3 s each",
        "deadline, then spooled; a probe closes the breaker; order is kept",
        stalled,
        demands=ALL_TAKEN | ORDERED | TRUTHFUL,
    ),
    Row(
        "R18",
        "NOPERM for the script, and inside it; NOAUTH; WRONGPASS",
        "spooled, degraded, no crash; recovers when the rights are back",
        rights_are_taken,
        demands=P95 | ALL_TAKEN | TRUTHFUL,
    ),
    Row(
        "R19",
        "a Redis Cluster",
        "works with a hash tag in the prefix; without one, the log says what to do",
        cluster,
        demands=P95 | ALL_TAKEN | TRUTHFUL,
    ),
    Row(
        "R20",
        "FLUSHALL under load; maxmemory-policy allkeys-lru",
        "warns of the policy; queued jobs are lost, later events are not",
        flushed,
        demands=P95 | ALL_TAKEN,
    ),
    Row(
        "R20off",
        "like R20, without the memory of acknowledged jobs",
        "like R20: jobs are sent again only after a restart or a failover",
        flushed,
        build=WITHOUT_MEMORY,
        demands=P95 | ALL_TAKEN,
    ),
    *(
        Row(
            f"R21v{line[-1]}",
            f"a queue of {line} is paused, resumed, and obliterated",
            "the worker finishes each job once",
            partial(paused, line),
            demands=ALL_TAKEN | TRUTHFUL,
        )
        for line in LINES
    ),
)

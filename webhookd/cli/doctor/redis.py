"""The checks of Redis and its queues: first the facts, then the judgements.

Harmless to a Redis at work: a few dozen quick commands, and one job that is added to a scratch queue and
removed again.
"""

from __future__ import annotations

import random
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from attrs import evolve, frozen

from webhookd.bullmq.keys import QueueKeys
from webhookd.bullmq.script import Wire
from webhookd.cli.doctor.findings import Checks, Finding, fail, mebibytes, milliseconds, ok, skipped, warn
from webhookd.cli.redis import RedisSession, connected, describe
from webhookd.clock import wall_clock_ms
from webhookd.config import Config, Source
from webhookd.model import Job, JobRefused, Outcome, QueueUnavailable, RedisErrorKind
from webhookd.reactor import IReactor
from webhookd.redis.breaker import BreakerPolicy, CircuitBreaker
from webhookd.redis.queue import RedisQueue
from webhookd.redis.url import RedisUrl
from webhookd.redis.watch import ServerFacts, read_info

_OLDEST = (6, 2)
_SCRATCH_QUEUE = "webhookd-doctor"
_SCRATCH_KEY = "rights"
_SCRATCH_TTL_MS = 10_000
_ADD_DEADLINE_S = 1.0
_MUCH_MEMORY = 0.8
_SKEW_S = 1.0
_TYPES = {
    "wait": "list",
    "paused": "list",
    "active": "list",
    "meta": "hash",
    "id": "string",
    "pc": "string",
    "delayed": "zset",
    "prioritized": "zset",
    "marker": "zset",
    "events": "stream",
}

# -- the facts ----------------------------------------------------------------------------------------------


@frozen
class QueueFacts:
    """The facts of one queue.

    ``refused`` are the commands that the user may not run on its keys. ``problem`` is why no job can be added
    to its scratch queue. Without a problem, ``script_s`` is how long that takes; None if it was not tried.
    ``foreign`` are the keys of the queue whose type is not that of BullMQ.
    """

    keys: QueueKeys
    settings: Config
    server: ServerFacts
    refused: Sequence[str]
    problem: str | None
    script_s: float | None
    foreign: Sequence[str]
    is_paused: bool
    version: str | None
    waiting: int
    paused: int


@frozen
class RedisFacts:
    """The facts of the server. ``info`` is empty if the user may not ask; ``ahead_s`` is its clock's lead."""

    url: RedisUrl
    settings: Config
    round_trip_s: float
    info: Mapping[str, str]
    server: ServerFacts
    has_snapshots: bool | None
    ahead_s: float | None
    queues: Sequence[QueueFacts]

    def number(self, name: str) -> int:
        """Return a number of INFO; 0 if it is missing."""
        value = self.info.get(name, "")
        return int(value) if value.isdigit() else 0


async def look_at_redis(reactor: IReactor, settings: Config, url: RedisUrl) -> RedisFacts:
    """Return all that the checks need; raises `QueueUnavailable`."""
    async with connected(reactor, url) as redis:
        round_trip_s = min([await _round_trip(redis) for _ in range(3)])
        info, ahead_s = await _info(redis)
        server = evolve(ServerFacts.from_info(info), appendfsync=await _setting(redis, "appendfsync"))
        saves = await _setting(redis, "save")
        return RedisFacts(
            url=url,
            settings=settings,
            round_trip_s=round_trip_s,
            info=read_info(info),
            server=server,
            has_snapshots=None if saves is None else bool(saves),
            ahead_s=ahead_s,
            queues=[await _look_at_queue(redis, settings, server, keys) for keys in settings.queues],
        )


async def _if_allowed(redis: RedisSession, *command: str | bytes | int) -> Any:
    """Return the answer; None if the user may not ask."""
    try:
        return await redis.ask(*command)
    except QueueUnavailable as error:
        if error.kind is RedisErrorKind.NOPERM:
            return None
        raise


async def _round_trip(redis: RedisSession) -> float:
    began_s = time.monotonic()
    await _if_allowed(redis, "PING")
    return time.monotonic() - began_s


async def _info(redis: RedisSession) -> tuple[bytes, float | None]:
    """Return INFO, and how far Redis' clock was ahead of ours halfway through the question."""
    began_s = time.time()
    info = await _if_allowed(redis, "INFO") or b""
    halfway_s = (began_s + time.time()) / 2
    its_time = read_info(info).get("server_time_usec")
    return info, int(its_time) / 1_000_000 - halfway_s if its_time else None


async def _setting(redis: RedisSession, name: str) -> str | None:
    answer = await _if_allowed(redis, "CONFIG", "GET", name)
    return answer[1].decode() if answer is not None and len(answer) == 2 else None


async def _look_at_queue(
    redis: RedisSession, settings: Config, server: ServerFacts, keys: QueueKeys
) -> QueueFacts:
    # Below the queue's own name, so that an ACL or a cluster treats these keys as it treats the queue's. They
    # cannot be keys of BullMQ or of a job: none of these has a colon after the queue's name.
    scratch = QueueKeys(f"{keys.prefix}:{keys.queue}", _SCRATCH_QUEUE)
    source = next(source for source in settings.sources.values() if source.queue == keys.queue)
    job = _scratch_job(source)
    problem, script_s = None, None
    refused = await _refused(redis, [("DEL", scratch.meta)])
    if not refused:  # a user who may not clean up must not begin
        try:
            refused = await _refused(redis, _commands(settings, scratch.job(_SCRATCH_KEY)))
            problem, script_s = await _add_twice(redis, settings, scratch, job)
        finally:
            # Crash window: a kill before this leaves a few small keys, which the next run removes.
            await _remove(redis, scratch, job)
    foreign = await _foreign(redis, keys)
    meta = None if foreign else await _if_allowed(redis, "HMGET", keys.meta, "paused", "version")
    is_paused, version = meta or (None, None)
    return QueueFacts(
        keys=keys,
        settings=settings,
        server=server,
        refused=refused,
        problem=problem,
        script_s=script_s,
        foreign=foreign,
        is_paused=is_paused is not None,
        version=None if version is None else version.decode("utf-8", "replace"),
        waiting=0 if foreign else await _if_allowed(redis, "LLEN", keys.wait) or 0,
        paused=0 if foreign else await _if_allowed(redis, "LLEN", keys.paused) or 0,
    )


async def _foreign(redis: RedisSession, keys: QueueKeys) -> Sequence[str]:
    """Return the queue's keys of a wrong type; with one of them, no job can be added."""
    foreign = []
    for name, expected in _TYPES.items():
        answer = await _if_allowed(redis, "TYPE", keys.job(name))
        found = "none" if answer is None else answer.decode()
        if found not in ("none", expected):
            foreign.append(f"{keys.job(name)} is a {found}")
    return foreign


def _scratch_job(source: Source) -> Job:
    options = source.job_options
    job_id = f"doctor-{secrets.token_hex(8)}"
    return Job(
        queue=_SCRATCH_QUEUE,
        id=job_id,
        name="doctor",
        data=b"{}",
        options=options.encode(job_id),
        timestamp_ms=wall_clock_ms(),
        delay_ms=options.delay_ms,
        priority=options.priority,
        lifo=options.lifo,
    )


async def _add_twice(
    redis: RedisSession, settings: Config, scratch: QueueKeys, job: Job
) -> tuple[str | None, float | None]:
    """Add one job twice, as the daemon does. Return what went wrong, and how long the second took."""
    queue = RedisQueue(
        redis.clock,
        redis.pool,
        CircuitBreaker(BreakerPolicy(), random.random),
        evolve(settings.queue_settings, prefix=scratch.prefix, lock_ttl_ms=_SCRATCH_TTL_MS),
        deadline_s=max(_ADD_DEADLINE_S, settings.redis_deadline_s),
        acknowledged=lambda _jobs: None,
    )
    try:
        first = await queue.add(job)
        began_s = time.monotonic()
        second = await queue.add(job)
    except (QueueUnavailable, JobRefused) as error:
        return " ".join(str(error).split()), None
    took_s = time.monotonic() - began_s
    outcomes = first.outcome, second.outcome
    is_right = outcomes == (Outcome.QUEUED, Outcome.ALREADY_QUEUED)
    return None if is_right else f"a job that was added twice was {outcomes}", took_s


async def _remove(redis: RedisSession, scratch: QueueKeys, job: Job) -> None:
    # If Redis takes no writes, there is nothing to remove; if it is gone, the next question fails.
    with suppress(QueueUnavailable):
        for name in (*_TYPES, job.id, _SCRATCH_KEY):
            await redis.ask("DEL", scratch.job(name))
        await redis.ask("DEL", scratch.create_lock(job.id))


_Command = tuple[str | int, ...]


def _commands(settings: Config, key: str) -> Sequence[_Command]:
    """Return the commands of ``conf/redis-acl.conf``, for a scratch key.

    Redis checks the rights first. So it does not matter that most of these then fail, because the key has
    another type.
    """
    return (
        ("EVAL", "return 1", 0),
        ("EVALSHA", "0" * 40, 0),
        ("INCR", key),
        ("INCRBY", key, 1),
        ("SET", key, "1", "PX", _SCRATCH_TTL_MS),
        ("TYPE", key),
        ("EXISTS", key),
        ("HMGET", key, "field"),
        ("HSET", key, "field", "value"),
        ("HMSET", key, "field", "value"),
        ("XADD", key, "*", "field", "value"),
        ("XDEL", key, "0-1"),
        ("LLEN", key),
        ("LPUSH", key, "value"),
        ("RPUSH", key, "value"),
        ("LREM", key, 1, "value"),
        ("ZADD", key, 0, "member"),
        ("ZREM", key, "member"),
        ("ZRANGE", key, 0, 0),
        ("ZREVRANGEBYSCORE", key, 0, 0),
        *((("WAIT", 0, 1),) if settings.ack else ()),
        *((("ROLE",),) if settings.redis.sentinel_name else ()),
        *_FOR_HEALTH,
        ("LINDEX", key, -1),
        ("ZCARD", key),
    )


_FOR_HEALTH: Sequence[_Command] = (("INFO", "server"), ("CONFIG", "GET", "appendfsync"))
_OPTIONAL = {"INFO", "CONFIG GET", "LINDEX", "ZCARD"}


async def _refused(redis: RedisSession, commands: Sequence[_Command]) -> Sequence[str]:
    refused = []
    for command in commands:
        try:
            await redis.ask(*command)
        except QueueUnavailable as error:
            if error.kind is RedisErrorKind.NOPERM:
                refused.append("CONFIG GET" if command[0] == "CONFIG" else str(command[0]))
            elif error.unknown:
                raise
    return refused


# -- the judgements of the server ---------------------------------------------------------------------------


def connection(facts: RedisFacts) -> Finding:
    """Judge the round trip by the deadline of a request."""
    took, deadline_s = milliseconds(facts.round_trip_s), facts.settings.redis_deadline_s
    if facts.round_trip_s > deadline_s / 2:
        return (fail if facts.round_trip_s > deadline_s else warn)(
            f"{facts.url} takes {took} to answer, of the {deadline_s:g} s of --redis-deadline: "
            "with more than half, events go to the spool",
            "move Redis nearer, or raise --redis-deadline",
        )
    return ok(f"{facts.url} answers in {took}")


def no_connection(url: RedisUrl, error: QueueUnavailable) -> Finding:
    """Report why there is no connection, with advice for the kind of the error."""
    advice = {
        RedisErrorKind.NOAUTH: "correct the user and password of REDIS_URL (redis://USER:PASSWORD@HOST)",
        RedisErrorKind.NOPERM: "give the user the rights of conf/redis-acl.conf",
        RedisErrorKind.LOADING: "wait: it is still loading its data",
        RedisErrorKind.READONLY: "Sentinel named a replica: wait until the failover ends, and try again",
        RedisErrorKind.TIMEOUT: "see whether it hangs, or whether a firewall drops packets",
        RedisErrorKind.DISCONNECTED: "start Redis, or correct REDIS_URL",
    }
    reason = describe(error)
    return fail(
        f"{url}: {reason}", advice.get(error.kind, "correct REDIS_URL, or the problem that Redis reports")
    )


_MAY_NOT_ASK = "give the user +info and +config|get, as conf/redis-acl.conf does"


def version(facts: RedisFacts) -> Finding:
    """Require Redis 6.2 or newer, or any Valkey."""
    name = "Valkey" if "valkey_version" in facts.info else "Redis"
    if facts.server.version is None:
        return warn("unknown: the user may not ask", _MAY_NOT_ASK)
    numbers = tuple(int(number) for number in re.findall(r"\d+", facts.server.version)[:2])
    if numbers < _OLDEST:
        return fail(f"{name} {facts.server.version} is too old", "install Redis 6.2 or newer, or Valkey")
    return ok(f"{name} {facts.server.version}")


def persistence(facts: RedisFacts) -> Finding:
    """Judge whether a crash or a restart loses jobs."""
    if facts.info.get("aof_last_write_status", "ok") != "ok":
        return fail("the last write of the append-only file failed", "look at the disk of Redis, and its log")
    danger = facts.server.persistence_danger
    if danger is not None:
        problem, _, advice = danger.partition("; ")
        snapshots = "" if not facts.has_snapshots else " (except those of the last snapshot)"
        return fail(problem + snapshots, advice)
    if facts.server.appendfsync is None or facts.server.has_aof is None:
        return warn("unknown: the user may not ask", _MAY_NOT_ASK)
    return ok(f"append-only file, fsync {facts.server.appendfsync}")


def eviction(facts: RedisFacts) -> Finding:
    """Judge whether a full Redis throws jobs away."""
    danger = facts.server.eviction_danger
    if danger is not None:
        problem, _, advice = danger.partition("; ")
        return fail(problem, f"{advice}: CONFIG SET maxmemory-policy noeviction, and in redis.conf")
    if facts.server.maxmemory_policy is None:
        return warn("unknown: the user may not ask", _MAY_NOT_ASK)
    return ok("noeviction")


def memory(facts: RedisFacts) -> Finding:
    """Judge how soon Redis will have no memory for jobs."""
    used, limit = facts.number("used_memory"), facts.number("maxmemory")
    if not limit:
        return ok(f"{mebibytes(used)} used, no limit set")
    said = f"{mebibytes(used)} of {mebibytes(limit)} used"
    if used < limit * _MUCH_MEMORY:
        return ok(said)
    advice = "raise maxmemory, or keep fewer finished jobs (removeOnComplete in --job-options)"
    return (fail if used >= limit else warn)(said, advice)


def replication(facts: RedisFacts) -> Finding:
    """Judge whether Redis takes writes, and has the replicas that ``--ack`` waits for."""
    replicas, wanted = facts.number("connected_slaves"), facts.settings.ack
    if facts.info.get("role", "master") != "master":
        return fail(
            "this is a replica: it takes no jobs",
            "name the primary in REDIS_URL, or the Sentinels: redis+sentinel://HOST,HOST/NAME",
        )
    if replicas < wanted:
        return fail(
            f"{replicas} replicas, but --ack replicas:{wanted} waits for {wanted}: each event stays on disk",
            "connect the replicas, or set --ack redis",
        )
    return ok(f"primary, replicas: {replicas}")


def clock(facts: RedisFacts) -> Finding:
    """Judge how far the clocks of the two machines are apart."""
    if facts.ahead_s is None:
        return warn("unknown: Redis does not report its time", _MAY_NOT_ASK)
    off_s, tolerance_s = abs(facts.ahead_s), facts.settings.tolerance_s
    if off_s <= _SKEW_S:
        return ok(f"within {_SKEW_S:g} s of ours")
    said = f"Redis' clock is {off_s:.0f} s {'ahead of' if facts.ahead_s > 0 else 'behind'} ours"
    advice = "set both clocks by NTP: delays and signatures depend on them"
    if off_s > tolerance_s:
        return fail(f"{said}: more than --tolerance, {tolerance_s} s, allows for signatures", advice)
    return warn(said, advice)


SERVER: Checks[RedisFacts] = (
    ("connection", connection),
    ("version", version),
    ("persistence", persistence),
    ("eviction", eviction),
    ("memory", memory),
    ("replication", replication),
    ("clock", clock),
)

# -- the judgements of a queue ------------------------------------------------------------------------------


def rights(facts: QueueFacts) -> Finding:
    """Judge the rights of the user."""
    needed = [command for command in facts.refused if command not in _OPTIONAL]
    advice = f"give it the rights of conf/redis-acl.conf, and the keys ~{facts.keys.job('*')}"
    if needed:
        return fail(f"the user may not run {', '.join(needed)} on the queue's keys", advice)
    if facts.refused:
        return warn(f"the user may not run {', '.join(facts.refused)}, which health and metrics need", advice)
    return ok("the user may run all commands that add and count jobs")


def script(facts: QueueFacts) -> Finding:
    """Judge whether a job can be added, once, as the daemon adds it."""
    if facts.problem is not None:
        return fail(f"no job can be added: {facts.problem}", _script_advice(facts.problem))
    if facts.script_s is None:
        return skipped("needs rights")  # to remove what it adds
    took, deadline_s = milliseconds(facts.script_s), facts.settings.redis_deadline_s
    if facts.script_s > deadline_s / 2:
        return warn(
            f"a job takes {took}, of the {deadline_s:g} s of --redis-deadline", "see what slows Redis"
        )
    return ok(f"adds a job once, in {took}")


def _script_advice(problem: str) -> str:
    advice = {
        "OOM": "raise maxmemory, or remove finished jobs",
        "READONLY": "name the primary in REDIS_URL",
        "MISCONF": "see why Redis cannot save to its disk",
        "NOREPLICAS": "connect the replicas that min-replicas-to-write asks for",
        "NOPERM": "give the user the rights of conf/redis-acl.conf",
        "MOVED": "use one prefix with a hash tag, and the node that has its slot",
        "CROSSSLOT": "set --prefix '{bull}' here and in the workers",
    }
    return advice.get(problem.partition(" ")[0], "see the other lines, and Redis' log")


def keys(facts: QueueFacts) -> Finding:
    """Judge whether keys of the queue belong to something else."""
    if facts.foreign:
        return fail(
            f"{', '.join(facts.foreign)}: no job can be added",
            "see whose they are; set --prefix or --queue to a name that no other program uses",
        )
    return ok("none belongs to another program")


def slot(facts: QueueFacts) -> Finding:
    """Judge whether the keys of the queue are on one node, if Redis is a cluster."""
    if not facts.server.is_cluster:
        return ok("no cluster")
    if facts.keys.is_hash_tagged:
        return ok("the keys share a slot of the cluster")
    return fail(
        "Redis is a cluster: the keys of a queue must share a slot",
        "set --prefix '{bull}' here and in the workers",
    )


def paused(facts: QueueFacts) -> Finding:
    """Judge whether workers take jobs from the queue."""
    if facts.waiting and facts.paused:
        return fail(
            f"jobs are in two lists, {facts.waiting} in wait and {facts.paused} in paused: "
            "resume() of BullMQ 5 would lose those in wait",
            "resume the queue with BullMQ 6, and set --wire to the version of the workers",
        )
    if facts.is_paused:
        return warn(
            f"paused, jobs waiting: {facts.waiting + facts.paused}", "resume it: queue.resume() in BullMQ"
        )
    return ok(f"not paused, jobs waiting: {facts.waiting}")


def bullmq(facts: QueueFacts) -> Finding:
    """Judge which BullMQ shares the queue."""
    wire = facts.settings.wire
    if facts.version is None:
        return ok("no Queue object of BullMQ has opened it yet")
    match = re.fullmatch(r"bullmq(?:-pro)?:(\d+)\..*", facts.version)
    if match is None or match[1] not in ("5", "6"):
        return warn(
            f"{facts.version} opened it last; webhookd is tested with BullMQ 5 and 6",
            "use BullMQ 5 or 6 in the workers",
        )
    if wire is not Wire.AUTO and match[1] != wire.value:
        return warn(f"{facts.version} opened it last, but --wire is {wire.value}", "set --wire auto")
    return ok(f"{facts.version} opened it last")


QUEUE: Checks[QueueFacts] = (
    ("rights", rights),
    ("script", script),
    ("keys", keys),
    ("cluster", slot),
    ("paused", paused),
    ("BullMQ", bullmq),
)

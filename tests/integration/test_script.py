"""The script on real servers: its answers, and that no failure leaves half a job."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from redis.backoff import NoBackoff
from redis.exceptions import (
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)
from redis.retry import Retry

from tests.support.bullmq import Queue, dump
from tests.support.process import wait_until
from tests.support.servers import FLAVOURS, ClusterNode, RedisServer
from webhookd.bullmq.keys import QueueKeys
from webhookd.bullmq.script import AddError, AddResult, Wire
from webhookd.model import Job

ADDED, LOCK_HELD, JOB_EXISTS = AddResult.ADDED, AddResult.LOCK_HELD, AddResult.JOB_EXISTS

COMMANDS = (
    *("eval", "type", "exists", "hmget", "llen", "incrby", "hset", "del", "hmset", "xadd", "xdel"),
    *("lpush", "rpush", "lrem", "incr", "zadd", "zrem", "zrange", "zrevrangebyscore", "set"),
)
"""The commands that the script needs. The right to EVALSHA is that to EVAL."""


@pytest.fixture(scope="module", params=FLAVOURS)
def server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    with RedisServer(request.param) as server:
        yield server


@pytest.fixture
def client(server: RedisServer) -> Iterator[Any]:
    with server.client() as client:
        client.flushall()
        yield client


@pytest.fixture
def queue(client: Any) -> Queue:
    return Queue(client)


def one_of_each_kind(queue: Queue) -> list[Job]:
    return [
        queue.job("a.plain"),
        queue.job("a.lifo", lifo=True),
        queue.job("a.prioritized", priority=3),
        queue.job("a.delayed", delay=1000),
        queue.job("a.delayed-too", delay=1000),
    ]


def add_or_error(queue: Queue, jobs: Sequence[Job]) -> list[AddResult | AddError]:
    """Return the answers. If the whole call fails, its error is the answer for each job."""
    try:
        return queue.add(*jobs)
    except RedisError as error:
        return [AddError(_reply_text(error))] * len(jobs)


def _reply_text(error: RedisError) -> str:
    """Return an error reply as Redis sent it. redis-py turns known codes into classes."""
    codes: dict[type[RedisError], str] = {
        NoPermissionError: "NOPERM ",
        OutOfMemoryError: "OOM ",
        ReadOnlyError: "READONLY ",
    }
    return codes.get(type(error), "") + str(error)


def assert_accepted_once(queue: Queue, jobs: Sequence[Job]) -> None:
    """Check that the same jobs are accepted after a failure, and that each is there once."""
    answers = queue.add(*jobs)
    assert not [answer for answer in answers if isinstance(answer, AddError)]
    assert sorted(queue.held_ids()) == sorted({job.id for job in jobs})
    assert queue.faults() == []


def added_ids(queue: Queue) -> list[str]:
    return sorted(event[b"jobId"].decode() for event in queue.events("added"))


# Answers


def test_each_job_has_its_answer_in_order(queue: Queue, client: Any) -> None:
    queue.add(queue.job("a.locked"), queue.job("a.known"))
    client.delete(queue.keys.create_lock("a.known"))
    client.set(queue.keys.job("a.strange"), "no job")

    names = ("a.new", "a.locked", "a.strange", "a.known", "a.new")
    answers = queue.add(*map(queue.job, names))

    strange = AddError("WRONGTYPE bull:q:a.strange is a string, not a hash")
    assert answers == [ADDED, LOCK_HELD, strange, JOB_EXISTS, LOCK_HELD]
    assert queue.held_ids() == ["a.new", "a.known", "a.locked"]


def test_a_duplicate_has_the_effects_of_bullmq_alone(queue: Queue, client: Any) -> None:
    queue.add(queue.job("a.1"))
    client.pexpire(queue.keys.create_lock("a.1"), 30_000)
    before = dump(client)

    other = Queue(client, set_by="another")
    assert other.add(queue.job("a.1", name="other", data="[]", priority=1, attempts=7)) == [LOCK_HELD]

    after = dump(client)
    assert after.pop(queue.keys.id) == ("string", -1, b"2")
    assert queue.events()[-1] == {b"event": b"duplicated", b"jobId": b"a.1"}
    assert len(queue.events()) == 3
    for changed in queue.keys.id, queue.keys.events:
        before.pop(changed)
        after.pop(changed, None)
    assert after == before


def test_a_lock_outlives_its_job(queue: Queue, client: Any) -> None:
    queue.add(queue.job("a.1"))
    client.delete(queue.keys.job("a.1"), queue.keys.wait)
    assert queue.add(queue.job("a.1")) == [LOCK_HELD]
    assert queue.held_ids() == []


def test_a_known_job_gets_no_lock(queue: Queue, client: Any) -> None:
    queue.add(queue.job("a.1"))
    client.delete(queue.keys.create_lock("a.1"))
    assert queue.add(queue.job("a.1")) == [JOB_EXISTS]
    assert not client.exists(queue.keys.create_lock("a.1"))


def test_a_lock_says_who_and_ends(queue: Queue, client: Any) -> None:
    queue.add(queue.job("a.1"))
    assert client.get(queue.keys.create_lock("a.1")) == b"the tests"
    assert 0 < client.pttl(queue.keys.create_lock("a.1")) <= queue.lock_ttl_ms


def test_order_is_kept(queue: Queue) -> None:
    ids = [f"a.{number}" for number in range(500)]
    for start in range(0, 500, 128):
        assert set(queue.add(*map(queue.job, ids[start : start + 128]))) == {ADDED}
    assert queue.held_ids() == ids[::-1]  # workers take from the end


@pytest.mark.parametrize(
    ("wire", "version", "target"),
    [
        (Wire.AUTO, "bullmq:5.81.5", "paused"),
        (Wire.AUTO, "bullmq:6.7.0", "wait"),
        (Wire.AUTO, "bullmq:10.0.0", "wait"),
        (Wire.AUTO, "bullmq-pro:7.41.0", "paused"),
        (Wire.AUTO, "unreadable", "paused"),
        (Wire.AUTO, None, "paused"),
        (Wire.V5, "bullmq:6.7.0", "paused"),
        (Wire.V6, "bullmq:5.81.5", "wait"),
    ],
)
def test_where_the_jobs_of_a_paused_queue_go(
    queue: Queue, client: Any, wire: Wire, version: str | None, target: str
) -> None:
    client.hset(queue.keys.meta, "paused", "1")
    if version:
        client.hset(queue.keys.meta, "version", version)
    assert queue.add(queue.job("a.1"), wire=wire) == [ADDED]
    assert client.lrange(queue.keys.job(target), 0, -1) == [b"a.1"]
    assert not client.exists(queue.keys.marker)


@pytest.mark.parametrize("there", ["wait", "paused"])
@pytest.mark.parametrize("wire", [Wire.V5, Wire.V6])
def test_a_list_that_is_there_gets_the_jobs_of_a_paused_queue(
    queue: Queue, client: Any, wire: Wire, there: str
) -> None:
    queue.add(queue.job("a.1"))
    if there == "paused":
        client.rename(queue.keys.wait, queue.keys.paused)
    client.hset(queue.keys.meta, "paused", "1")
    assert queue.add(queue.job("a.2"), wire=wire) == [ADDED]
    assert client.lrange(queue.keys.job(there), 0, -1) == [b"a.2", b"a.1"]


@pytest.mark.parametrize("flavour", ["redis-7.0", "valkey-9"])
def test_a_cluster_takes_hash_tagged_queues_alone(flavour: str) -> None:
    with ClusterNode(flavour) as node, node.client() as client:
        for keys in QueueKeys("{bull}", "q"), QueueKeys("bull", "{q}"):
            queue = Queue(client, keys)
            assert keys.is_hash_tagged
            assert queue.add(*(queue.job(f"a.{number}") for number in range(128))) == [ADDED] * 128
            assert len(queue.held_ids()) == 128
            assert queue.faults() == []

        untagged = Queue(client)
        assert not untagged.keys.is_hash_tagged
        with pytest.raises(ResponseError, match=r"CROSSSLOT|same slot"):
            untagged.add(untagged.job("a.1"))


# Failures of the call as a whole


def refusal(queue: Queue, jobs: Sequence[Job]) -> str:
    """Return the error, which must be the same for all jobs."""
    (answer,) = set(add_or_error(queue, jobs))
    assert isinstance(answer, AddError)
    return answer.reason


def test_no_memory(queue: Queue, client: Any) -> None:
    jobs = one_of_each_kind(queue)
    client.config_set("maxmemory", "1")
    try:
        assert refusal(queue, jobs).startswith("OOM ")
    finally:
        client.config_set("maxmemory", "0")
    assert dump(client) == {}
    assert_accepted_once(queue, jobs)


@pytest.mark.parametrize("flavour", ["redis-7.0", "valkey-9"])  # 6.2 does not hold scripts to it
def test_too_few_replicas(flavour: str) -> None:
    with RedisServer(flavour, ["min-replicas-to-write 1"]) as server, server.client() as client:
        queue = Queue(client)
        jobs = one_of_each_kind(queue)
        assert refusal(queue, jobs).startswith("NOREPLICAS ")
        assert dump(client) == {}
        client.config_set("min-replicas-to-write", "0")
        assert_accepted_once(queue, jobs)


def test_a_replica(queue: Queue, client: Any) -> None:
    client.execute_command("REPLICAOF", "127.0.0.1", "1")
    try:
        assert refusal(queue, [queue.job("a.1")]).startswith("READONLY ")
    finally:
        client.execute_command("REPLICAOF", "NO", "ONE")
    assert_accepted_once(queue, [queue.job("a.1")])


def test_memory_that_runs_out_during_a_call(queue: Queue, client: Any) -> None:
    """A call that began within the limit is completed. The next one fails as a whole."""
    added: list[str] = []
    client.config_set("maxmemory", client.info("memory")["used_memory"] + 2_000_000)
    try:
        for number in range(100):
            jobs = [queue.job(f"a.{number}-{i}", data=f'"{"x" * 50_000}"') for i in range(4)]
            answers = add_or_error(queue, jobs)
            if isinstance(answers[0], AddError):
                break
            assert answers == [ADDED] * 4
            added += [job.id for job in jobs]
    finally:
        client.config_set("maxmemory", "0")
    assert isinstance(answers[0], AddError)
    assert answers[0].reason.startswith("OOM ")
    assert sorted(queue.held_ids()) == sorted(added)
    assert queue.faults() == []
    assert queue.add(*jobs) == [ADDED] * 4


@pytest.mark.parametrize(
    "suffix",
    ["wait", "paused", "meta", "id", "delayed", "active", "prioritized", "pc", "events", "marker"],
)
def test_a_key_of_the_queue_with_another_type(queue: Queue, client: Any, suffix: str) -> None:
    jobs = one_of_each_kind(queue)
    client.sadd(queue.keys.job(suffix), "no list, hash, string, stream or sorted set")
    before = dump(client)

    assert refusal(queue, jobs).startswith(f"WRONGTYPE bull:q:{suffix} is a set, not a ")
    assert dump(client) == before
    client.delete(queue.keys.job(suffix))
    assert_accepted_once(queue, jobs)
    assert added_ids(queue) == sorted(job.id for job in jobs)


# Failures of one job


def test_a_job_in_the_place_of_something_else(queue: Queue, client: Any) -> None:
    jobs = one_of_each_kind(queue)
    for job in jobs:
        client.rpush(queue.keys.job(job.id), "no job")
    good = queue.job("a.good")

    *refused, answer = queue.add(*jobs, good)

    assert [answer.reason.split()[0] for answer in refused if isinstance(answer, AddError)] == [
        "WRONGTYPE"
    ] * 5
    assert answer is ADDED
    assert queue.held_ids() == ["a.good"]
    assert queue.faults() == []
    for job in jobs:
        client.delete(queue.keys.job(job.id))
    assert_accepted_once(queue, [*jobs, good])


def test_an_event_that_fails_after_the_push(queue: Queue, client: Any) -> None:
    """The whole job is there when the second event fails, and nothing of it afterwards."""
    jobs = one_of_each_kind(queue)
    client.hset(queue.keys.meta, "opts.maxLenEvents", "many")

    assert refusal(queue, jobs)
    assert queue.held_ids() == []
    assert queue.events() == []
    assert queue.faults() == []
    client.hset(queue.keys.meta, "opts.maxLenEvents", "1000")
    assert_accepted_once(queue, jobs)
    assert added_ids(queue) == sorted(job.id for job in jobs)


def test_a_counter_that_is_no_number(queue: Queue, client: Any) -> None:
    client.set(queue.keys.pc, "many")
    plain, prioritized = queue.job("a.plain"), queue.job("a.prioritized", priority=1)

    answers = queue.add(prioritized, plain)

    assert answers[1] is ADDED
    assert isinstance(answers[0], AddError)
    assert queue.faults() == []
    client.delete(queue.keys.pc)
    assert_accepted_once(queue, [prioritized, plain])
    assert added_ids(queue) == ["a.plain", "a.prioritized"]


# Failures because of a missing right


def user_with(server: RedisServer, client: Any, *rules: str) -> Any:
    """Return a client whose user has only these rules, on all keys."""
    client.execute_command("ACL", "SETUSER", "producer", "reset", "on", ">secret", "~*", *rules)
    return server.client(username="producer", password="secret")


def grant(client: Any, *rules: str) -> None:
    client.execute_command("ACL", "SETUSER", "producer", *rules)


def test_the_rights_that_suffice(server: RedisServer, queue: Queue, client: Any) -> None:
    with user_with(server, client, *(f"+{command}" for command in COMMANDS)) as producer:
        limited = Queue(producer)
        jobs = one_of_each_kind(queue)
        assert limited.add(*jobs) == [ADDED] * 5
        assert limited.add(*jobs) == [LOCK_HELD] * 5
        client.hset(queue.keys.meta, mapping={"concurrency": "1", "opts.maxLenEvents": "many"})
        assert isinstance(add_or_error(limited, [queue.job("b.1")])[0], AddError)
        assert queue.faults() == []


@pytest.mark.parametrize("command", COMMANDS)
def test_a_right_that_is_missing(server: RedisServer, queue: Queue, client: Any, command: str) -> None:
    with user_with(server, client, "+@all", f"-{command}") as producer:
        jobs = one_of_each_kind(queue)
        answers = add_or_error(Queue(producer), jobs)

        reasons = [answer.reason for answer in answers if isinstance(answer, AddError)]
        assert all(reason.startswith("NOPERM ") for reason in reasons)
        assert queue.faults() == []
        grant(client, f"+{command}")
        assert_accepted_once(Queue(producer), jobs)
        assert added_ids(queue) == sorted(job.id for job in jobs)


@pytest.mark.parametrize(
    "commands",
    [
        ["set", "lrem", "zrem"],
        ["set", "xdel"],
        ["set", "del"],
        ["xadd", "del"],
        ["lpush", "rpush", "zadd", "xdel"],
    ],
)
def test_a_missing_right_that_undoing_needs(
    server: RedisServer, queue: Queue, client: Any, commands: Sequence[str]
) -> None:
    """A job that cannot be removed stays whole, so that a repetition finds it."""
    with user_with(server, client, "+@all", *(f"-{command}" for command in commands)) as producer:
        jobs = one_of_each_kind(queue)
        assert refusal(Queue(producer), jobs).startswith("NOPERM ")
        assert queue.faults() == []
        grant(client, "+@all")
        assert_accepted_once(Queue(producer), jobs)


def test_a_right_that_some_jobs_need(server: RedisServer, queue: Queue, client: Any) -> None:
    with user_with(server, client, "+@all", "-rpush") as producer:
        limited = Queue(producer)
        lifo, plain = queue.job("a.lifo", lifo=True), queue.job("a.plain")
        refused, added = limited.add(lifo, plain)
        assert isinstance(refused, AddError)
        assert refused.reason.startswith("NOPERM ")
        assert added is ADDED
        assert queue.faults() == []
        with pytest.raises(NoPermissionError):  # if no job is added, the call fails
            limited.add(lifo)
        grant(client, "+@all")
        assert limited.add(lifo, plain) == [ADDED, LOCK_HELD]


# A kill


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_kill_of_redis_leaves_whole_jobs(flavour: str) -> None:
    acknowledged: list[str] = []
    batches = [[f"a.{number}-{i}" for i in range(8)] for number in range(10_000)]

    def add_until_killed(server: RedisServer) -> None:
        # Without redis-py's retries, which would repeat a batch whose answer was lost.
        with server.client(retry=Retry(NoBackoff(), 0)) as client:
            queue = Queue(client)
            for batch in batches:
                try:
                    queue.add(*map(queue.job, batch))
                except (RedisError, OSError):
                    return
                acknowledged.extend(batch)

    with RedisServer(flavour, ["appendonly yes", "appendfsync always"]) as server:
        producer = threading.Thread(target=add_until_killed, args=[server])
        producer.start()
        wait_until(lambda: len(acknowledged) > 100, "some batches were added")
        server.kill()
        producer.join()
        server.start()
        with server.client() as client:
            queue = Queue(client)
            assert queue.faults() == []
            assert set(acknowledged) <= set(queue.held_ids())
            again = batches[: len(acknowledged) // 8 + 1]
            for batch in again:
                queue.add(*map(queue.job, batch))
            assert sorted(queue.held_ids()) == sorted(job_id for batch in again for job_id in batch)
            assert queue.faults() == []
            assert added_ids(queue) == sorted(queue.held_ids())

"""An event becomes one job within the dedup window, even if it arrives repeatedly and at several replicas.

`test_script` has what the script does with a lock and its job.
"""

from __future__ import annotations

import socket
import time
from collections import Counter

import pytest

from tests.integration.conftest import StartDaemon, StartReplicas
from tests.support.bullmq import Queue
from tests.support.process import wait_until
from tests.support.servers import RedisServer
from tests.support.webhooks import DIRECT, Webhook, connected, outcome, post, post_at_once, webhook
from tests.support.workers import LINES, Worker
from webhookd.bullmq.keys import QueueKeys

COPIES = 500
EVENT = webhook()

QUEUED = (202, "queued")
ALREADY_QUEUED = (200, "already_queued")


def chatwoot_queue(redis: RedisServer) -> Queue:
    return Queue(redis.client(), QueueKeys("bull", "chatwoot"))


def lock_ttl_ms(queue: Queue, event: Webhook = EVENT) -> int:
    return int(queue.client.pttl(queue.keys.create_lock(event.job_id)))


def forget(queue: Queue, *keys: str) -> None:
    assert queue.client.delete(*keys) == len(keys)


def test_500_copies_at_once_to_three_replicas_are_one_job(
    redis: RedisServer, start_replicas: StartReplicas
) -> None:
    ports = [connected(replica).port for replica in start_replicas(3, "--redis", redis.url, *DIRECT)]

    answers = post_at_once(ports, [EVENT] * COPIES)

    assert Counter(map(outcome, answers)) == {QUEUED: 1, ALREADY_QUEUED: COPIES - 1}
    queue = chatwoot_queue(redis)
    assert Counter(entry[b"event"] for entry in queue.events()) == {
        b"added": 1,
        b"waiting": 1,
        b"duplicated": COPIES - 1,
    }
    assert {entry[b"jobId"].decode() for entry in queue.events()} == {EVENT.job_id}
    assert queue.held_ids() == [EVENT.job_id]
    assert queue.faults() == []


@pytest.mark.parametrize("line", LINES)
def test_500_copies_of_a_job_that_is_finished_and_removed_are_no_job(
    line: str, redis: RedisServer, start_replicas: StartReplicas
) -> None:
    options = "--redis", redis.url, "--job-options", '{"removeOnComplete": true}'
    ports = [connected(replica).port for replica in start_replicas(3, *options, *DIRECT)]
    queue = chatwoot_queue(redis)
    with Worker(line, redis.port) as worker:
        assert outcome(post(ports[0], EVENT)) == QUEUED
        wait_until(lambda: bool(queue.events("completed")), "the job is finished")
        assert not queue.client.exists(queue.keys.job(EVENT.job_id))

        answers = post_at_once(ports, [EVENT] * COPIES)
        assert worker.stop() == 0
        assert len(worker.processed) == 1

    assert Counter(map(outcome, answers)) == {ALREADY_QUEUED: COPIES}
    assert len(queue.events("added")) == 1
    assert len(queue.events("duplicated")) == COPIES
    assert queue.held_ids() == []


@pytest.mark.parametrize(
    ("options", "expected_ms"),
    [
        ([], 3_600_000),
        (["--lock-ttl", "90000", "--dedup-ttl", "30000"], 90_000),
        (["--lock-ttl", "30000", "--dedup-ttl", "90000"], 90_000),
        (["--dedup-ttl", "0"], 5_000),
        (["--dedup-ttl", "0", "--lock-ttl", "30000"], 30_000),
    ],
)
def test_the_lock_lives_as_long_as_the_longer_of_the_two_ttls(
    redis: RedisServer, start_daemon: StartDaemon, options: list[str], expected_ms: int
) -> None:
    daemon = connected(start_daemon("--redis", redis.url, *DIRECT, *options))

    assert outcome(post(daemon.port, EVENT)) == QUEUED

    # Even on a slow server, the lock is not in the range of the next shorter setting.
    assert expected_ms / 3 < lock_ttl_ms(chatwoot_queue(redis)) <= expected_ms


def test_the_lock_says_when_and_by_which_replica_it_was_set(
    redis: RedisServer, start_replicas: StartReplicas
) -> None:
    queue = chatwoot_queue(redis)
    for number, replica in enumerate(start_replicas(2, "--redis", redis.url, *DIRECT)):
        event = webhook(number + 10)
        before_ms = time.time_ns() // 1_000_000
        assert outcome(post(connected(replica).port, event)) == QUEUED
        after_ms = time.time_ns() // 1_000_000

        when_ms, holder = queue.client.get(queue.keys.create_lock(event.job_id)).decode().split(" ")
        assert before_ms <= int(when_ms) <= after_ms
        assert holder == f"{socket.gethostname()}:{replica.port}"


def test_the_plain_lock_expires_by_itself(redis: RedisServer, start_daemon: StartDaemon) -> None:
    daemon = connected(start_daemon("--redis", redis.url, *DIRECT, "--dedup-ttl", "0", "--lock-ttl", "50"))
    queue = chatwoot_queue(redis)
    assert outcome(post(daemon.port, EVENT)) == QUEUED
    forget(queue, queue.keys.wait, queue.keys.job(EVENT.job_id))
    wait_until(lambda: lock_ttl_ms(queue) == -2, "the lock is gone")

    assert outcome(post(daemon.port, EVENT)) == QUEUED

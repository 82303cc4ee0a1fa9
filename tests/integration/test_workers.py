"""Real BullMQ workers of both lines finish what webhookd queues."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.integration.conftest import StartReplicas
from tests.support.bullmq import Queue
from tests.support.process import wait_until
from tests.support.servers import RedisServer
from tests.support.webhooks import DIRECT, Webhook, connected, outcome, post_at_once, webhooks
from tests.support.workers import LINES, Worker
from webhookd.bullmq.keys import QueueKeys

JOBS_COUNT = 2000
BURST = 100


def bursts(events: list[Webhook]) -> Iterator[list[Webhook]]:
    for start in range(0, len(events), BURST):
        yield events[start : start + BURST]


@pytest.mark.parametrize("line", LINES)
def test_two_workers_finish_each_job_once_with_the_data_that_was_sent(
    line: str, redis: RedisServer, start_replicas: StartReplicas
) -> None:
    events = webhooks(JOBS_COUNT)
    ports = [connected(replica).port for replica in start_replicas(3, "--redis", redis.url, *DIRECT)]
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(line, redis.port)) for _ in range(2)]
        for burst in bursts(events):
            answers = post_at_once(ports, burst)
            assert Counter(map(outcome, answers)) == {(202, "queued"): len(burst)}

        def finished() -> int:
            return sum(len(worker.processed) for worker in workers)

        wait_until(lambda: finished() >= JOBS_COUNT, "the workers finish all jobs")
        assert [worker.stop() for worker in workers] == [0, 0]
        processed = [job for worker in workers for job in worker.processed]
        assert all(worker.processed for worker in workers)

    assert sorted((job.id, job.name, job.sha256) for job in processed) == sorted(
        (event.job_id, event.event, event.sha256) for event in events
    )
    with redis.client() as client:
        queue = Queue(client, QueueKeys("bull", "chatwoot"))
        assert not client.exists(
            queue.keys.wait, queue.keys.active, queue.keys.paused, queue.keys.job("failed")
        )
        for event in ("added", "completed"):
            assert Counter(entry[b"jobId"].decode() for entry in queue.events(event)) == {
                event.job_id: 1 for event in events
            }

"""A Redis Cluster: the keys of a queue share a slot, or the daemon says at its start what to set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.integration.conftest import StartDaemon
from tests.support.bullmq import Queue
from tests.support.http import connect, read_response
from tests.support.process import wait_until
from tests.support.servers import ClusterNode
from tests.support.webhooks import DIRECT, connected, outcome, post, webhook, webhooks
from webhookd.bullmq import QueueKeys

MAX_BATCH = 128
KEYS_OF_A_BATCH = 10 + 2 * MAX_BATCH


@pytest.fixture
def cluster() -> Iterator[ClusterNode]:
    with ClusterNode(config=["slowlog-log-slower-than 0", "slowlog-max-len 1024"]) as node:
        yield node


def key_counts(node: ClusterNode) -> list[int]:
    """How many keys each call of the script named, the latest call first."""
    with node.client() as client:
        commands = [entry["command"].split(b" ", 3) for entry in client.slowlog_get(1024)]
    return [int(command[2]) for command in commands if command[0].upper() == b"EVALSHA"]


@pytest.mark.parametrize(("prefix", "queue"), [("{bull}", "chatwoot"), ("bull", "{chatwoot}")])
def test_a_batch_of_128_jobs_works_with_a_hash_tag(
    cluster: ClusterNode, start_daemon: StartDaemon, prefix: str, queue: str
) -> None:
    options = "--prefix", prefix, "--queue", queue, "--redis-deadline", "1.5"
    daemon = connected(start_daemon("--redis", cluster.url, *DIRECT, *options))
    assert outcome(post(daemon.port, webhook())) == (202, "queued")
    events = webhooks(2 * MAX_BATCH)

    with ExitStack() as stack:
        connections = [stack.enter_context(connect(daemon.port)) for _ in events]
        for connection, event in zip(connections, events, strict=True):
            connection.sendall(event.request[:-1])
        # While Redis stands still, one call is under way, and all that comes meanwhile goes out in the next.
        cluster.suspend()
        for connection, event in zip(connections, events, strict=True):
            connection.sendall(event.request[-1:])
        assert daemon.get("/health/live").status == 200  # it came last: all the others have been read
        cluster.resume()
        answers = [read_response(connection) for connection in connections]

    assert Counter(map(outcome, answers)) == {(202, "queued"): len(events)}
    assert KEYS_OF_A_BATCH in key_counts(cluster)
    assert "--prefix" not in daemon.log
    with cluster.client() as client:
        held = Queue(client, QueueKeys(prefix, queue)).held_ids()
    assert sorted(held) == sorted([webhook().job_id, *(event.job_id for event in events)])


def test_without_a_hash_tag_the_start_says_what_to_set(
    cluster: ClusterNode, start_daemon: StartDaemon
) -> None:
    daemon = start_daemon("--redis", cluster.url, *DIRECT)

    wait_until(lambda: "--prefix '{bull}'" in daemon.log, "the log names the option and its value")

    response = post(daemon.port, webhook())
    assert outcome(response) == (500, "unavailable")
    assert int(response.headers["retry-after"]) > 0
    with cluster.client() as client:
        assert client.dbsize() == 0

"""A Redis Cluster: the keys of a queue share a slot, or the daemon logs at its start what to set."""

from __future__ import annotations

import json
import re
import time
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
from webhookd.bullmq.keys import QueueKeys

MAX_BATCH = 128
KEYS_OF_A_BATCH = 10 + 2 * MAX_BATCH


@pytest.fixture
def cluster() -> Iterator[ClusterNode]:
    with ClusterNode(config=["slowlog-log-slower-than 0", "slowlog-max-len 1024"]) as node:
        yield node


@pytest.fixture
def stranger() -> Iterator[ClusterNode]:
    """A node that belongs to no cluster, and has no slot."""
    with ClusterNode(slots=False) as node:
        yield node


def key_counts(node: ClusterNode) -> list[int]:
    """Return the number of keys of each call of the script, the latest call first."""
    with node.client() as client:
        commands = [entry["command"].split(b" ", 3) for entry in client.slowlog_get(1024)]
    return [int(command[2]) for command in commands if command[0].upper() == b"EVALSHA"]


@pytest.mark.parametrize(("prefix", "queue"), [("{bull}", "chatwoot"), ("bull", "{chatwoot}")])
def test_a_batch_of_128_jobs_works_with_a_hash_tag(
    cluster: ClusterNode, start_daemon: StartDaemon, prefix: str, queue: str
) -> None:
    options = "--prefix", prefix, "--queue", queue
    daemon = connected(start_daemon("--redis", cluster.url, *DIRECT, *options))
    assert outcome(post(daemon.port, webhook())) == (202, "queued")
    events = webhooks(2 * MAX_BATCH)

    with ExitStack() as stack:
        connections = [stack.enter_context(connect(daemon.port)) for _ in events]
        for connection, event in zip(connections, events, strict=True):
            connection.sendall(event.request[:-1])
        # While Redis is frozen, one call is under way, and the next one takes all that arrive.
        cluster.suspend()
        for connection, event in zip(connections, events, strict=True):
            connection.sendall(event.request[-1:])
        assert daemon.get("/health/live").status == 200  # so all webhooks before it have been read
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


def give_slot(tag: str, owner: ClusterNode, *nodes: ClusterNode) -> None:
    """Assign the keys with a hash tag to one of the nodes.

    First its epoch becomes the highest. Otherwise, an older claim on its way from another node would win.
    """
    with owner.client() as client:
        client.execute_command("CLUSTER BUMPEPOCH")
        owner_id = client.execute_command("CLUSTER MYID")
        slot = client.execute_command("CLUSTER KEYSLOT", tag)
    for node in nodes:
        with node.client() as client:
            client.execute_command("CLUSTER SETSLOT", slot, "NODE", owner_id)


def test_events_wait_on_disk_while_another_node_has_the_queue(
    cluster: ClusterNode, stranger: ClusterNode, start_daemon: StartDaemon
) -> None:
    nodes = [cluster, stranger]
    with cluster.client() as client:
        client.execute_command("CLUSTER MEET", "127.0.0.1", stranger.port, stranger.bus_port)
        known = "cluster_known_nodes"
        for node in nodes:
            with node.client(decode_responses=True) as other:
                wait_until(lambda: other.execute_command("CLUSTER INFO")[known] == "2", "they have met")
    give_slot("bull", stranger, *nodes)
    daemon = connected(start_daemon("--redis", cluster.url, "--prefix", "{bull}"))
    events = [webhook(number) for number in range(1, 6)]

    assert [outcome(post(daemon.port, event)) for event in events] == [(202, "spooled")] * len(events)
    wait_until(lambda: json.loads(daemon.get("/health").body)["status"] == "degraded", "health says degraded")
    where = rf"cannot be used: cluster: MOVED \d+ 127.0.0.1:{stranger.port}: that server has the queue"
    assert len(re.findall(where, daemon.log)) == 1
    time.sleep(1)  # it tries repeatedly, and logs this once
    assert daemon.log.count("connected to Redis at") <= 2

    give_slot("bull", cluster, *nodes)
    with cluster.client() as client:
        queue = Queue(client, QueueKeys("{bull}", "chatwoot"))
        wait_until(lambda: len(queue.held_ids()) == len(events), "all are jobs")
        assert queue.held_ids()[::-1] == [
            event.job_id for event in events
        ]  # the newest is the first of a list
    wait_until(lambda: "takes jobs again" in daemon.log, "the log says so")

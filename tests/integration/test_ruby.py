"""Chatwoot's HTTP clients in Ruby: rest-client 2.1.0 and Net::HTTP."""

from __future__ import annotations

import json
import socket
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from attrs import frozen

from tests.integration.conftest import StartDaemon
from tests.support.bullmq import Queue
from tests.support.daemon import Daemon
from tests.support.http import ANSWER_DEADLINE_S
from tests.support.process import find_tool
from tests.support.servers import RedisServer
from tests.support.webhooks import DIRECT, connected
from webhookd.bullmq.keys import QueueKeys
from webhookd.samples import SAMPLES, SAMPLES_DIRECTORY, SECRET, Sample

SCRIPT = Path(__file__).parents[1] / "ruby" / "send_samples.rb"
CLIENTS = ("rest-client", "net-http")
RUN_DEADLINE_S = 60.0


@frozen
class Sent:
    """The answer that Ruby received to one sample."""

    name: str
    status: int
    body: dict[str, Any]

    @property
    def sample(self) -> Sample:
        return SAMPLES[self.name]


def start_ruby(client: str, url: str, *secret: str) -> subprocess.Popen[str]:
    ruby = find_tool("ruby", "it is in Debian's package ruby")
    command = [ruby, str(SCRIPT), client, url, str(SAMPLES_DIRECTORY), *secret]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def send_samples(daemon: Daemon, client: str, *secret: str) -> list[Sent]:
    with start_ruby(client, daemon.webhook_url, *secret) as ruby:
        output, errors = ruby.communicate(timeout=RUN_DEADLINE_S)
    assert (ruby.returncode, errors) == (0, "")
    return [Sent(**json.loads(line)) for line in output.splitlines()]


def assert_all_queued(sent: list[Sent], redis: RedisServer) -> None:
    assert [one.name for one in sent] == list(SAMPLES)
    # Two samples are the same conversation's creation, once with its first message and once without.
    times = Counter(sample.job_id for sample in SAMPLES.values())
    assert sorted(times.values())[-2:] == [1, 2]
    first: dict[str, Sample] = {}
    for one in sent:
        repeated = one.sample.job_id in first
        status = "already_queued" if repeated else "queued"
        assert (one.status, one.body) == (
            200 if repeated else 202,
            {"status": status, "jobId": one.sample.job_id},
        )
        first.setdefault(one.sample.job_id, one.sample)
    with redis.client() as client:
        queue = Queue(client, QueueKeys("bull", "chatwoot"))
        assert sorted(queue.held_ids()) == sorted(first)
        for job_id, sample in first.items():
            name, data = client.hmget(queue.keys.job(job_id), "name", "data")
            assert (name, data) == (sample.event.encode(), sample.body)


@pytest.mark.parametrize("client", CLIENTS)
def test_an_open_source_takes_every_sample(
    client: str, redis: RedisServer, start_daemon: StartDaemon
) -> None:
    daemon = connected(start_daemon("--redis", redis.url, *DIRECT))

    assert_all_queued(send_samples(daemon, client), redis)


@pytest.mark.parametrize("client", CLIENTS)
def test_what_ruby_signs_is_taken(client: str, redis: RedisServer, start_daemon: StartDaemon) -> None:
    daemon = connected(start_daemon("--redis", redis.url, *DIRECT, environ={"WEBHOOK_SECRET": SECRET}))

    assert_all_queued(send_samples(daemon, client, SECRET), redis)


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("secret", [["not the secret"], []], ids=["wrong", "stale or none"])
def test_what_is_not_signed_with_the_secret_is_refused(
    client: str, secret: list[str], redis: RedisServer, start_daemon: StartDaemon
) -> None:
    daemon = connected(start_daemon("--redis", redis.url, *DIRECT, environ={"WEBHOOK_SECRET": SECRET}))

    sent = send_samples(daemon, client, *secret)

    assert [one.name for one in sent] == list(SAMPLES)
    assert Counter(one.status for one in sent) == {401: len(SAMPLES)}
    assert all(set(one.body) == {"error"} for one in sent)
    with redis.client() as connection:
        assert connection.dbsize() == 0
    assert SECRET not in daemon.log


def test_net_http_sends_the_head_that_chatwoot_sends() -> None:
    """The names and their order were recorded from Chatwoot itself."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(ANSWER_DEADLINE_S)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/webhook/chatwoot"
        with start_ruby("net-http", url) as ruby:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(ANSWER_DEADLINE_S)
                head = b""
                while b"\r\n\r\n" not in head:
                    head += connection.recv(65_536)
            ruby.kill()

    lines = head.split(b"\r\n\r\n")[0].decode().split("\r\n")
    assert lines[0] == "POST /webhook/chatwoot HTTP/1.1"
    assert [line.split(":")[0] for line in lines[1:]] == [
        "Accept-Encoding",
        "Accept",
        "User-Agent",
        "Host",
        "Content-Type",
        "X-Chatwoot-Delivery",
        "X-Chatwoot-Timestamp",
        "X-Chatwoot-Signature",
        "Content-Length",
    ]

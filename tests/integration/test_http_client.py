"""The answers of the daemon as an HTTP client sees them.

`tests/unit/test_web.py` has each row of the table of answers, and `tests/unit/http` what bad clients send.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
import pytest_twisted
from attrs import frozen
from treq.client import HTTPClient
from twisted.internet.defer import Deferred, gatherResults

from tests.integration.conftest import StartDaemon
from tests.support.daemon import Daemon
from tests.support.http import connect, exchange, read_response, request_bytes
from tests.support.servers import RedisServer
from tests.support.webhooks import DIRECT, ODD, PATH, Webhook, connected, webhook, webhooks
from webhookd.bullmq.keys import QueueKeys
from webhookd.samples import SAMPLES

KEYS = QueueKeys("bull", "chatwoot")
JSON = {"Content-Type": "application/json"}


@frozen
class Answer:
    """One answer that treq received."""

    status: int
    headers: Mapping[str, str]
    content: Any


async def request(http: HTTPClient, method: str, url: str, **options: Any) -> Answer:
    response = await http.request(method, url, allow_redirects=False, **options)
    headers = {
        name.decode().lower(): b", ".join(values).decode()
        for name, values in response.headers.getAllRawHeaders()
    }
    return Answer(response.code, headers, json.loads(await response.content()))


async def post(http: HTTPClient, daemon: Daemon, event: Webhook) -> Answer:
    return await request(http, "POST", daemon.webhook_url, data=event.body, headers=dict(event.headers))


@pytest.fixture
def daemon(redis: RedisServer, start_daemon: StartDaemon) -> Daemon:
    return connected(start_daemon("--redis", redis.url, *DIRECT))


@pytest_twisted.ensureDeferred
async def test_an_event_is_202_and_its_repetition_200(http: HTTPClient, daemon: Daemon) -> None:
    event = webhook()

    first, second = await post(http, daemon, event), await post(http, daemon, event)

    assert (first.status, first.content) == (202, {"status": "queued", "jobId": event.job_id})
    assert (second.status, second.content) == (200, {"status": "already_queued", "jobId": event.job_id})
    for answer in first, second:
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["access-control-allow-origin"] == "*"


@pytest_twisted.ensureDeferred
async def test_many_clients_at_once_each_get_their_own_answer(
    http: HTTPClient, daemon: Daemon, redis: RedisServer
) -> None:
    events = webhooks(300)

    answers = await gatherResults([Deferred.fromCoroutine(post(http, daemon, event)) for event in events])

    assert [(answer.status, answer.content["jobId"]) for answer in answers] == [
        (202, event.job_id) for event in events
    ]
    with redis.client() as client:
        assert [client.hget(KEYS.job(event.job_id), "data") for event in events] == [
            event.body for event in events
        ]


@pytest_twisted.ensureDeferred
async def test_a_large_mail_arrives_byte_for_byte(
    http: HTTPClient, daemon: Daemon, redis: RedisServer
) -> None:
    content = "\u00e9\u4e16\U0001f600\\u003c" * 350_000
    body = f'{{"event":"message_created","id":9,"inbox":{{"id":1}},"content":"{content}"}}'.encode()

    answer = await request(http, "POST", daemon.webhook_url, data=body, headers=JSON)

    assert (answer.status, answer.content["jobId"]) == (202, "chatwoot.message_created.1.9")
    with redis.client() as client:
        assert client.hget(KEYS.job("chatwoot.message_created.1.9"), "data") == body


@pytest_twisted.ensureDeferred
async def test_an_event_that_is_filtered_out_is_200_and_no_job(
    http: HTTPClient, redis: RedisServer, start_daemon: StartDaemon
) -> None:
    events = "--events", "message_created,contact_created"
    daemon = connected(start_daemon("--redis", redis.url, *DIRECT, *events))

    ignored = await post(http, daemon, Webhook.from_sample(SAMPLES["conversation_typing_on"]))
    taken = await post(http, daemon, Webhook.from_sample(SAMPLES["contact_created"]))

    assert (ignored.status, ignored.content) == (
        200,
        {"status": "ignored", "event": "conversation_typing_on"},
    )
    assert taken.status == 202
    with redis.client() as client:
        assert client.llen(KEYS.wait) == 1


@pytest_twisted.ensureDeferred
async def test_health_without_redis(http: HTTPClient, daemon: Daemon, redis: RedisServer) -> None:
    healthy = await request(http, "GET", f"{daemon.url}/health")
    redis.kill()
    await post(http, daemon, webhook())
    ill = await request(http, "GET", f"{daemon.url}/health")

    assert (healthy.status, healthy.content["status"], healthy.content["redis"]["status"]) == (
        200,
        "ok",
        "up",
    )
    assert ill.status == 503


def test_chunks_that_arrive_byte_by_byte(daemon: Daemon, redis: RedisServer) -> None:
    body = ODD.numbered(1).body
    chunks = [body[start : start + 7] for start in range(0, len(body), 7)]
    framed = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in [*chunks, b""])
    with connect(daemon.port) as connection:
        for byte in request_bytes("POST", PATH, {**JSON, "Transfer-Encoding": "chunked"}) + framed:
            connection.sendall(bytes([byte]))
        answer = read_response(connection)

    assert answer.status == 202
    with redis.client() as client:
        assert client.hget(KEYS.job(json.loads(answer.body)["jobId"]), "data") == body


def test_a_body_over_the_limit_is_413_before_it_has_arrived(
    redis: RedisServer, start_daemon: StartDaemon
) -> None:
    daemon = connected(start_daemon("--redis", redis.url, *DIRECT, "--max-body", "1000"))

    answer = exchange(daemon.port, request_bytes("POST", PATH, {**JSON, "Content-Length": "1001"}))

    assert answer.status == 413
    assert json.loads(answer.body)["error"]["code"] == "too_large"

"""Each row of the table of answers, as treq sees it, and as bare bytes where no client would send them."""

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
MIB = 1_048_576


@frozen
class Answer:
    """What treq got."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def content(self) -> Any:
        return json.loads(self.body)

    @property
    def error_code(self) -> str:
        assert set(self.content) == {"error"}
        assert set(self.content["error"]) == {"code", "message"}
        return str(self.content["error"]["code"])


async def request(http: HTTPClient, method: str, url: str, **options: Any) -> Answer:
    response = await http.request(method, url, allow_redirects=False, **options)
    headers = {
        name.decode().lower(): b", ".join(values).decode()
        for name, values in response.headers.getAllRawHeaders()
    }
    return Answer(response.code, headers, await response.content())


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


@pytest.mark.parametrize("size_bytes", [150_000, 5 * MIB])
@pytest_twisted.ensureDeferred
async def test_a_large_mail_arrives_byte_for_byte(
    http: HTTPClient, daemon: Daemon, redis: RedisServer, size_bytes: int
) -> None:
    content = "\u00e9\u4e16\U0001f600\\u003c" * (size_bytes // 15)
    body = f'{{"event":"message_created","id":9,"inbox":{{"id":1}},"content":"{content}"}}'.encode()

    answer = await request(http, "POST", daemon.webhook_url, data=body, headers=JSON)

    assert (answer.status, answer.content["jobId"]) == (202, "chatwoot.message_created.1.9")
    with redis.client() as client:
        assert client.hget(KEYS.job("chatwoot.message_created.1.9"), "data") == body


@pytest_twisted.ensureDeferred
async def test_an_event_that_is_filtered_out_is_200_and_no_job(
    http: HTTPClient, redis: RedisServer, start_daemon: StartDaemon
) -> None:
    daemon = connected(
        start_daemon("--redis", redis.url, *DIRECT, "--events", "message_created,contact_created")
    )

    ignored = await post(http, daemon, Webhook.from_sample(SAMPLES["conversation_typing_on"]))
    taken = await post(http, daemon, Webhook.from_sample(SAMPLES["contact_created"]))

    assert (ignored.status, ignored.content) == (
        200,
        {"status": "ignored", "event": "conversation_typing_on"},
    )
    assert taken.status == 202
    with redis.client() as client:
        assert client.llen(KEYS.wait) == 1


BAD_BODIES = {
    "empty": b"",
    "not JSON": b"{",
    "a form": b"event=message_created",
    "not an object": b'["event"]',
    "not UTF-8": b'{"event":"\xff"}',
    "UTF-16": '{"event":"x"}'.encode("utf-16"),
    "no event": b'{"id":1}',
    "an event that is no text": b'{"event":1}',
    "not a number": b'{"event":"x","id":NaN}',
    "two documents": b'{"event":"x"}{"event":"y"}',
    "deep": b'{"event":"x","d":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
}


@pytest.mark.parametrize("body", BAD_BODIES.values(), ids=BAD_BODIES.keys())
@pytest_twisted.ensureDeferred
async def test_what_is_no_event_is_400(
    http: HTTPClient, daemon: Daemon, redis: RedisServer, body: bytes
) -> None:
    answer = await request(http, "POST", daemon.webhook_url, data=body, headers=JSON)

    assert answer.status == 400
    assert answer.error_code
    assert "Traceback" not in daemon.log
    with redis.client() as client:
        assert client.dbsize() == 0


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "application/json", "Content-Encoding": "gzip"},
    ],
)
@pytest_twisted.ensureDeferred
async def test_what_says_that_it_is_not_json_is_415(
    http: HTTPClient, daemon: Daemon, headers: dict[str, str]
) -> None:
    answer = await request(http, "POST", daemon.webhook_url, data=webhook().body, headers=headers)

    assert answer.status == 415
    assert answer.error_code


@pytest.mark.parametrize(
    "content_type", ["application/json; charset=utf-8", "APPLICATION/JSON", "application/vnd.x+json"]
)
@pytest_twisted.ensureDeferred
async def test_json_has_several_names(http: HTTPClient, daemon: Daemon, content_type: str) -> None:
    headers = {"Content-Type": content_type}

    answer = await request(http, "POST", daemon.webhook_url, data=webhook().body, headers=headers)

    assert answer.status == 202


@pytest_twisted.ensureDeferred
async def test_no_answer_is_a_redirect(http: HTTPClient, daemon: Daemon) -> None:
    """Chatwoot would follow it with a second POST."""
    for path in (
        "",
        "/",
        "/webhook",
        "/webhook/",
        "/webhook/chatwoot/",
        "//webhook/chatwoot",
        "/health/",
        "/./health",
    ):
        for method in "GET", "POST":
            answer = await request(http, method, daemon.url + path, data=webhook().body, headers=JSON)
            assert not 300 <= answer.status < 400, (method, path)
            assert answer.content


@pytest.mark.parametrize(
    "path", ["/", "/webhook", "/webhook/chatwoot/unknown", "/webhook/chatwoot/a/b", "/metrics"]
)
@pytest_twisted.ensureDeferred
async def test_an_unknown_path_or_source_is_404(http: HTTPClient, daemon: Daemon, path: str) -> None:
    answer = await request(http, "POST", daemon.url + path, data=webhook().body, headers=JSON)

    assert answer.status == 404
    assert answer.error_code


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE"])
@pytest_twisted.ensureDeferred
async def test_a_wrong_method_is_405_and_told_the_right_ones(
    http: HTTPClient, daemon: Daemon, method: str
) -> None:
    answer = await request(http, method, daemon.webhook_url)

    assert answer.status == 405
    assert answer.error_code == "method_not_allowed"
    assert "POST" in answer.headers["allow"].split(", ")


def test_head_is_405_without_a_body(daemon: Daemon) -> None:
    answer = exchange(daemon.port, request_bytes("HEAD", PATH), "HEAD")

    assert (answer.status, answer.body) == (405, b"")


@pytest_twisted.ensureDeferred
async def test_a_browser_may_post_from_any_origin(http: HTTPClient, daemon: Daemon) -> None:
    headers = {
        "Origin": "https://example.com",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type,x-chatwoot-delivery",
    }

    answer = await request(http, "OPTIONS", daemon.webhook_url, headers=headers)

    assert (answer.status, answer.body) == (204, b"")
    assert answer.headers["access-control-allow-origin"] == "*"
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert "content-length" not in answer.headers  # RFC 9110, 8.6: not with 204


@pytest_twisted.ensureDeferred
async def test_health(http: HTTPClient, daemon: Daemon, redis: RedisServer) -> None:
    everything = await request(http, "GET", f"{daemon.url}/health")
    live = await request(http, "GET", f"{daemon.url}/health/live")
    ready = await request(http, "GET", f"{daemon.url}/health/ready")

    assert [answer.status for answer in (everything, live, ready)] == [200, 200, 200]
    assert everything.content["status"] == "ok"
    assert everything.content["redis"]["status"] == "up"
    assert {"version", "uptimeSeconds", "breaker", "spool", "queues"} <= set(everything.content)

    redis.kill()
    await post(http, daemon, webhook())
    assert (await request(http, "GET", f"{daemon.url}/health/live")).status == 200
    assert (await request(http, "GET", f"{daemon.url}/health")).status == 503


# -- what no well-behaved client sends ----------------------------------------------------------------------


def test_a_body_over_the_limit_is_413_before_it_has_arrived(
    redis: RedisServer, start_daemon: StartDaemon
) -> None:
    daemon = connected(start_daemon("--redis", redis.url, *DIRECT, "--max-body", "1000"))
    head = request_bytes("POST", PATH, {**JSON, "Content-Length": "1001"})

    with connect(daemon.port) as connection:
        connection.sendall(head)
        answer = read_response(connection)

    assert answer.status == 413
    assert json.loads(answer.body)["error"]["code"] == "too_large"


def test_a_body_at_the_limit_is_taken(redis: RedisServer, start_daemon: StartDaemon) -> None:
    daemon = connected(start_daemon("--redis", redis.url, *DIRECT, "--max-body", "1000"))
    body = b'{"event":"x"}'.ljust(1000)

    assert exchange(daemon.port, request_bytes("POST", PATH, JSON, body)).status == 202


def chunked(body: bytes, size_bytes: int) -> bytes:
    pieces = [body[start : start + size_bytes] for start in range(0, len(body), size_bytes)]
    framed = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    return request_bytes("POST", PATH, {**JSON, "Transfer-Encoding": "chunked"}) + framed + b"0\r\n\r\n"


def test_a_chunked_body_arrives_byte_for_byte(daemon: Daemon, redis: RedisServer) -> None:
    event = ODD.numbered(1)

    answer = exchange(daemon.port, chunked(event.body, 7))

    assert answer.status == 202
    with redis.client() as client:
        assert client.hget(KEYS.job(json.loads(answer.body)["jobId"]), "data") == event.body


def test_a_chunked_body_over_the_limit_is_413(redis: RedisServer, start_daemon: StartDaemon) -> None:
    daemon = connected(start_daemon("--redis", redis.url, *DIRECT, "--max-body", "1000"))

    assert exchange(daemon.port, chunked(b"x" * 1001, 100)).status == 413


def test_pipelined_requests_are_answered_in_order(daemon: Daemon) -> None:
    events = webhooks(20)
    requests = [
        request_bytes("POST", PATH, {**event.headers, "Connection": "keep-alive"}, event.body)
        for event in events
    ]
    with connect(daemon.port) as connection:
        connection.sendall(b"".join(requests))
        reader = connection.makefile("rb")
        answers = [_next_answer(reader) for _ in events]

    assert [answer["jobId"] for answer in answers] == [event.job_id for event in events]


def _next_answer(reader: Any) -> Any:
    head: list[bytes] = []
    while (line := reader.readline().strip()) or not head:
        head.append(line.lower())
    (length,) = (int(line.split(b":")[1]) for line in head if line.startswith(b"content-length:"))
    return json.loads(reader.read(length))


def test_one_byte_at_a_time_is_a_request_like_any(daemon: Daemon) -> None:
    event = webhook()
    with connect(daemon.port) as connection:
        for start in range(len(event.request)):
            connection.sendall(event.request[start : start + 1])
        assert read_response(connection).status == 202


def test_a_client_that_asks_first_is_told_to_go_on(daemon: Daemon) -> None:
    """Chatwoot never does; curl does, with large bodies."""
    event = webhook()
    with connect(daemon.port) as connection:
        headers = {**event.headers, "Expect": "100-continue", "Content-Length": str(len(event.body))}
        connection.sendall(request_bytes("POST", PATH, headers))
        assert connection.recv(65_536).startswith(b"HTTP/1.1 100 ")
        connection.sendall(event.body)
        assert read_response(connection).status == 202

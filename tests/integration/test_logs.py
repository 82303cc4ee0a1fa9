"""The log of a running daemon: each refusal with its reason and the id of its answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tests.integration.conftest import StartDaemon
from tests.support.daemon import Daemon
from tests.support.http import exchange, request_bytes
from tests.support.webhooks import PATH, webhook

TOKEN = "let-me-in"
ALLOWED = {"Content-Type": "application/json", "X-Webhook-Token": TOKEN}
NOWHERE = ("--redis", "redis://127.0.0.1:1/0", "--spool", "off")


def lines(daemon: Daemon) -> list[dict[str, Any]]:
    """Return all lines. Each must be JSON."""
    return [json.loads(line) for line in daemon.log.splitlines()]


def post(headers: Mapping[str, str] = ALLOWED, body: bytes = webhook().body, path: str = PATH) -> bytes:
    return request_bytes("POST", path, headers, body)


#: Requests by the status, code and source in their log line.
REFUSED: Mapping[tuple[int, str, str | None], bytes] = {
    (400, "bad_request", None): b"hello\r\n\r\n",
    (400, "bad_host", None): b"GET / HTTP/1.1\r\n\r\n",
    (400, "bad_path", None): request_bytes("GET", "/%ff"),
    (400, "not_json", "chatwoot"): post(body=b"{"),
    (401, "missing_signature", "chatwoot"): post({}),
    (401, "bad_token", "chatwoot"): post({"X-Webhook-Token": "x"}, path=f"{PATH}?token=x"),
    (404, "unknown_source", None): post(path=f"{PATH}/nobody"),
    (404, "not_found", None): request_bytes("GET", "/nowhere"),
    (405, "method_not_allowed", None): request_bytes("GET", PATH),
    (413, "too_large", None): request_bytes("POST", PATH, {"Content-Length": "200000"}),
    (415, "unsupported_media_type", "chatwoot"): post({**ALLOWED, "Content-Type": "text/plain"}),
    (429, "too_many", None): post(body=b" " * 90_000),  # more than one read brings
    (431, "head_too_large", None): request_bytes("GET", "/", {"X": "x" * 17_000}),
    (500, "unavailable", "chatwoot"): post(),
}


def test_each_refusal_has_a_line_with_the_id_of_its_answer(start_daemon: StartDaemon) -> None:
    limits = ("--max-body", "100000", "--max-in-flight-bytes", "40000")
    daemon = start_daemon(*NOWHERE, *limits, "--token", TOKEN, "--log-format", "json")
    answers = {kind: exchange(daemon.port, request) for kind, request in REFUSED.items()}
    named = exchange(daemon.port, post({"X-Request-Id": "chatwoot-7"}))
    daemon.stop()

    logged = {line["request_id"]: line for line in lines(daemon) if "request_id" in line}
    assert len(logged) == len(REFUSED) + 1
    for kind, answer in answers.items():
        line = logged[answer.headers["x-request-id"]]
        assert (line["status"], line["code"], line.get("source")) == kind
        assert answer.status == line["status"]
        assert line["client"] == "127.0.0.1"
        assert line["level"] == ("warn" if answer.status in (429, 500) else "info")
    assert named.headers["x-request-id"] == "chatwoot-7"
    assert logged["chatwoot-7"]["code"] == "missing_signature"


def test_a_flood_of_refusals_is_counted(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(*NOWHERE, "--token", TOKEN, "--log-format", "json")
    for _ in range(50):
        exchange(daemon.port, post({}))
    daemon.stop()

    refusals = [line for line in lines(daemon) if line.get("code") == "missing_signature"]
    assert sum(line.get("repeated", 1) for line in refusals) == 50
    assert len(refusals) < 50


def test_each_event_has_a_line_at_level_debug(start_daemon: StartDaemon) -> None:
    wanted = ("--events", "conversation_created", "--token", TOKEN)
    daemon = start_daemon(*NOWHERE, *wanted, "--log-format", "json", "--log-level", "debug")
    answer = exchange(daemon.port, post())
    daemon.stop()

    [line] = [line for line in lines(daemon) if "job_id" in line]
    assert (line["outcome"], line["event"], line["source"]) == ("ignored", "message_created", "chatwoot")
    assert line["job_id"] == webhook().job_id
    assert line["request_id"] == answer.headers["x-request-id"]
    assert line["duration_ms"] > 0

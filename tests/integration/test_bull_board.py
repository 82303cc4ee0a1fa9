"""Bull Board as in the compose profile ``tools`` (docker/bull-board), with a queue of the daemon."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import StartDaemon
from tests.support.http import exchange, get, request_bytes
from tests.support.process import ChildProcess, node, wait_until
from tests.support.servers import RedisServer
from tests.support.webhooks import DIRECT, ODD, Webhook, connected, post, webhooks
from tests.support.workers import Worker
from webhookd.config import OPTIONS

DIRECTORY = Path(__file__).parents[2] / "docker" / "bull-board"
DEFAULT_OPTIONS: Any = next(option.default for option in OPTIONS if option.name == "job_options")
PAUSE = request_bytes("PUT", "/api/queues/chatwoot/pause", body=b"")


class BullBoard(ChildProcess):
    """docker/bull-board/server.js, on `port` on loopback."""

    name = "bull-board"

    def __init__(self, redis: RedisServer, **environ: str) -> None:
        super().__init__()
        self.port = self.reserve_port()
        self._environ = {"REDIS_URL": redis.url, "PORT": str(self.port), **environ}

    def argv(self) -> Sequence[str]:
        return [node(), str(DIRECTORY / "server.js")]

    def environ(self) -> Mapping[str, str]:
        return {**super().environ(), **self._environ}

    def is_ready(self) -> bool:
        return self.log.startswith("Bull Board on ")

    def queue(self, state: str) -> Any:
        """Return what its pages receive about the queue, with the jobs in one state."""
        response = get(self.port, f"/api/queues?activeQueue=chatwoot&status={state}&page=1&jobsPerPage=100")
        assert response.status == 200, response
        (queue,) = json.loads(response.body)["queues"]
        return queue


@pytest.fixture
def filled(redis: RedisServer, start_daemon: StartDaemon) -> list[Webhook]:
    """The events that the daemon has queued."""
    daemon = connected(start_daemon("--redis", redis.url, *DIRECT))
    # Without the event whose numbers are too large for JavaScript.
    events = [event for event in webhooks(30) if event.event != ODD.event]
    for event in events:
        assert post(daemon.port, event).status == 202
    return events


def test_jobs_look_right_in_it(redis: RedisServer, filled: list[Webhook]) -> None:
    now_ms = time.time() * 1000
    with BullBoard(redis) as board:
        waiting = board.queue("waiting")
        shown = {job["id"]: job for job in waiting["jobs"]}
        assert shown.keys() == {event.job_id for event in filled}
        for event in filled:
            job = shown[event.job_id]
            assert (job["name"], job["data"]) == (event.event, json.loads(event.body))
            assert job["opts"] == {**DEFAULT_OPTIONS, "jobId": event.job_id}
            assert 0 <= now_ms - job["timestamp"] < 60_000
            assert (job["attempts"], job["delay"], job["isFailed"]) == (0, 0, False)
        assert waiting["counts"]["waiting"] == len(filled)

        with Worker("bullmq6", redis.port):
            wait_until(lambda: board.queue("completed")["counts"]["completed"] == len(filled), "all are done")
        done = board.queue("completed")
        assert {job["id"] for job in done["jobs"]} == shown.keys()
        assert all(job["timestamp"] <= job["finishedOn"] for job in done["jobs"])
        assert done["counts"]["waiting"] == 0


def test_it_only_reads(redis: RedisServer, filled: list[Webhook]) -> None:
    with redis.client() as client, BullBoard(redis) as board:
        assert board.queue("waiting")["readOnlyMode"] is True
        assert exchange(board.port, PAUSE, "PUT").status == 405
        # It wrote no pause, and no version, from which webhookd would conclude that workers use BullMQ 6.
        assert client.hkeys("bull:chatwoot:meta") == [b"opts.maxLenEvents"]


def test_it_can_change_things_if_configured(redis: RedisServer, filled: list[Webhook]) -> None:
    with BullBoard(redis, MAY_CHANGE="yes") as board:
        assert exchange(board.port, PAUSE, "PUT").status == 200
        assert board.queue("waiting")["isPaused"] is True


def test_it_requires_a_login_and_sends_a_content_policy(redis: RedisServer) -> None:
    def get_as(login: str) -> Any:
        encoded = base64.b64encode(login.encode()).decode()
        return exchange(board.port, request_bytes("GET", "/", {"Authorization": f"Basic {encoded}"}))

    with BullBoard(redis, LOGIN="operator:s:ecret") as board:
        assert [get(board.port, path).status for path in ("/", "/api/queues", "/static/images/logo.svg")] == [
            401
        ] * 3
        assert get_as("operator:s:ecre").status == 401
        page = get_as("operator:s:ecret")
        assert page.status == 200
        assert page.headers["content-security-policy"].startswith("default-src 'self';")
        assert board.stop() == 0


# -- its image ----------------------------------------------------------------------------------------------


def test_the_dockerfile_is_clean() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    result = subprocess.run([hadolint, DIRECTORY / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "")


def test_the_image_has_what_the_server_needs_and_all_is_pinned() -> None:
    dependencies = json.loads((DIRECTORY / "package.json").read_text())["dependencies"]
    required = re.findall(r"require\('((?:@[^/']+/)?[^/:']+)['/]", (DIRECTORY / "server.js").read_text())
    assert set(required) == dependencies.keys()
    assert all(re.fullmatch(r"[\d.]+", version) for version in dependencies.values())
    packages = json.loads((DIRECTORY / "package-lock.json").read_text())["packages"]
    assert all(package["integrity"] for name, package in packages.items() if name)

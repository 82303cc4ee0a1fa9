"""Start, stop, crash and restart of the daemon, with the shipped commands."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest
from redis import Redis

from tests.integration.conftest import StartDaemon
from tests.support.daemon import Daemon, installed_twistd
from tests.support.http import connect, read_response, request_bytes
from tests.support.process import wait_until
from tests.support.servers import RedisServer
from tests.support.webhooks import DIRECT, PATH, Webhook, connected, outcome, post, webhook, webhooks
from webhookd.bullmq.keys import QueueKeys

REPOSITORY = Path(__file__).parents[2]
KEYS = QueueKeys("bull", "chatwoot")
RUN_DEADLINE_S = 60.0


def keep_alive_request(event: Webhook) -> bytes:
    return request_bytes("POST", PATH, {**event.headers, "Connection": "keep-alive"}, event.body)


def terminate(daemon: Daemon) -> None:
    """Send SIGTERM to the daemon, without waiting for its end."""
    os.kill(daemon.pid, signal.SIGTERM)


def missing_jobs(redis_port: int, acknowledged: list[Webhook]) -> list[str]:
    """Return the ids of acknowledged events that are not in a Redis as they were sent."""
    with Redis(port=redis_port) as client:
        return [
            event.job_id
            for event in acknowledged
            if client.hget(KEYS.job(event.job_id), "data") != event.body
        ]


# -- stop ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spool", [DIRECT, ()], ids=["without a spool", "with a spool"])
def test_sigterm_answers_each_connection_that_was_made(
    redis: RedisServer, start_daemon: StartDaemon, spool: tuple[str, ...]
) -> None:
    daemon = connected(start_daemon("--redis", redis.url, *spool))
    events = webhooks(90)
    with ExitStack() as stack:
        connections = [stack.enter_context(connect(daemon.port)) for _ in events]
        requests = list(zip(connections, events, strict=True))
        sent, half_sent, fresh = requests[:30], requests[30:60], requests[60:]
        for connection, event in half_sent:
            connection.sendall(event.request[: len(event.request) // 2])
        for connection, event in sent:
            connection.sendall(event.request)

        terminate(daemon)

        for connection, event in half_sent:
            connection.sendall(event.request[len(event.request) // 2 :])
        for connection, event in fresh:
            connection.sendall(event.request)
        answers = [read_response(connection) for connection in connections]

    assert [answer.status for answer in answers] == [202] * len(events)
    assert daemon.wait() == 0
    assert missing_jobs(redis.port, events) == []


def test_the_answer_on_a_busy_connection_announces_the_end(
    redis: RedisServer, start_daemon: StartDaemon
) -> None:
    daemon = connected(start_daemon("--redis", redis.url, *DIRECT))
    with connect(daemon.port) as connection, connect(daemon.port) as probe:
        probe.sendall(request_bytes("GET", "/health/live", {"Connection": "keep-alive"}))
        assert read_response(probe).status == 200
        redis.suspend()
        connection.sendall(keep_alive_request(webhook()))
        assert daemon.get("/health/live").status == 200  # so the webhook before it was read
        terminate(daemon)
        assert probe.recv(1) == b""  # so the shutdown has begun
        redis.resume()

        answer = read_response(connection)

        assert outcome(answer) == (202, "queued")
        assert answer.headers["connection"] == "close"
        assert connection.recv(1) == b""
    assert daemon.wait() == 0
    assert missing_jobs(redis.port, [webhook()]) == []


@pytest.mark.parametrize("redis_url", ["embedded:", "redis://127.0.0.1:1/0"])
def test_sigterm_right_after_the_start_is_exit_code_0(start_daemon: StartDaemon, redis_url: str) -> None:
    daemon = start_daemon("--redis", redis_url)

    assert daemon.stop() == 0
    assert "Traceback" not in daemon.log


def test_a_control_socket_that_is_gone_does_not_disturb_the_shutdown(
    redis: RedisServer, start_daemon: StartDaemon
) -> None:
    """The same happens on a disk that became read-only. The spool must be closed in any case."""
    daemon = connected(start_daemon("--redis", redis.url))
    wait_until(lambda: any(daemon.directory.rglob("control")), "the spool is open")
    for control in daemon.directory.rglob("control"):
        control.unlink()

    assert daemon.stop() == 0
    assert "cannot be removed" in daemon.log
    assert "Traceback" not in daemon.log


# -- crash and restart --------------------------------------------------------------------------------------


def test_a_stale_pid_file_does_not_keep_a_killed_daemon_from_coming_back(
    redis: RedisServer, start_daemon: StartDaemon
) -> None:
    daemon = connected(start_daemon("--redis", redis.url, *DIRECT))
    assert outcome(post(daemon.port, webhook(1))) == (202, "queued")
    daemon.kill()
    (daemon.directory / "twistd.pid").write_text(f"{os.getpid()}\n")  # another process has the pid now

    connected(daemon.start())

    assert outcome(post(daemon.port, webhook(1))) == (200, "already_queued")
    assert outcome(post(daemon.port, webhook(2))) == (202, "queued")
    assert daemon.stop() == 0


def shipped_commands() -> list[str]:
    """Return each command that starts the daemon, from all files that an operator may copy it from."""
    places = ["Makefile", "README.md", "conf", "docker", "docs"]
    paths = [REPOSITORY / place for place in places]
    files = [path for path in paths if path.is_file()]
    files += [path for folder in paths if folder.is_dir() for path in folder.rglob("*") if path.is_file()]
    commands = []
    for path in files:
        text = path.read_text(errors="replace").replace("\\\n", " ")
        commands += [
            f"{path.name}: {match}" for match in re.findall(r"twistd[ \"',\]]+-.*\bwebhookd\b", text)
        ]
    return commands


def test_no_shipped_command_writes_a_pid_file() -> None:
    commands = shipped_commands()

    assert any(command.startswith("Makefile: ") for command in commands)
    assert [command for command in commands if "--pidfile=" not in command] == []


# -- a start that fails -------------------------------------------------------------------------------------


def run_daemon(directory: Path, *options: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run the installed daemon to its end. Both outputs are in ``stdout``."""
    return subprocess.run(
        [str(installed_twistd()), "-n", "--pidfile=", "webhookd", *options],
        cwd=directory,
        env={"LANG": "C.UTF-8", "PATH": os.defpath, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=RUN_DEADLINE_S,
        check=False,
    )


@pytest.mark.parametrize("redis_url", ["embedded:", "redis://127.0.0.1:1/0"])
@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_port_in_use_is_one_line_and_exit_code_1(tmp_path: Path, redis_url: str, log_format: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as occupant:
        port = str(occupant.getsockname()[1])
        endpoint = "--interface", "127.0.0.1", "--port", port, "--ops-endpoint", "off"
        result = run_daemon(tmp_path, *endpoint, "--redis", redis_url, "--log-format", log_format)

    assert result.returncode == 1
    *_, last_line = result.stdout.splitlines()
    assert "cannot listen for webhooks" in last_line
    assert f"127.0.0.1:{port}" in last_line
    assert "Address already in use" in last_line
    assert "Traceback" not in result.stdout


def test_an_ops_port_in_use_is_a_warning(redis: RedisServer, start_daemon: StartDaemon) -> None:
    with socket.create_server(("127.0.0.1", 0)) as occupant:
        ops_port = occupant.getsockname()[1]
        daemon = connected(
            start_daemon(
                "--redis", redis.url, *DIRECT, "--ops-endpoint", f"tcp:{ops_port}:interface=127.0.0.1"
            )
        )

        assert outcome(post(daemon.port, webhook())) == (202, "queued")
        assert "cannot listen for ops" in daemon.log


@pytest.mark.parametrize(
    ("options", "environ", "file", "culprit"),
    [
        (["--no-such-option"], {}, "", "no-such-option"),
        (["surplus"], {}, "", "argument"),
        (["--port", "65536"], {}, "", "port"),
        (["--endpoint", "udp:3001"], {}, "", "endpoint"),
        (["--redis", "rediss://localhost?ca_file=/no/such/file"], {}, "", "ca_file"),
        ([], {"WEBHOOK_SECRET_FILE": "/no/such/file"}, "", "WEBHOOK_SECRET_FILE"),
        ([], {}, "port = = 3001\n", "line 1"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it(
    tmp_path: Path, options: list[str], environ: Mapping[str, str], file: str, culprit: str
) -> None:
    """`tests/unit/test_config.py` has all mistakes."""
    path = tmp_path / "webhookd.toml"
    path.write_text(file)

    result = run_daemon(tmp_path, "--config", str(path), *options, **environ)

    assert result.returncode != 0
    assert len(result.stdout.splitlines()) == 1, result.stdout
    assert result.stdout.startswith("webhookd: ")
    assert culprit in result.stdout


# -- without Redis ------------------------------------------------------------------------------------------


def test_without_redis_a_request_is_refused_until_redis_comes(start_daemon: StartDaemon) -> None:
    redis = RedisServer()
    try:
        daemon = start_daemon("--redis", redis.url, *DIRECT)
        for number in range(5):
            refused = post(daemon.port, webhook(number))
            assert outcome(refused) == (500, "unavailable")
            assert int(refused.headers["retry-after"]) > 0
        assert daemon.get("/health/live").status == 200
        assert daemon.get("/health/ready").status == 503

        redis.start()
        wait_until(lambda: daemon.get("/health/ready").status == 200, "the daemon has found Redis")

        assert outcome(post(daemon.port, webhook(1))) == (202, "queued")
        assert missing_jobs(redis.port, [webhook(1)]) == []
    finally:
        redis.close()


def spooled_records(daemon: Daemon) -> int:
    return int(json.loads(daemon.get("/health").body)["spool"]["records"])


def test_with_a_spool_a_request_is_taken_and_queued_when_redis_comes(start_daemon: StartDaemon) -> None:
    redis = RedisServer()
    try:
        daemon = start_daemon("--redis", redis.url)
        assert outcome(post(daemon.port, webhook(1))) == (202, "spooled")
        assert outcome(post(daemon.port, webhook(1))) == (200, "already_queued")
        assert daemon.get("/health/ready").status == 200

        redis.start()

        wait_until(lambda: missing_jobs(redis.port, [webhook(1)]) == [], "the spool is drained into Redis")
        # Before that, a repetition is a duplicate on disk.
        wait_until(lambda: spooled_records(daemon) == 0, "the record is removed")
        assert outcome(post(daemon.port, webhook(1))) == (200, "already_queued")
    finally:
        redis.close()

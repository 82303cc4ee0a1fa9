"""The command against a running daemon, and against servers that are not webhookd."""

from __future__ import annotations

import json
import re
import shlex
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from threading import Thread

import pytest
import pytest_twisted
from attrs import frozen
from twisted.internet.threads import deferToThread

from tests.support.bullmq import Queue
from tests.support.command import command, environ_of, run_command, run_on_terminal
from tests.support.daemon import Daemon, installed_twistd
from tests.support.process import ReservedPort
from tests.support.servers import RedisServer
from tests.support.webhooks import DIRECT, connected
from webhookd.bullmq.keys import QueueKeys
from webhookd.cli.sender import Post, Sender
from webhookd.reactor import the_reactor
from webhookd.samples import SAMPLES

KEYS = QueueKeys("bull", "chatwoot")
SECRET = "hush-hush"
ESCAPE = "\x1b["


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    """One server for all these tests: none of them damages it."""
    with RedisServer("redis-7.0") as server:
        yield server


@pytest.fixture(scope="module")
def daemon(redis: RedisServer) -> Iterator[Daemon]:
    """A daemon that requires a signature or a token."""
    environ = {"WEBHOOK_SECRET": f"old,{SECRET}", "WEBHOOK_TOKEN": "open-sesame"}
    with Daemon("--redis", redis.url, *DIRECT, environ=environ) as daemon:
        yield connected(daemon)


@pytest.fixture
def new_jobs(redis: RedisServer) -> Callable[[], set[str]]:
    """Return the ids of the jobs since the start of the test."""
    queue = Queue(redis.client(), KEYS)
    before = set(queue.held_ids())
    return lambda: set(queue.held_ids()) - before


# -- send ---------------------------------------------------------------------------------------------------


def test_a_sample_becomes_a_job_each_time(daemon: Daemon, new_jobs: Callable[[], set[str]]) -> None:
    for environ in ({"WEBHOOK_SECRET": SECRET}, {"WEBHOOK_TOKEN": "open-sesame"}):
        result = run_command("send", PORT=str(daemon.port), **environ)
        assert result.returncode == 0, result.stderr
        assert re.fullmatch(r"202 queued chatwoot\.message_created\.7\.\d{16} \(\d+ ms\)\n", result.stdout)

    result = run_command("send", "--json", "contact_updated", PORT=str(daemon.port), WEBHOOK_SECRET=SECRET)

    found = json.loads(result.stdout)
    assert found["answers"] == [{"status": 202, "outcome": "queued", "count": 1}]
    assert len(new_jobs()) == 3
    assert found["jobId"] in new_jobs()


def test_a_file_goes_as_it_is(daemon: Daemon, new_jobs: Callable[[], set[str]], tmp_path: Path) -> None:
    sample = SAMPLES["message_created"]
    path = tmp_path / "body.json"
    path.write_bytes(sample.body)
    arguments = ("send", str(path), "--url", daemon.webhook_url, "--secret", SECRET)

    assert sample.job_id in run_command(*arguments).stdout
    assert "already_queued" in run_command(*arguments).stdout
    assert new_jobs() == {sample.job_id}


def test_many_with_duplicates_at_a_rate(daemon: Daemon, new_jobs: Callable[[], set[str]]) -> None:
    arguments = ("--repeat", "40", "--duplicates", "10", "--rate", "400", "--secret", SECRET)
    result = run_command("send", *arguments, "--url", daemon.url)

    lines = result.stdout.splitlines()
    assert result.returncode == 0, result.stderr
    assert ["36", "202", "queued"] in [line.split() for line in lines]
    assert ["4", "200", "already_queued"] in [line.split() for line in lines]
    assert re.search(r"^p50 [\d.]+ ms  p90 .* max [\d.]+ ms$", result.stdout, re.MULTILINE)
    assert sum(int(line.split()[-1]) for line in lines if " to " in line) == 40
    assert len(new_jobs()) == 36


def test_a_progress_bar_where_it_takes_over_a_second(daemon: Daemon) -> None:
    arguments = ("--url", daemon.url, "--secret", SECRET)
    shown = run_on_terminal("send", *arguments, "--repeat", "40", "--rate", "30")

    assert "Sending  [####" in shown
    assert "100%" in shown
    assert max(len(line) for line in re.split(r"[\r\n]+", re.sub(r"\x1b\[\??\d*\w", "", shown))) <= 80
    assert "Sending" not in run_on_terminal("send", *arguments)


# -- sign, verify -------------------------------------------------------------------------------------------


def test_what_sign_signs_is_accepted(daemon: Daemon, tmp_path: Path) -> None:
    """The curl command has everything that a request needs."""
    path = tmp_path / "a body.json"
    path.write_bytes(SAMPLES["message_created"].body)
    arguments = ("sign", str(path), "--url", daemon.url, "--secret", SECRET, "--curl")

    words = shlex.split(run_command(*arguments).stdout)

    assert words[:2] == ["curl", "-i"]
    headers = dict(word.split(": ", 1) for word in words if ": " in word)
    (tmp_path / "headers").write_text("".join(f"{name}: {value}\n" for name, value in headers.items()))
    verified = run_command(
        *("verify", str(path), "--headers", str(tmp_path / "headers")), WEBHOOK_SECRET=f"old,{SECRET}"
    )
    assert (verified.returncode, verified.stderr) == (0, "")
    assert "secret 2 of 2" in verified.stdout


# -- health -------------------------------------------------------------------------------------------------


def test_the_whole_report(daemon: Daemon) -> None:
    result = run_command("health", "--full", "--url", daemon.url)
    found = json.loads(run_command("health", "--full", "--json", "--url", daemon.url).stdout)

    assert result.returncode == 0
    assert re.search(r"^redis\n  status +up$", result.stdout, re.MULTILINE)
    assert found["redis"]["status"] == "up"
    assert SECRET not in result.stdout


def test_it_starts_without_twisted() -> None:
    """Containers run it every few seconds."""
    code = (
        "import sys; from webhookd.cli.main import main; import webhookd.cli.health;"
        "print([name for name in sys.modules if name.startswith(('twisted', 'cryptography'))])"
    )
    python = installed_twistd().with_name("python")

    assert subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# -- what goes wrong ----------------------------------------------------------------------------------------


class Listener:
    """A server that sends the same bytes to each client and hangs up, or one that never accepts."""

    def __init__(self, says: bytes | None) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        if says is not None:
            Thread(target=self._talk, args=(says,), daemon=True).start()

    def _talk(self, says: bytes) -> None:
        while True:
            try:
                connection, _address = self._socket.accept()
            except OSError:
                return
            with connection:
                connection.recv(65_536)
                connection.sendall(says)

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)  # wakes up the thread
        self._socket.close()


@frozen
class Wrong:
    """The bytes of a server that is not webhookd, and what ``send`` and ``health`` say about it."""

    says: bytes | None
    send: str
    health: str
    scheme: str = "http:"


WRONG = {
    "silent": Wrong(None, "no answer within 0.2 s", ""),
    "mail": Wrong(b"220 mail.example ESMTP\r\n", "no HTTP answer", "it does not speak HTTP"),
    "hangs up": Wrong(
        b"", "the connection ended before the answer", "the connection ended before the answer"
    ),
    "half": Wrong(
        b"HTTP/1.1 200 OK\r\nContent-Length: 400\r\n\r\n{",
        "the connection ended before the answer",
        "200, but not as webhookd answers",
    ),
    "no TLS": Wrong(b"220 mail.example ESMTP\r\n", "no TLS, or an untrusted certificate", "SSL", "https:"),
    "html": Wrong(
        b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n<p/>",
        "OK, and not from webhookd",
        "200, but not as webhookd answers",
    ),
    "escapes": Wrong(
        b'HTTP/1.1 500 X\r\nContent-Length: 37\r\n\r\n{"status":"a\\u001b[31m\\nb","jobId":7}',
        "a\\x1b[31m\\nb",
        "500 a\\x1b[31m\\nb",
    ),
    "moved": Wrong(
        b"HTTP/1.1 301 Moved\r\nLocation: /x\r\nContent-Length: 0\r\n\r\n",
        "Moved Permanently, and not from webhookd",
        "301, but not as webhookd answers",
    ),
}


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("name", WRONG)
async def test_a_server_that_is_not_webhookd(name: str) -> None:
    wrong = WRONG[name]
    with closing(Listener(wrong.says)) as listener:
        url = listener.url.replace("http:", wrong.scheme)
        sender = Sender(
            the_reactor(),
            f"{url}/x",
            lambda _number: Post(b"{}", {}),
            deadline_s=0.2 if name == "silent" else 5,
        )
        (reply,) = await sender.send([0], rate=None)
        assert reply.outcome == wrong.send
        if wrong.health:  # silence would take 3 s: see test_image.py
            result = await deferToThread(run_command, "health", "--url", url)
            assert_one_line(result, 1 if wrong.health[0].isdigit() else 3, wrong.health)


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize(("rate", "at_least", "at_most"), [(None, 2, 10), (10_000, 11, 256)])
async def test_a_bounded_number_is_under_way(rate: float | None, at_least: int, at_most: int) -> None:
    under_way = []

    def make(number: int) -> Post:
        under_way.append(number + 1 - len(sender.replies))
        return Post(b"{}", {})

    with closing(Listener(None)) as listener:
        sender = Sender(the_reactor(), listener.url, make, deadline_s=0.2)
        replies = await sender.send(range(at_most + 10), rate)

    assert at_least <= max(under_way) <= at_most
    assert len(replies) == at_most + 10
    assert {reply.status for reply in replies} == {None}


def assert_one_line(result: subprocess.CompletedProcess[str], code: int, words: str) -> None:
    assert result.returncode == code, result
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert words in line
    assert line.startswith("Error: ")
    assert ESCAPE not in line
    assert SECRET not in line


def test_no_reply() -> None:
    with closing(ReservedPort()) as port:
        refused = f"http://127.0.0.1:{port.number}"
        for part, url, code, words in (
            ("send", refused, 3, "connection refused"),
            ("health", refused, 3, "Connection refused"),
            ("send", "http://no.such.host.invalid", 3, "no such host"),
            ("health", "http://no.such.host.invalid", 3, "no.such.host.invalid/health/live: "),
            ("send", "ftp://127.0.0.1", 2, "--url"),
            ("health", "127.0.0.1:3001", 2, "--url"),
            ("health", "http://h:port", 2, "--url"),
            ("health", "http://h:0/\n", 2, "--url"),
        ):
            assert_one_line(run_command(part, "--url", url), code, words)


def test_what_the_daemon_refuses(daemon: Daemon) -> None:
    for arguments, words in (
        (("--url", daemon.url, "--secret", "wrong"), "401 wrong_signature"),
        (("--url", f"{daemon.webhook_url}/none"), "404 unknown_source"),
        (("--url", daemon.url, "/dev/null", "--secret", SECRET), "400 not_json"),
    ):
        assert_one_line(run_command("send", *arguments), 1, words)

    many = run_command("send", "--url", daemon.url, "--repeat", "5", "--json")
    assert many.returncode == 1
    assert "5 of 5 were not accepted: 401 missing_signature" in many.stderr
    assert json.loads(many.stdout)["answers"][0]["count"] == 5


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "broken.toml").write_text(f'secret = "{SECRET}')
    for arguments, environ, code, words in (
        (["send", "no-such-sample"], {}, 3, "neither a sample"),
        (["send", str(tmp_path)], {}, 3, "cannot read the file: Is a directory"),
        (["send", "/dev/zero"], {}, 3, "more than"),
        (["send", "--source", "x"], {}, 2, "there is no source 'x'"),
        (["sign", "/nowhere"], {"WEBHOOK_SECRET": SECRET}, 3, "cannot read the file"),
        (["config"], {"WEBHOOK_SECRET_FILE": str(tmp_path)}, 2, "WEBHOOK_SECRET_FILE: cannot read the file"),
        (["health"], {"WEBHOOK_CONFIG": str(tmp_path / "broken.toml")}, 2, "broken.toml: "),
        (["health"], {"WEBHOOK_ENDPOINT": "unix:/run/x"}, 2, "--url"),
    ):
        assert_one_line(run_command(*arguments, **environ), code, words)


# -- terminals ----------------------------------------------------------------------------------------------


def test_colours_on_a_terminal_alone(daemon: Daemon) -> None:
    arguments = ("health", "--full", "--url", daemon.url)

    assert ESCAPE in run_on_terminal(*arguments)
    assert ESCAPE not in run_on_terminal(*arguments, NO_COLOR="1")
    assert ESCAPE not in run_command(*arguments).stdout


def test_a_reader_that_has_seen_enough() -> None:
    """``| head`` leads to no error message."""
    with subprocess.Popen(
        [command(), "send", "--list"],
        env=environ_of({}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pipesize=4096,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""


def test_a_shell_completes_it() -> None:
    script = f'PATH={command().parent}:$PATH; eval "$(webhookd completion bash)"; complete -p webhookd'
    bash = subprocess.run(
        ["/bin/bash", "-c", script], env=environ_of({}), capture_output=True, text=True, check=True
    )
    words = run_command(_WEBHOOKD_COMPLETE="bash_complete", COMP_WORDS="webhookd s", COMP_CWORD="1").stdout

    assert "_webhookd_completion" in bash.stdout
    assert {"plain,send", "plain,sign"} <= set(words.split())

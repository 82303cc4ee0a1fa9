"""A real embedded server: it starts, keeps its data, is started again, and ends with its daemon."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import pytest
import pytest_twisted
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.logger import capturedLogs, formatEvent

from tests.support.daemon import Daemon
from tests.support.http import connect, read_response
from tests.support.process import ReservedPort, wait_until
from tests.support.servers import FLAVOURS, server_binary
from tests.support.webhooks import DIRECT, connected, outcome, post, webhook
from webhookd.reactor import IReactor
from webhookd.redis.embedded import _BECOME_SERVER, EmbeddedValkey

DEADLINE_S = 30.0
VALKEY = server_binary("valkey-9")


@pytest.fixture
def directory() -> Iterator[Path]:
    with TemporaryDirectory(prefix="webhookd test ") as path:
        yield Path(path) / "var" / "embedded"


def turn(delay_s: float = 0.01) -> Deferred[None]:
    """Return to the reactor for a moment."""
    return deferLater(reactor, delay_s, lambda: None)


async def eventually(condition: Callable[[], bool], what: str) -> None:
    for _ in range(int(DEADLINE_S / 0.01)):
        if condition():
            return
        await turn()
    raise TimeoutError(what)


def build(directory: Path, executable: str = VALKEY, port: int | None = None) -> EmbeddedValkey:
    return EmbeddedValkey(cast(IReactor, reactor), executable, directory, port)


def client(port: int) -> redis.Redis:
    return redis.Redis(port=port, socket_timeout=5.0, retry=Retry(NoBackoff(), 0))


def answers(port: int) -> bool:
    """Return True if a server on the port executes commands: it runs and has loaded its data."""
    try:
        with client(port) as connection:
            return bool(connection.ping())
    except (redis.ConnectionError, redis.TimeoutError):
        return False


def ask(port: int, *command: str) -> Any:
    with client(port) as connection:
        return connection.execute_command(*command)


def server_pid(port: int) -> int:
    with client(port) as connection:
        return int(connection.info("server")["process_id"])


def is_there(pid: int) -> bool:
    """Return True if a process exists, even as a zombie."""
    return Path(f"/proc/{pid}").exists()


def is_alive(pid: int) -> bool:
    """Return True if a process runs and is no zombie."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"


def files_in(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


@asynccontextmanager
async def running(
    directory: Path, executable: str = VALKEY, port: int | None = None
) -> AsyncIterator[EmbeddedValkey]:
    service = build(directory, executable, port)
    service.startService()
    try:
        await eventually(lambda: answers(service.port), "the server answers")
        yield service
    finally:
        await service.stopService()


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest_twisted.ensureDeferred
async def test_data_and_port_survive_a_stop_and_a_start(directory: Path, flavour: str) -> None:
    executable = server_binary(flavour)
    async with running(directory, executable) as first:
        ask(first.port, "SET", "key", "value")
    async with running(directory, executable) as second:
        assert second.port == first.port
        assert ask(second.port, "GET", "key") == b"value"


@pytest_twisted.ensureDeferred
async def test_everything_it_writes_is_in_the_directory_and_private(directory: Path) -> None:
    async with running(directory) as service:
        ask(service.port, "SET", "key", "value")
    assert mode(directory) == 0o700
    files = files_in(directory.parent)
    assert all(path.is_relative_to(directory) for path in files)
    data = [path for path in files if path.name != "port"]
    assert any(path.suffix == ".aof" for path in data)
    assert {mode(path) & 0o077 for path in data} == {0}


@pytest_twisted.ensureDeferred
async def test_a_stop_leaves_no_process_and_a_free_port(directory: Path) -> None:
    async with running(directory) as service:
        pid = server_pid(service.port)
    assert not is_there(pid)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", service.port))


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest_twisted.ensureDeferred
async def test_a_killed_server_comes_back_with_its_data(directory: Path, flavour: str) -> None:
    async with running(directory, server_binary(flavour)) as service:
        ask(service.port, "SET", "key", "value")
        killed = server_pid(service.port)
        with capturedLogs() as events:
            os.kill(killed, signal.SIGKILL)
            await eventually(lambda: not is_alive(killed) and answers(service.port), "it comes back")
        assert server_pid(service.port) != killed
        assert ask(service.port, "GET", "key") == b"value"
    assert any("signal 9" in (formatEvent(event) or "") for event in events)


@pytest_twisted.ensureDeferred
async def test_a_write_that_a_crash_cut_short_does_not_keep_the_rest(directory: Path) -> None:
    async with running(directory) as service:
        ask(service.port, "SET", "key", "value")
    (log,) = [path for path in files_in(directory) if path.name.endswith(".incr.aof")]
    append(log, b"*3\r\n$3\r\nSET\r\n$3\r\nke")
    async with running(directory) as service:
        assert ask(service.port, "GET", "key") == b"value"


@pytest_twisted.ensureDeferred
async def test_a_given_port_that_is_taken_is_logged_and_tried_again(directory: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as squatter:
        service = build(directory, port=squatter.getsockname()[1])
        with capturedLogs() as events:
            service.startService()
            await eventually(lambda: len(matching(events, "down")) >= 2, "it is tried again")
    try:
        await eventually(lambda: answers(service.port), "it gets its port")
    finally:
        await service.stopService()
    assert matching(events, "Address already in use")


def matching(events: Sequence[Any], words: str) -> list[str]:
    lines = [formatEvent(event) or "" for event in events if event["log_level"].name in ("warn", "error")]
    return [line for line in lines if words in line]


def test_a_remembered_port_that_was_taken_gives_way_to_a_free_one(directory: Path) -> None:
    port = ReservedPort()
    directory.mkdir(parents=True)
    (directory / "port").write_text(f"{port.number}\n")
    assert build(directory).port == port.number
    with socket.create_server(("127.0.0.1", 0)) as squatter:
        (directory / "port").write_text(f"{squatter.getsockname()[1]}\n")
        assert build(directory).port not in (port.number, squatter.getsockname()[1])
    port.close()


@pytest.mark.parametrize("note", ["", "nonsense", "0", "65536", "-1"])
def test_a_note_that_is_no_port_is_passed_over(directory: Path, note: str) -> None:
    directory.mkdir(parents=True)
    (directory / "port").write_text(note)
    assert 0 < build(directory).port < 65536


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    """An installed daemon that is connected to its own server."""
    with Daemon("--redis", "embedded:", *DIRECT) as process:
        yield connected(process)


def data_of(daemon: Daemon) -> Path:
    return daemon.directory / "var" / "embedded"


def port_of(daemon: Daemon) -> int:
    return int((data_of(daemon) / "port").read_text())


def test_a_killed_daemon_takes_its_server_with_it(daemon: Daemon) -> None:
    pid = server_pid(port_of(daemon))
    daemon.kill()
    wait_until(lambda: not is_alive(pid), "the server is gone")
    assert not answers(port_of(daemon))


def test_a_killed_daemon_comes_back_at_once_with_port_and_data(daemon: Daemon) -> None:
    port = port_of(daemon)
    for number in range(1, 6):
        assert outcome(post(daemon.port, webhook(number))) == (202, "queued")
        daemon.kill()
        connected(daemon.start())
        assert port_of(daemon) == port
    ids = [webhook(number).job_id.encode() for number in range(1, 6)]
    assert ask(port, "LRANGE", "bull:chatwoot:wait", "0", "-1") == ids[::-1]


def test_a_daemon_that_gets_sigterm_ends_its_server_first(daemon: Daemon) -> None:
    pid = server_pid(port_of(daemon))
    assert daemon.stop() == 0
    assert not is_alive(pid)


def test_a_ctrl_c_does_not_reach_the_server_itself(daemon: Daemon) -> None:
    assert os.getsid(server_pid(port_of(daemon))) != os.getsid(daemon.pid)


@pytest_twisted.ensureDeferred
async def test_a_server_waits_for_that_of_a_killed_daemon(daemon: Daemon) -> None:
    directory, port = data_of(daemon), port_of(daemon)
    ask(port, "SET", "key", "value")
    leftover = server_pid(port)
    os.kill(leftover, signal.SIGSTOP)  # it does not get to end yet
    daemon.kill()
    service = build(directory)
    try:
        assert service.port == port
        with capturedLogs() as events:
            service.startService()
            await eventually(lambda: len(processes_in(directory)) == 2, "the next server waits")
            os.kill(leftover, signal.SIGCONT)
            await eventually(lambda: not is_alive(leftover) and answers(port), "the next server runs")
        assert ask(port, "GET", "key") == b"value"
        assert matching(events, "down") == []
    finally:
        with suppress(ProcessLookupError):
            os.kill(leftover, signal.SIGKILL)
        await service.stopService()


def processes_in(directory: Path) -> list[int]:
    """Return the processes that name the directory in their command line, or work in it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            if bytes(directory) in words or (process / "cwd").readlink() == directory:
                found.append(int(process.name))
    return found


def become(daemon_pid: int, lock: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run the child's code with another program as the server, and a parent that blocks signals."""

    def odd_signals() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT, signal.SIGCHLD])

    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", _BECOME_SERVER, str(daemon_pid), str(lock), *command],
        capture_output=True,
        text=True,
        env={"WEBHOOK_SECRET": "hush"},
        preexec_fn=odd_signals,
        timeout=DEADLINE_S,
        check=False,
    )


def test_the_server_inherits_neither_signals_nor_secrets(tmp_path: Path) -> None:
    shell = "while read -r line; do echo $line; done < /proc/self/status; export"
    result = become(os.getpid(), tmp_path / "lock", "/bin/sh", "-c", shell)
    lines = [line.split() for line in result.stdout.splitlines()]
    facts = {line[0]: line[1] for line in lines if len(line) > 1}
    glibc_own = 0b11 << 31  # signals 32 and 33, which no program can set; our parent may ignore them
    assert int(facts["SigBlk:"], 16) & ~glibc_own == 0
    assert int(facts["SigIgn:"], 16) & ~glibc_own == 0
    assert facts["Umask:"] == "0077"
    assert "hush" not in result.stdout


def test_the_server_is_not_started_if_the_daemon_is_gone_already(tmp_path: Path) -> None:
    result = become(os.getppid(), tmp_path / "lock", "/bin/echo", "started")
    assert result.returncode == 1
    assert result.stdout == ""
    assert "the daemon ended first" in result.stderr


# -- the daemon with its own server -------------------------------------------------------------------------


def lines_above_info(log: str) -> list[str]:
    return [line for line in log.splitlines() if line.split(maxsplit=2)[1] not in ("debug", "info")]


@pytest.fixture
def first_run() -> Iterator[Daemon]:
    """The installed daemon, not yet started."""
    daemon = Daemon("--redis", "embedded:")
    yield daemon
    print(daemon.log)
    daemon.close()


def test_the_first_event_of_a_first_run_is_queued_and_the_log_has_no_wrinkle(first_run: Daemon) -> None:
    first_run.launch()
    wait_until(lambda: "listening for webhooks" in first_run.log, "the daemon listens")
    response = post(first_run.port, webhook())

    assert outcome(response) == (202, "queued")
    assert first_run.stop() == 0
    (warning,) = lines_above_info(first_run.log)
    assert "neither a secret nor a token" in warning


def test_an_event_that_comes_before_the_server_is_queued(first_run: Daemon) -> None:
    first_run.launch()
    wait_until(lambda: can_connect(first_run.port), "the port is open")

    assert outcome(post(first_run.port, webhook())) == (202, "queued")


def can_connect(port: int) -> bool:
    with suppress(OSError):
        connect(port).close()
        return True
    return False


@pytest.fixture
def squatted() -> Iterator[Daemon]:
    """A daemon whose server never answers: another program has its port."""
    with socket.create_server(("127.0.0.1", 0)) as squatter:
        daemon = Daemon("--redis", f"embedded:{squatter.getsockname()[1]}", "--drain-timeout", "0")
        yield daemon
        print(daemon.log)
        daemon.close()


def test_a_server_that_does_not_answer_does_not_hold_up_events_for_long(squatted: Daemon) -> None:
    squatted.start()

    assert "does not answer after 3 s: webhooks are accepted without it" in squatted.log
    assert outcome(post(squatted.port, webhook())) == (202, "spooled")


def test_a_stop_before_the_server_answers_loses_no_event(squatted: Daemon) -> None:
    squatted.launch()
    wait_until(lambda: "Embedded server is down" in squatted.log, "the daemon runs without its server")
    with connect(squatted.port) as connection:
        connection.sendall(webhook().request)

        assert squatted.stop() == 0

        assert outcome(read_response(connection)) == (202, "spooled")
    assert "Traceback" not in squatted.log

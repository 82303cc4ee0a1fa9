"""The shipped units, which systemd checks, and the daemon as systemd sees it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from tests.support.bullmq import Queue
from tests.support.daemon import Daemon, installed_twistd
from tests.support.nginx import Load, assert_each_is_one_job
from tests.support.process import find_tool
from tests.support.servers import RedisServer
from tests.support.webhooks import DIRECT, connected, outcome, post, webhook
from webhookd.bullmq.keys import QueueKeys

UNITS = Path(__file__).parents[2] / "conf" / "systemd"
RECEIVE_DEADLINE_S = 30.0


# -- the units ----------------------------------------------------------------------------------------------


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units, with the path of the installed daemon."""
    for unit in UNITS.iterdir():
        text = unit.read_text().replace("/opt/webhookd/bin/twistd", str(installed_twistd()))
        (tmp_path / unit.name).write_text(text)
    return tmp_path


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    program = find_tool("systemd-analyze", "it is in Debian's package systemd")
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("kind", ["service", "socket"])
def test_systemd_finds_nothing_wrong(kind: str, units: Path) -> None:
    result = analyze("verify", units / f"webhookd@3001.{kind}")

    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")  # a typo is exit code 0, too


def test_a_typo_would_be_found(units: Path) -> None:
    service = units / "webhookd@.service"
    service.write_text(service.read_text().replace("WatchdogSec", "WatchdogSecs"))

    assert "WatchdogSecs" in analyze("verify", units / "webhookd@3001.service").stderr


def test_the_exposure_is_low(units: Path) -> None:
    result = analyze("security", "--offline=true", "--threshold=25", units / "webhookd@3001.service")

    assert result.returncode == 0, result.stdout[-500:]


def test_the_documented_commands_name_units_that_exist(units: Path) -> None:
    documentation = (UNITS.parents[1] / "docs" / "deployment.md").read_text()

    for unit in UNITS.iterdir():
        assert unit.name.replace("@", "@3001") in documentation


# -- notifications ------------------------------------------------------------------------------------------


class Notifications:
    """The socket on which systemd listens."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))

    def next(self, deadline_s: float = RECEIVE_DEADLINE_S) -> Sequence[str]:
        """Return the lines of the next notification. Raise `TimeoutError` if none comes."""
        self._socket.settimeout(deadline_s)
        return self._socket.recv(4096).decode().splitlines()

    def take(self, count: int, deadline_s: float) -> None:
        """Skip notifications. Raise `TimeoutError` if one does not come."""
        for _ in range(count):
            self.next(deadline_s)

    def all_until(self, wanted: str) -> list[str]:
        """Return all lines up to the wanted one."""
        lines: list[str] = []
        while wanted not in lines:
            lines += self.next()
        return lines

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def notifications(tmp_path: Path) -> Iterator[Notifications]:
    socket_ = Notifications(tmp_path / "notify")
    yield socket_
    socket_.close()


def environment(notifications: Notifications, watchdog_us: int | None = None) -> Mapping[str, str]:
    watchdog = {} if watchdog_us is None else {"WATCHDOG_USEC": str(watchdog_us)}
    return {"NOTIFY_SOCKET": str(notifications.path), **watchdog}


def test_systemd_hears_of_start_state_and_stop(redis: RedisServer, notifications: Notifications) -> None:
    daemon = Daemon("--redis", redis.url, environ=environment(notifications, 300_000))
    try:
        daemon.launch()
        assert "READY=1" in notifications.next()
        assert daemon.is_ready()  # at once: its clients may connect now

        notifications.all_until("STATUS=ok")
        redis.kill()
        notifications.all_until("STATUS=degraded")
        redis.start()
        notifications.all_until("STATUS=ok")

        os.kill(daemon.pid, signal.SIGTERM)
        notifications.all_until("STOPPING=1")
        assert daemon.wait() == 0
        with pytest.raises(BlockingIOError):  # there is no other notification
            notifications.next(deadline_s=0)
    finally:
        daemon.close()


STICKY = """\
import signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: time.sleep(3))
from twisted.scripts.twistd import run
sys.exit(run())
"""


def test_a_blocked_reactor_gives_no_sign_of_life(
    redis: RedisServer, notifications: Notifications, tmp_path: Path
) -> None:
    twistd = tmp_path / "twistd"
    twistd.write_text(f"#!{installed_twistd().with_name('python')}\n{STICKY}")
    twistd.chmod(0o755)
    environ = environment(notifications, 600_000)
    with Daemon("--redis", redis.url, environ=environ, twistd=twistd) as daemon:
        notifications.all_until("WATCHDOG=1")

        os.kill(daemon.pid, signal.SIGUSR1)
        with pytest.raises(TimeoutError):
            notifications.take(20, deadline_s=1.5)  # well above the 0.6 s that systemd would wait

        notifications.all_until("WATCHDOG=1")
        assert daemon.stop() == 0


def test_it_starts_without_systemd(redis: RedisServer) -> None:
    with Daemon("--redis", redis.url, *DIRECT, environ={"NOTIFY_SOCKET": "/no/such/socket"}) as daemon:
        assert outcome(post(connected(daemon).port, webhook())) == (202, "queued")
        assert "Traceback" not in daemon.log


# -- socket activation --------------------------------------------------------------------------------------


class ActivatedDaemon(Daemon):
    """A daemon that systemd's helper starts at the first connection, as the shipped unit does."""

    def argv(self) -> Sequence[str]:
        activate = find_tool("systemd-socket-activate", "it is in Debian's package systemd")
        return [activate, "--fdname=http", "-l", f"{self.host}:{self.port}", *activated(self)]


def activated(daemon: Daemon) -> Sequence[str]:
    """Return the command of the shipped unit, followed by the options of a daemon."""
    (line,) = (
        line for line in (UNITS / "webhookd@.service").read_text().splitlines() if "ExecStart=" in line
    )
    _, *arguments = line.partition("=")[2].split()
    return [str(daemon.twistd), *arguments, "--ops-endpoint", "off", *daemon.options]


def test_a_connection_starts_it(redis: RedisServer) -> None:
    with ActivatedDaemon("--redis", redis.url, *DIRECT) as daemon:
        assert outcome(post(connected(daemon).port, webhook())) == (202, "queued")
        assert daemon.stop() == 0


class HeldDaemon(Daemon):
    """A daemon that inherits a socket of the test, as systemd passes it the socket of the socket unit."""

    def __init__(self, listener: socket.socket, *options: str) -> None:
        super().__init__(*options)
        self.port = listener.getsockname()[1]
        self.stdin = listener.fileno()

    def argv(self) -> Sequence[str]:
        hand_over = 'exec 3<&0 </dev/null; export LISTEN_PID=$$; exec "$@"'
        return ["sh", "-c", hand_over, "sh", *activated(self)]

    def environ(self) -> Mapping[str, str]:
        return {**super().environ(), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "http"}


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A socket that listens even if the daemon is dead."""
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as listening:
        yield listening


def test_a_restart_refuses_no_connection(redis: RedisServer, listener: socket.socket) -> None:
    with (
        HeldDaemon(listener, "--redis", redis.url) as daemon,
        Load(connected(daemon).port, 60) as load,
    ):
        for _ in range(3):
            load.wait_for(60)
            assert daemon.stop() == 0
            daemon.start()
        load.wait_for(60)

    assert load.failed == []
    assert_each_is_one_job(Queue(redis.client(), QueueKeys("bull", "chatwoot")), load.accepted)


def test_not_even_a_crash_refuses_a_connection(redis: RedisServer, listener: socket.socket) -> None:
    with (
        HeldDaemon(listener, "--redis", redis.url) as daemon,
        Load(connected(daemon).port, 60) as load,
    ):
        load.wait_for(60)
        daemon.kill()
        daemon.start()
        load.wait_for(60)

    assert [sent for sent in load.failed if "Refused" in sent.error] == []
    assert len(load.failed) < 60  # those that it had accepted, and had not answered

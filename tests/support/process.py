"""Child processes of the tests: each has its own directory, and dies with the test run.

Everything here is synchronous and belongs in the main thread. A child dies with the *thread* that started it,
because Linux's parent-death signal watches that thread.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

START_DEADLINE_S = 60.0
STOP_DEADLINE_S = 60.0
_POLL_INTERVAL_S = 0.01


class MissingTool(Exception):
    """A program that the tests need is not installed. The message says what installs it."""


class ProcessFailed(Exception):
    """A child ended, or was not ready in time. The message ends with the last lines of its log."""


def find_tool(name: str, installed_by: str) -> str:
    """Return the path of a program. Raise `MissingTool` if there is none, so that no test is skipped."""
    path = shutil.which(name)
    if path is None:
        raise MissingTool(f"{name} is not installed: {installed_by}")
    return path


def node() -> str:
    """Return the path of Node.js."""
    return find_tool("node", "it is in Debian's package nodejs")


def wait_until(condition: Callable[[], bool], what: str, deadline_s: float = START_DEADLINE_S) -> None:
    """Poll until ``condition`` holds. A `TimeoutError` says that ``what`` is missing."""
    end = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {deadline_s:g} s: {what}")
        time.sleep(_POLL_INTERVAL_S)


class Resource:
    """Something that a test opens in a ``with`` block, and that is closed at the end of the block.

    After a failed `start`, `close` is called, so it must work on what is half open.
    """

    def start(self) -> Self:
        """Open it, and return when it is ready."""
        return self

    def close(self) -> None:
        """Close it, and remove what it left."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(self, *_error: object) -> None:
        self.close()


class ReservedPort(Resource):
    """A free loopback port, which the kernel gives to no other program while this object is open.

    The socket is bound and never listens. A server that sets SO_REUSEADDR, as Redis and Twisted do, can
    listen on the port, and again after it died. While no server listens, the kernel refuses connections.
    """

    def __init__(self) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", 0))
        self.number: int = self._socket.getsockname()[1]

    def close(self) -> None:
        """Give the port back."""
        self._socket.close()


class ChildProcess(Resource):
    """One program that a test starts, stops, kills, freezes, and starts again.

    A subclass defines the command (`argv`) and when the program is ready (`is_ready`). Without ``directory``,
    the child gets a new one, which `close` removes.
    """

    name: str = "child"
    stdin: int = subprocess.DEVNULL

    def __init__(self, directory: Path | None = None) -> None:
        self._resources = ExitStack()
        if directory is None:
            directory = Path(self._resources.enter_context(TemporaryDirectory(prefix="webhookd-test-")))
        self.directory = directory
        self.log_path = directory / f"{self.name}.log"
        self.process: subprocess.Popen[bytes] | None = None

    def argv(self) -> Sequence[str]:
        """Return the command to run."""
        raise NotImplementedError

    def environ(self) -> Mapping[str, str]:
        """Return the whole environment of the child. It inherits nothing from the test run."""
        return {"PATH": os.defpath, "LANG": "C.UTF-8"}

    def is_ready(self) -> bool:
        """Return true if the child can do its work."""
        raise NotImplementedError

    @property
    def log(self) -> str:
        """The standard output and error of the child, of all its starts."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    @property
    def pid(self) -> int:
        """The process id of the running child."""
        return self._running().pid

    def start(self) -> Self:
        """Start the child, and return when it is ready."""
        self.launch()
        self.wait_ready()
        return self

    def launch(self) -> None:
        """Start the child without waiting until it is ready."""
        if self.process is not None and self.process.poll() is None:
            raise ProcessFailed(f"{self.name} is already running")
        setpriv = find_tool("setpriv", "it is in Debian's package util-linux")
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [setpriv, "--pdeathsig", "KILL", "--", *self.argv()],
                cwd=self.directory,
                env=dict(self.environ()),
                stdin=self.stdin,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait_ready(self, deadline_s: float = START_DEADLINE_S) -> None:
        """Return when the child is ready. Raise `ProcessFailed` if it ends, or is not ready in time."""

        def ready() -> bool:
            if self._running().poll() is not None:
                raise self._failed(f"ended with {self._running().returncode}")
            return self.is_ready()

        try:
            wait_until(ready, f"{self.name} is ready", deadline_s)
        except TimeoutError as error:
            self.kill()
            raise self._failed(str(error)) from error

    def stop(self, deadline_s: float = STOP_DEADLINE_S) -> int:
        """Send SIGTERM to the child, let it run if it is frozen, and `wait` for its end."""
        process = self._running()
        if process.poll() is None:
            process.terminate()
            self.resume()
        return self.wait(deadline_s)

    def wait(self, deadline_s: float = STOP_DEADLINE_S) -> int:
        """Return the exit code when the child ends. If it does not in time, kill it: `ProcessFailed`."""
        try:
            return self._running().wait(deadline_s)
        except subprocess.TimeoutExpired as error:
            self.kill()
            raise self._failed(f"did not end within {deadline_s:g} s") from error

    def kill(self) -> None:
        """Send SIGKILL, as the kernel's OOM killer does."""
        self._running().kill()
        self._running().wait()

    def restart(self) -> None:
        """Stop the child, and start it again with the same directory and ports."""
        self.stop()
        self.start()

    def suspend(self) -> None:
        """Freeze the child (SIGSTOP). Its port still accepts connections, and nothing answers."""
        self._running().send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a frozen child continue."""
        self._running().send_signal(signal.SIGCONT)

    def close(self) -> None:
        """Kill the child, and remove what it left."""
        if self.process is not None:
            self.kill()
        self._resources.close()

    def reserve_port(self) -> int:
        """Return a loopback port that belongs to this child until `close`."""
        port = ReservedPort()
        self._resources.callback(port.close)
        return port.number

    def _running(self) -> subprocess.Popen[bytes]:
        if self.process is None:
            raise ProcessFailed(f"{self.name} was never started")
        return self.process

    def _failed(self, what: str) -> ProcessFailed:
        return ProcessFailed(f"{self.name}: {what}\n{self.log[-4000:]}")


def is_listening(port: int, host: str = "127.0.0.1") -> bool:
    """Return true if a connection to a port succeeds."""
    with socket.socket() as connection:
        return connection.connect_ex((host, port)) == 0

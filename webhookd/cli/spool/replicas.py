"""Access to the spools of all replicas, stopped or running.

The command locks the directory of a stopped replica, as an adopting replica would, and reads its file as it
is. Only to change a spool, it opens it as a daemon does. A running replica answers on the socket in its
directory.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
from attrs import define, field, frozen
from treq.client import HTTPClient
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import UNIXClientEndpoint
from twisted.internet.error import ConnectError
from twisted.internet.interfaces import IStreamClientEndpoint
from twisted.internet.task import deferLater
from twisted.python.failure import Failure
from twisted.web.client import URI, Agent, ResponseFailed, ResponseNeverReceived
from twisted.web.iweb import IAgentEndpointFactory
from zope.interface import implementer

from webhookd.cli.terminal import Unreachable, WrongUse
from webhookd.clock import wall_clock_ms
from webhookd.model import SpoolUnavailable
from webhookd.reactor import IReactor
from webhookd.spool.database import SpoolDatabase, SpoolLimits, connect_to_read
from webhookd.spool.directory import (
    REPLICA_PREFIX,
    SpoolDirectory,
    SpoolRoot,
    hold,
    open_directory,
    socket_path,
)
from webhookd.spool.queue import DeferToThread, Spool
from webhookd.spool.requests import DrainState, Query, SpoolRequest
from webhookd.spool.salvage import sibling
from webhookd.spool.wal import repair

_OPEN_DEADLINE_S = 3.0
_ANSWER_DEADLINE_S = 5.0
_POLL_INTERVAL_S = 0.1


class Unreadable(Unreachable):
    """The file of a spool is damaged."""


def short_name(path: Path) -> str:
    """Return the part of a directory's name that identifies its replica."""
    return path.name.removeprefix(REPLICA_PREFIX)


@define(eq=False)
class Stopped:
    """The spool of a replica that does not run, locked until `close`."""

    path: Path
    _directory: SpoolDirectory
    _connection: sqlite3.Connection
    _defer_to_thread: DeferToThread
    _root: SpoolRoot
    _limits: SpoolLimits
    _spool: Spool | None = field(default=None, init=False)
    pid: None = field(default=None, init=False)

    async def ask(self, request: SpoolRequest) -> Any:
        """Run a request and return its answer.

        :raises Unreachable: the spool cannot be read, or written to.
        """
        if self._spool is None and isinstance(request, Query):
            return await self._defer_to_thread(partial(self._answer, request))
        spool = self.spool()
        try:
            return await spool.do(request)
        except SpoolUnavailable as error:
            raise Unreachable(f"{self.path}: {error}") from None

    def spool(self) -> Spool:
        """Return the spool as a daemon opens it, for changes."""
        if self._spool is None:
            if not self._root.is_ours(self.path):
                raise WrongUse(f"{self.path}: made by another version, or for another Redis, prefix or queue")
            _act_as_owner(self.path)
            if not os.access(self.path, os.W_OK):
                raise Unreachable(f"{self.path}: it cannot be written to")
            self._connection.close()
            database = SpoolDatabase(self._directory.database, self._limits)
            self._spool = Spool(self._directory, database, self._defer_to_thread, wall_clock_ms, self._limits)
        return self._spool

    async def is_cut_off(self) -> bool:
        """Return whether damage in the WAL hides later records until a daemon opens the spool."""
        return await self._defer_to_thread(self._has_damaged_wal)

    def _has_damaged_wal(self) -> bool:
        try:
            return repair(sibling(self._directory.database, "-wal").read_bytes())[1]
        except FileNotFoundError:
            return False

    async def close(self) -> None:
        """Release the directory; remove it if the spool was changed and is empty now."""
        if self._spool is not None:
            await self._spool.close()
        else:
            self._connection.close()
            self._directory.release()

    def _answer(self, query: Query) -> Any:
        try:
            return query.answer(self._connection)
        except sqlite3.Error as error:
            raise Unreadable(f"{self.path}: its file cannot be read: {error}") from None


@implementer(IAgentEndpointFactory)
class Running:
    """The spool of a running daemon, which answers on the socket in the directory."""

    def __init__(self, reactor: IReactor, path: Path) -> None:
        self.path = path
        self.pid = 0
        self._reactor = reactor
        self._directory_fd = open_directory(path)
        self._client = HTTPClient(Agent.usingEndpointFactory(reactor, self))

    def endpointForURI(self, uri: URI) -> IStreamClientEndpoint:
        """Return an endpoint for the socket; the URI does not matter."""
        return UNIXClientEndpoint(self._reactor, socket_path(self._directory_fd), _ANSWER_DEADLINE_S)

    async def ask(self, request: SpoolRequest) -> Any:
        """Send a request and return its answer.

        :raises Unreachable: the daemon does not answer, or reports an error.
        """
        return msgspec.json.decode(
            await self._fetch("POST", "/", msgspec.json.encode(request)), type=request.answer_type
        )

    async def wake_drain(self) -> None:
        """Make its drain try at once."""
        await self._fetch("POST", "/drain")

    async def drain_state(self) -> DrainState:
        """Return the process and the progress of its drain.

        :raises Unreachable: the daemon does not answer, or reports an error.
        :raises ConnectError: no process listens.
        """
        return msgspec.json.decode(await self._fetch("GET", "/drain"), type=DrainState)

    async def is_cut_off(self) -> bool:
        """Return False: a daemon has opened the spool."""
        return False

    async def close(self) -> None:
        """Close the way to the socket."""
        os.close(self._directory_fd)

    async def _fetch(self, method: str, path: str, body: bytes = b"") -> bytes:
        fetched = Deferred.fromCoroutine(self._exchange(method, path, body))
        fetched.addTimeout(_ANSWER_DEADLINE_S, self._reactor, self._too_late)
        try:
            return await fetched
        except (ResponseFailed, ResponseNeverReceived):
            raise Unreachable(f"{self.path}: the daemon has just ended") from None

    async def _exchange(self, method: str, path: str, body: bytes) -> bytes:
        response = await self._client.request(method, f"http://spool{path}", data=body)
        content = await response.content()
        if response.code != 200:
            raise Unreachable(f"{self.path}: {msgspec.json.decode(content)}")
        return content

    def _too_late(self, _answer: bytes | Failure, deadline_s: float) -> Failure:
        return Failure(
            Unreachable(f"{self.path}: the daemon has not answered for {deadline_s:.0f} s: its disk may hang")
        )


Replica: TypeAlias = Stopped | Running


@frozen
class Replicas:
    """The replicas below one spool root."""

    root: SpoolRoot
    reactor: IReactor
    _defer_to_thread: DeferToThread
    _limits: SpoolLimits

    def paths(self, wanted: str | None = None) -> Sequence[Path]:
        """Return all directories, or the one whose path, or the beginning of whose name, is ``wanted``."""
        if wanted is not None and "/" in wanted:
            return [Path(wanted).absolute()]
        try:
            next(self.root.path.iterdir(), None)  # a glob would silently skip what it may not read
        except OSError as error:
            raise Unreachable(f"{self.root.path}: {error.strerror}") from None
        paths = [path for path in self.root.replicas() if path.is_dir()]
        if wanted is None:
            return paths
        found = [path for path in paths if path.name.startswith((wanted, REPLICA_PREFIX + wanted))]
        if len(found) != 1:
            problem = "several replicas have" if found else "no replica has"
            raise WrongUse(f"{self.root.path}: {problem} a name that begins with {wanted}")
        return found

    def path(self, wanted: str | None) -> Path:
        """Return the directory that is ``wanted``, which may be None if there is only one."""
        paths = self.paths(wanted)
        if len(paths) == 1:
            return paths[0]
        if not paths:
            raise Unreachable(f"{self.root.path}: no replica has a spool here")
        names = ", ".join(map(short_name, paths))
        raise WrongUse(f"select a replica with --replica: {names}")

    @asynccontextmanager
    async def open(self, path: Path) -> AsyncIterator[Replica]:
        """Open the spool in a directory, held or not, while the block lasts.

        :raises Unreachable: it does not exist, may not be read, or its holder does not answer.
        """
        replica = await self._open(path)
        try:
            yield replica
        finally:
            await replica.close()

    async def _open(self, path: Path) -> Replica:
        end_s = time.monotonic() + _OPEN_DEADLINE_S
        while True:  # a starting daemon has the lock before it listens
            try:
                replica = await self._defer_to_thread(partial(self._take, path)) or await self._call(path)
            except OSError as error:
                raise Unreachable(f"{path}: {error.strerror or error}") from None
            if replica is not None:
                return replica
            if time.monotonic() > end_s:
                raise Unreachable(f"{path}: in use by a process that does not answer")
            await deferLater(self.reactor, _POLL_INTERVAL_S)

    def _take(self, path: Path) -> Stopped | None:
        directory = hold(path)
        if directory is None:
            return None
        try:
            connection = connect_to_read(directory.database)
        except sqlite3.Error as error:
            directory.release()
            raise Unreadable(f"{path}: its file cannot be read: {error}") from None
        return Stopped(path, directory, connection, self._defer_to_thread, self.root, self._limits)

    async def _call(self, path: Path) -> Running | None:
        replica = Running(self.reactor, path)
        try:
            replica.pid = (await replica.drain_state()).pid
        except BaseException as error:
            await replica.close()
            if isinstance(error, ConnectError):
                return None
            raise
        return replica


def _act_as_owner(path: Path) -> None:
    """Change from root to the owner of a spool: the daemon could not open a file that root owns."""
    status = path.stat()
    if os.geteuid() == 0 and status.st_uid != 0:
        os.setgroups([])
        os.setgid(status.st_gid)
        os.setuid(status.st_uid)

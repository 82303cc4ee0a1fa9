"""The control sockets: the operator's command sends its requests for a spool to the running daemon.

Each spool directory that a daemon holds has one. It is a UNIX socket, because a spool belongs to the daemon's
user alone: the directory has mode 0700, so no other user can connect, and nothing is on a network. If the
daemon cannot open the socket, it warns and continues.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, cast

import msgspec
from attrs import define, frozen
from klein import Response
from twisted.internet.defer import maybeDeferred
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IListeningPort
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.iweb import IRequest

from webhookd.delivery import Drain
from webhookd.http import KleinApp, Shortcut, WebhookRequest, WebhookSite
from webhookd.http.answers import json_response
from webhookd.model import SpoolUnavailable
from webhookd.reactor import IReactor
from webhookd.spool.directory import CONTROL_NAME, open_directory, socket_path
from webhookd.spool.queue import DeferToThread, Spool
from webhookd.spool.requests import DrainState, SpoolRequest

_MAX_BODY_BYTES = 65_536
_MAX_CONNECTIONS = 20
_CLOSE_DEADLINE_S = 1.0

_decode = msgspec.json.Decoder(SpoolRequest).decode
_log = Logger()


@define(eq=False)
class ControlApp:
    """The routes for one spool; ``why_paused`` returns why the drain is paused, or None if it is not."""

    app: ClassVar[KleinApp] = KleinApp()

    spool: Spool
    drain: Drain
    why_paused: Callable[[], str | None]

    @app.route("/", methods=["POST"])
    async def ask(self, request: WebhookRequest) -> Response:
        """Execute a `SpoolRequest`, and return its result."""
        return json_response(200, await self.spool.do(_decode(request.body)))

    @app.route("/drain", methods=["GET"])
    def look(self, _request: IRequest) -> Response:
        """Report the state of the drain."""
        return json_response(200, DrainState(os.getpid(), self.spool.stats.records, self.why_paused()))

    @app.route("/drain", methods=["POST"])
    def wake(self, request: IRequest) -> Response:
        """Wake the drain, and report its state."""
        self.drain.wake()
        return self.look(request)

    @app.handle_errors(Exception)
    def failed(self, _request: IRequest, failure: Failure) -> Response:
        """Answer any error with its message: only the daemon's user can read it."""
        if failure.check(msgspec.MsgspecError):
            return json_response(400, "this version of webhookd does not know this request")
        if not failure.check(SpoolUnavailable):
            _log.failure("cannot answer the operator's command", failure)
        return json_response(500, str(failure.value))


@frozen
class Control:
    """Opens the control sockets of the spools that the daemon holds."""

    _reactor: IReactor
    _run: DeferToThread
    _why_paused: Callable[[], str | None]

    async def open(self, spool: Spool, drain: Drain) -> ControlSocket | None:
        """Listen in a spool's directory; log a warning and return None if that fails."""
        app = ControlApp(spool, drain, self._why_paused)
        site = WebhookSite(
            app.app.resource(),
            self._reactor,
            max_body_bytes=_MAX_BODY_BYTES,
            max_connections=_MAX_CONNECTIONS,
            access_log=False,
            shortcut=Shortcut(app.app, app.failed),
        )
        path = spool.directory.path
        try:
            directory = await self._run(lambda: _clear_directory(path))
            port = self._reactor.listenUNIX(socket_path(directory), cast(Any, site), mode=0o600)
        except (OSError, CannotListenError) as error:
            _log.warn("`webhookd spool` cannot ask about {path}: {error}", path=str(path), error=error)
            return None
        return ControlSocket(port, site, directory)


@frozen
class ControlSocket:
    """The socket of one spool, while it listens."""

    _port: IListeningPort
    _site: WebhookSite
    _directory_fd: int

    async def close(self) -> None:
        """Stop listening, answer the requests under way, and remove the socket."""
        try:
            await maybeDeferred(self._port.stopListening)
        except OSError as error:  # such as a read-only disk; the next daemon removes the socket
            _log.warn("the socket of `webhookd spool` cannot be removed: {error}", error=error)
        await self._site.drain(_CLOSE_DEADLINE_S)
        os.close(self._directory_fd)


def _clear_directory(path: Path) -> int:
    """Open a directory of ours, and remove the socket that a dead process left there."""
    (path / CONTROL_NAME).unlink(missing_ok=True)
    return open_directory(path)

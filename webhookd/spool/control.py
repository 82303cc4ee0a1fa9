"""Where the operator's command asks a running daemon: a socket in each spool directory that it holds.

It is a UNIX socket, because the spool is for the daemon's own user alone: the directory has mode 0700, so
nobody else gets to the socket, and nothing of it is on a network. Where it cannot be, the daemon only warns.
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
from webhookd.spool.queue import Run, Spool
from webhookd.spool.requests import DrainState, Request

_MAX_BODY_BYTES = 65_536
_MAX_CONNECTIONS = 20
_CLOSE_DEADLINE_S = 1.0

_decode = msgspec.json.Decoder(Request).decode
_log = Logger()


@define(eq=False)
class ControlApp:
    """The routes for one spool. ``why_paused`` says why Redis is not asked now; None if it is."""

    app: ClassVar[KleinApp] = KleinApp()

    spool: Spool
    drain: Drain
    why_paused: Callable[[], str | None]

    @app.route("/", methods=["POST"])
    async def ask(self, request: WebhookRequest) -> Response:
        """A `Request`, and what the spool says to it."""
        return json_response(200, await self.spool.do(_decode(request.body)))

    @app.route("/drain", methods=["GET"])
    def look(self, _request: IRequest) -> Response:
        """How the drain gets on."""
        return json_response(200, DrainState(os.getpid(), self.spool.stats.records, self.why_paused()))

    @app.route("/drain", methods=["POST"])
    def wake(self, request: IRequest) -> Response:
        """The same, once it was told to look now."""
        self.drain.wake()
        return self.look(request)

    @app.handle_errors(Exception)
    def failed(self, _request: IRequest, failure: Failure) -> Response:
        """Whatever went wrong, in words: who gets here may know."""
        if failure.check(msgspec.MsgspecError):
            return json_response(400, "this version of webhookd knows no such request")
        if not failure.check(SpoolUnavailable):
            _log.failure("cannot answer the operator's command", failure)
        return json_response(500, str(failure.value))


@frozen
class Control:
    """Listens for the operator's command beside each spool that the daemon holds."""

    _reactor: IReactor
    _run: Run
    _why_paused: Callable[[], str | None]

    async def open(self, spool: Spool, drain: Drain) -> ControlSocket | None:
        """Listen in a spool's directory; None, and a warning, where that cannot be."""
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
            directory = await self._run(lambda: _make_way(path))
            port = self._reactor.listenUNIX(socket_path(directory), cast(Any, site), mode=0o600)
        except (OSError, CannotListenError) as error:
            _log.warn("`webhookd spool` cannot ask about {path}: {error}", path=str(path), error=error)
            return None
        return ControlSocket(port, site, directory)


@frozen
class ControlSocket:
    """A socket that listens."""

    _port: IListeningPort
    _site: WebhookSite
    _directory_fd: int

    async def close(self) -> None:
        """Take no more questions, finish what was asked, and remove the socket."""
        try:
            await maybeDeferred(self._port.stopListening)
        except OSError as error:  # of a disk that went read-only, say; the next daemon removes what stays
            _log.warn("the socket of `webhookd spool` cannot be removed: {error}", error=error)
        await self._site.drain(_CLOSE_DEADLINE_S)
        os.close(self._directory_fd)


def _make_way(path: Path) -> int:
    """Open a directory that is ours, without the socket that somebody left there who is dead."""
    (path / CONTROL_NAME).unlink(missing_ok=True)
    return open_directory(path)

"""The daemon as a Twisted service: its parts, and its listening ports."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attrs import define, field
from twisted.application.service import MultiService, Service
from twisted.internet.abstract import FileDescriptor
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import Deferred, ensureDeferred, maybeDeferred
from twisted.internet.interfaces import (
    IListeningPort,
    IReactorTime,
    IReadDescriptor,
    IStreamServerEndpoint,
)
from twisted.logger import ILogObserver, Logger
from twisted.python.failure import Failure

from webhookd.http import WebhookSite
from webhookd.model import ConfigError

_FINISH_DEADLINE_S = 10.0

_log = Logger()


def fatal(message: object) -> SystemExit:
    """Return the exception that ends a failed start: one line for the operator, and exit code 1."""
    return SystemExit(f"webhookd: {message}")


class Daemon(MultiService):
    """The daemon's parts, stopped one after another in the reverse order of their start.

    The parts that accept events stop first, then those that events need: nothing that an accepted event waits
    for is closed.
    """

    def __init__(self, log_observer: ILogObserver | None, on_stop: Callable[[], None]) -> None:
        super().__init__()
        self._log_observer = log_observer
        self._on_stop = on_stop

    def setServiceParent(self, parent: Any) -> None:
        """Join twistd's application, and give it the log observer, because twistd looks for it there."""
        if self._log_observer is not None:
            parent.setComponent(ILogObserver, self._log_observer)
        super().setServiceParent(parent)

    def startService(self) -> None:
        """Start the parts; a `ConfigError` ends the process with one line."""
        try:
            super().startService()
        except ConfigError as error:
            raise fatal(error) from None

    def stopService(self) -> Deferred[None]:
        """Stop the parts; fires when all have stopped. If one fails to stop, the others still stop."""
        Service.stopService(self)
        return ensureDeferred(self._stop_parts())

    async def _stop_parts(self) -> None:
        self._on_stop()
        for part in reversed(list(self)):
            try:
                await maybeDeferred(part.stopService)
            except Exception:  # noqa: BLE001  # the other parts must stop anyway
                _log.failure("cannot stop {part}", part=type(part).__name__)


@define(eq=False)
class Listener(Service):
    """One listening port. If it is unavailable and ``required``, the start fails; else the log warns.

    It accepts connections once ``accept_after`` has fired; until then they wait in the kernel's backlog.
    """

    _clock: IReactorTime
    _endpoint: IStreamServerEndpoint
    _site: WebhookSite
    _purpose: str
    _required: bool = field(kw_only=True)
    _accept_after: Deferred[None] | None = field(kw_only=True, default=None)
    _port: IListeningPort | None = field(init=False, default=None)

    def privilegedStartService(self) -> None:
        """Listen, before twistd gives up its privileges."""
        failures: list[Failure] = []
        self._endpoint.listen(self._site).addCallbacks(self._listening, failures.append)
        for failure in failures:  # outside of the Deferred, which would catch SystemExit
            self._failed(failure)

    def _listening(self, port: IListeningPort) -> None:
        self._port = port
        if self._accept_after is None or not isinstance(port, FileDescriptor):
            self._log_port(port)
            return

        def accept(_fired: None) -> None:
            if port.connected:  # and not closed in the meantime
                port.startReading()
                self._log_port(port)

        port.stopReading()
        self._accept_after.addCallback(accept)

    def _log_port(self, port: IListeningPort) -> None:
        _log.info(
            "webhookd listening for {purpose} on {address}", purpose=self._purpose, address=_shown(port)
        )

    def _failed(self, failure: Failure) -> None:
        message = f"cannot listen for {self._purpose}: {failure.getErrorMessage()}"
        if self._required:
            raise fatal(message)
        _log.warn("{problem}", problem=message)

    def stopService(self) -> Deferred[None]:
        """Accept no more connections, and close each open one after its last answer."""
        super().stopService()
        return ensureDeferred(self._stop())

    async def _stop(self) -> None:
        if self._port is None:
            return
        # Twisted closes the port in the reactor's next turn; this call runs just before that.
        self._clock.callLater(0, self._accept_waiting, self._port)
        await maybeDeferred(self._port.stopListening)
        await self._site.drain(_FINISH_DEADLINE_S)

    def _accept_waiting(self, port: IListeningPort) -> None:
        """Accept the clients that wait in the backlog: the kernel would reset them when the port closes."""
        known = -1
        while IReadDescriptor.providedBy(port) and known < len(self._site.state.channels):
            known = len(self._site.state.channels)
            port.doRead()


def _shown(port: IListeningPort) -> str:
    address = port.getHost()
    if isinstance(address, (IPv4Address, IPv6Address)):
        host = f"[{address.host}]" if ":" in address.host else address.host
        return f"{host}:{address.port}"
    return str(getattr(address, "name", address))

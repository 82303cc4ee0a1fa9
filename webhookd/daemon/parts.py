"""The daemon as a Twisted service: its parts, and its listening ports."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.application.service import MultiService, Service
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
    """The end of a start that cannot succeed: one line for the operator, and exit code 1."""
    return SystemExit(f"webhookd: {message}")


class Daemon(MultiService):
    """The daemon's parts, stopped one after another in the reverse order of their start.

    What takes events ends first, then what they need: nothing is closed that an accepted event waits for.
    """

    def __init__(self, log_observer: ILogObserver | None, on_stop: Callable[[], None]) -> None:
        super().__init__()
        self._log_observer = log_observer
        self._on_stop = on_stop

    def setServiceParent(self, parent: Any) -> None:
        """Become part of twistd's application, and bring its log observer, which twistd looks for there."""
        if self._log_observer is not None:
            parent.setComponent(ILogObserver, self._log_observer)
        super().setServiceParent(parent)

    def startService(self) -> None:
        """Start the parts; what cannot be had ends the process with one line."""
        try:
            super().startService()
        except ConfigError as error:
            raise fatal(error) from None

    def stopService(self) -> Deferred[None]:
        """Fires when all parts have stopped; a part that fails to stop does not keep the others from it."""
        Service.stopService(self)
        return ensureDeferred(self._stop_parts())

    async def _stop_parts(self) -> None:
        self._on_stop()
        for part in reversed(list(self)):
            try:
                await maybeDeferred(part.stopService)
            except Exception:  # noqa: BLE001  # the other parts must still stop
                _log.failure("cannot stop {part}", part=type(part).__name__)


class Listener(Service):
    """One listening port. A ``required`` one that cannot be had ends the start; another only warns."""

    _port: IListeningPort | None = None

    def __init__(
        self,
        clock: IReactorTime,
        endpoint: IStreamServerEndpoint,
        site: WebhookSite,
        purpose: str,
        *,
        required: bool,
    ) -> None:
        self._clock = clock
        self._endpoint = endpoint
        self._site = site
        self._purpose = purpose
        self._required = required

    def privilegedStartService(self) -> None:
        """Listen, before twistd gives up its privileges."""
        failures: list[Failure] = []
        self._endpoint.listen(self._site).addCallbacks(self._listening, failures.append)
        for failure in failures:  # outside of the Deferred, which would keep the exit to itself
            self._failed(failure)

    def _listening(self, port: IListeningPort) -> None:
        self._port = port
        _log.info("webhookd listening for {purpose} on {where}", purpose=self._purpose, where=_where(port))

    def _failed(self, failure: Failure) -> None:
        message = f"cannot listen for {self._purpose}: {failure.getErrorMessage()}"
        if self._required:
            raise fatal(message)
        _log.warn("{problem}", problem=message)

    def stopService(self) -> Deferred[None]:
        """Take no more connections, and close those that there are once they are answered."""
        super().stopService()
        return ensureDeferred(self._stop())

    async def _stop(self) -> None:
        if self._port is None:
            return
        # Twisted closes the port in the reactor's next turn, where this comes just before it.
        self._clock.callLater(0, self._accept_waiting, self._port)
        await maybeDeferred(self._port.stopListening)
        await self._site.drain(_FINISH_DEADLINE_S)

    def _accept_waiting(self, port: IListeningPort) -> None:
        """Clients that are connected but not accepted yet would be reset by the end of the port."""
        known = -1
        while IReadDescriptor.providedBy(port) and known < len(self._site.state.channels):
            known = len(self._site.state.channels)
            port.doRead()


def _where(port: IListeningPort) -> str:
    address = port.getHost()
    if isinstance(address, (IPv4Address, IPv6Address)):
        host = f"[{address.host}]" if ":" in address.host else address.host
        return f"{host}:{address.port}"
    return str(getattr(address, "name", address))

"""What systemd is told (sd_notify(3)): that the daemon is ready, how it is, that it turns, and that it ends.

``WATCHDOG=1`` is sent by the reactor itself: one that is blocked sends none, and systemd restarts the daemon.
All of it goes in datagrams to the socket that ``NOTIFY_SOCKET`` names; where that is not set, nobody listens.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping

from twisted.application.internet import TimerService
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

_BEATS_PER_WATCHDOG = 3  # one or two may come late
_STATUS_INTERVAL_S = 10.0

_log = Logger()


class SystemdService(TimerService):
    """Tells systemd how the daemon is, from its start to its stop.

    It is to start last and to stop first: it says that all else has started, and that the stop begins.
    ``status`` says how the daemon is in a few words; ``watchdog_s`` is how long a silence systemd allows.
    """

    def __init__(
        self,
        clock: IReactorTime,
        notify: Callable[[str], None],
        status: Callable[[], str],
        watchdog_s: float | None,
    ) -> None:
        interval_s = _STATUS_INTERVAL_S if watchdog_s is None else watchdog_s / _BEATS_PER_WATCHDOG
        super().__init__(interval_s, self._beat)
        self.clock = clock
        self._notify = notify
        self._status = status

    def stopService(self) -> Deferred[None]:
        """Say that the daemon ends; from then on systemd waits for no sign of life."""
        stopped: Deferred[None] = super().stopService()
        self._notify("STOPPING=1\nSTATUS=draining")
        return stopped

    def _beat(self) -> None:
        # READY each time: one that was lost would be missed for ever, and repeating it does nothing.
        self._notify(f"READY=1\nSTATUS={self._status()}\nWATCHDOG=1")


def systemd_service(
    environ: Mapping[str, str], clock: IReactorTime, status: Callable[[], str]
) -> SystemdService | None:
    """The service for the environment that systemd gave to this process; None where it expects no word."""
    path = environ.get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        return None
    return SystemdService(clock, _notifier(path), status, _watchdog_s(environ))


def _notifier(path: str) -> Callable[[str], None]:
    """Sends to a UNIX socket, where a leading ``@`` stands for the abstract namespace."""
    address = f"\0{path[1:]}" if path.startswith("@") else path
    kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC

    def notify(state: str) -> None:
        try:
            with socket.socket(socket.AF_UNIX, kind) as sender:
                sender.sendto(state.encode(), address)
        except OSError as error:  # it is busy or gone; the daemon's work does not depend on it
            _log.warn("cannot tell systemd: {error}", error=error.strerror)

    return notify


def _watchdog_s(environ: Mapping[str, str]) -> float | None:
    """How often systemd wants a sign of life of this very process; None where it does not."""
    microseconds = environ.get("WATCHDOG_USEC", "")
    if not microseconds.isdecimal() or environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    return int(microseconds) / 1e6 or None

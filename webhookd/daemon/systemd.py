"""Notifications to systemd, as in sd_notify(3): ready, status, watchdog, stopping.

The reactor sends ``WATCHDOG=1``: if it is blocked it sends none, and systemd restarts the daemon. Each
notification is a datagram to the socket that ``NOTIFY_SOCKET`` names. If that is not set, there is none.
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
    """Notifies systemd of the daemon's status, from its start to its stop.

    It must start last and stop first: it reports that everything else has started, and that the stop begins.
    ``status`` returns the status in a few words; ``watchdog_s`` is the longest silence that systemd allows.
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
        """Report that the daemon stops; systemd then expects no more ``WATCHDOG=1``."""
        stopped: Deferred[None] = super().stopService()
        self._notify("STOPPING=1\nSTATUS=draining")
        return stopped

    def _beat(self) -> None:
        # READY each time: systemd would wait forever for one that was lost, and repeating it is harmless.
        self._notify(f"READY=1\nSTATUS={self._status()}\nWATCHDOG=1")


def systemd_service(
    environ: Mapping[str, str], clock: IReactorTime, status: Callable[[], str]
) -> SystemdService | None:
    """Return the service for the environment that systemd gave to this process; None if it expects none."""
    path = environ.get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        return None
    return SystemdService(clock, _notifier(path), status, _watchdog_s(environ))


def _notifier(path: str) -> Callable[[str], None]:
    """Return a function that sends to the UNIX socket; a leading ``@`` means the abstract namespace."""
    address = f"\0{path[1:]}" if path.startswith("@") else path
    kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC

    def notify(state: str) -> None:
        try:
            with socket.socket(socket.AF_UNIX, kind) as sender:
                sender.sendto(state.encode(), address)
        except OSError as error:  # systemd is busy or gone; the daemon works without it
            _log.warn("cannot notify systemd: {error}", error=error.strerror)

    return notify


def _watchdog_s(environ: Mapping[str, str]) -> float | None:
    """Return how often systemd expects ``WATCHDOG=1`` of this process, in seconds; None if it does not."""
    microseconds = environ.get("WATCHDOG_USEC", "")
    if not microseconds.isdecimal() or environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    return int(microseconds) / 1e6 or None

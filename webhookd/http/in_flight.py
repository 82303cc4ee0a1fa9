"""The limit of deliveries under way."""

from __future__ import annotations

from webhookd.model import TooMany


class InFlight:
    """The number and bytes of the deliveries under way, and their limits."""

    def __init__(self, max_requests: int, max_bytes: int) -> None:
        self.requests = 0
        self.bytes = 0
        self._max_requests = max_requests
        self._max_bytes = max_bytes

    def enter(self, size_bytes: int) -> None:
        """Count a delivery in; raises `TooMany` if it would exceed a limit."""
        if self.requests >= self._max_requests or self.bytes + size_bytes > self._max_bytes:
            raise TooMany("too_many", "too many requests are under way")
        self.requests += 1
        self.bytes += size_bytes

    def leave(self, size_bytes: int) -> None:
        """Count a delivery out."""
        self.requests -= 1
        self.bytes -= size_bytes

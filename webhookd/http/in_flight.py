"""The limit on deliveries that are accepted at the same time."""

from __future__ import annotations

from webhookd.model import TooMany


class InFlight:
    """Number and bytes of the deliveries under way, and their limits."""

    def __init__(self, max_requests: int, max_bytes: int) -> None:
        self.requests = 0
        self.bytes = 0
        self._max_requests = max_requests
        self._max_bytes = max_bytes

    def enter(self, size_bytes: int) -> None:
        """Count a request in; raises `TooMany` if that would pass a limit."""
        if self.requests >= self._max_requests or self.bytes + size_bytes > self._max_bytes:
            raise TooMany("too_many", "too many requests are under way")
        self.requests += 1
        self.bytes += size_bytes

    def leave(self, size_bytes: int) -> None:
        """Count a request out."""
        self.requests -= 1
        self.bytes -= size_bytes

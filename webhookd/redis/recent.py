"""The jobs that Redis acknowledged last, in case it has lost them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from twisted.internet.interfaces import IReactorTime

from webhookd.model import Job

_MAX_AGE_S = 10.0
_MAX_BYTES = 25_165_824
_OVERHEAD_BYTES = 1_000  # of each job, in addition to its data: options, ids, and Python's objects


class RecentJobs:
    """Remembers the jobs of the last 10 s of acknowledgements, in at most 24 MiB of memory.

    The age counts back from the latest acknowledgement, not from now. So nothing is forgotten while Redis is
    away: the jobs before an outage are the ones that may be lost.
    """

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._batches: deque[tuple[float, int, Sequence[Job]]] = deque()
        self._bytes = 0

    def add(self, jobs: Sequence[Job]) -> None:
        """Remember the jobs of one call."""
        now_s = self._clock.seconds()
        size_bytes = sum([len(job.data) for job in jobs]) + len(jobs) * _OVERHEAD_BYTES
        batches = self._batches
        batches.append((now_s, size_bytes, jobs))
        self._bytes += size_bytes
        while batches and (self._bytes > _MAX_BYTES or batches[0][0] < now_s - _MAX_AGE_S):
            self._bytes -= batches.popleft()[1]

    def take(self) -> list[Job]:
        """Return all jobs, oldest first, and forget them."""
        taken = [job for _, _, jobs in self._batches for job in jobs]
        self._batches.clear()
        self._bytes = 0
        return taken

"""The jobs that Redis acknowledged last, in case it turns out to have lost them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from twisted.internet.interfaces import IReactorTime

from webhookd.model import Job

_MAX_AGE_S = 10.0
_MAX_BYTES = 25_165_824
_OVERHEAD_BYTES = 1_000  # what a job takes beside its data: options, ids, and what Python spends on them


class RecentJobs:
    """Remembers the jobs of the last 10 s of acknowledgements, at most 24 MiB of memory for them.

    The age counts back from the latest acknowledgement, not from now: while Redis is away nothing is
    forgotten, because the jobs before an outage are the ones that it may cost.
    """

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._batches: deque[tuple[float, int, Sequence[Job]]] = deque()
        self._bytes = 0

    def add(self, jobs: Sequence[Job]) -> None:
        """Redis has these now, since one call of it."""
        now_s = self._clock.seconds()
        size_bytes = sum([len(job.data) for job in jobs]) + len(jobs) * _OVERHEAD_BYTES
        batches = self._batches
        batches.append((now_s, size_bytes, jobs))
        self._bytes += size_bytes
        while batches and (self._bytes > _MAX_BYTES or batches[0][0] < now_s - _MAX_AGE_S):
            self._bytes -= batches.popleft()[1]

    def take(self) -> list[Job]:
        """All of them, oldest first; they are forgotten here."""
        taken = [job for _, _, jobs in self._batches for job in jobs]
        self._batches.clear()
        self._bytes = 0
        return taken

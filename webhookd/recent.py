"""The jobs that Redis acknowledged last, in case it turns out to have lost them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

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
        self._jobs: deque[tuple[float, int, Job]] = deque()
        self._bytes = 0

    def add(self, jobs: Iterable[Job]) -> None:
        """Redis has these now."""
        now_s = self._clock.seconds()
        remembered = self._jobs
        for job in jobs:
            size_bytes = len(job.data) + _OVERHEAD_BYTES
            remembered.append((now_s, size_bytes, job))
            self._bytes += size_bytes
        while remembered and (self._bytes > _MAX_BYTES or remembered[0][0] < now_s - _MAX_AGE_S):
            self._bytes -= remembered.popleft()[1]

    def take(self) -> list[Job]:
        """All of them, oldest first; they are forgotten here."""
        jobs = [job for _, _, job in self._jobs]
        self._jobs.clear()
        self._bytes = 0
        return jobs

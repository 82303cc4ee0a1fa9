"""The jobs that Redis acknowledged last, in case it turns out to have lost them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from twisted.internet.interfaces import IReactorTime

from webhookd.model import Job

_MAX_AGE_S = 10.0
_MAX_BYTES = 25_165_824
_OVERHEAD_BYTES = 700  # what Python spends on a job beside its content


class RecentJobs:
    """Remembers the jobs of the last 10 s of acknowledgements, at most 24 MiB of memory for them.

    The age counts back from the latest acknowledgement, not from now: while Redis is away nothing is
    forgotten, because the jobs before an outage are the ones that it may cost.
    """

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._jobs: deque[tuple[float, Job]] = deque()
        self._bytes = 0

    def add(self, jobs: Iterable[Job]) -> None:
        """Redis has these now."""
        now_s = self._clock.seconds()
        for job in jobs:
            self._jobs.append((now_s, job))
            self._bytes += job.size_bytes + _OVERHEAD_BYTES
        while self._jobs and (self._jobs[0][0] < now_s - _MAX_AGE_S or self._bytes > _MAX_BYTES):
            self._bytes -= self._jobs.popleft()[1].size_bytes + _OVERHEAD_BYTES

    def take(self) -> list[Job]:
        """All of them, oldest first; they are forgotten here."""
        jobs = [job for _, job in self._jobs]
        self._jobs.clear()
        self._bytes = 0
        return jobs

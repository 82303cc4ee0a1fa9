"""Rates and percentiles from the differences of counters; pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from attrs import frozen


@frozen
class Reading:
    """The counters at one moment: events by outcome, refused requests, and a histogram's buckets."""

    at_s: float
    outcomes: Mapping[str, int]
    refused: int
    durations: Sequence[int]


@frozen
class Rates:
    """The changes between two readings: rates per second, and requests by duration."""

    outcomes: Mapping[str, float]
    refused: float
    durations: Sequence[int]

    @property
    def events(self) -> float:
        """Accepted events per second."""
        return sum(rate for outcome, rate in self.outcomes.items() if outcome != "failed")


def rates_between(old: Reading, new: Reading) -> Rates:
    """Return the rates between two readings; all are zero if no time has passed."""
    passed_s = new.at_s - old.at_s
    per_second = 1 / passed_s if passed_s > 0 else 0.0
    return Rates(
        {
            outcome: (count - old.outcomes.get(outcome, 0)) * per_second
            for outcome, count in new.outcomes.items()
        },
        (new.refused - old.refused) * per_second,
        [count - before for before, count in zip(old.durations, new.durations, strict=True)],
    )


def quantile(bounds: Sequence[float], counts: Sequence[int], share: float) -> float | None:
    """Return the value that ``share`` of the observations do not exceed; None if there are none.

    As in Prometheus' histogram_quantile, observations count as evenly spread within a bucket, and those
    beyond the last bound count as that bound.
    """
    rank = share * sum(counts)
    if rank == 0:
        return None
    lower = 0.0
    for upper, count in zip(bounds, counts, strict=False):
        if rank <= count:
            return lower + (upper - lower) * rank / count
        rank -= count
        lower = upper
    return lower

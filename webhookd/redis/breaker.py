"""A circuit breaker: it notices that Redis is away or slow, and then no request waits for Redis.

Each call needs a permit, and reports how it ended::

    permit = breaker.permit(now_s)
    if permit is None:
        ...                       # do not call Redis: the spool takes the event
    permit.succeeded(now_s)       # or permit.failed(now_s), once, when the call has ended

A call is bad if it failed or was slow. While the breaker is closed, it permits every call. It opens when too
many of the last seconds' calls were bad, or when a few calls in a row failed. Open, it permits no call until
its break is over. Then it is half-open: it permits one call at a time, as a probe. Enough good probes close
it. A bad or lost probe opens it again, for a longer break.

Pure: no timer, no I/O. ``now_s`` is a reading of a monotonic clock. Time alone changes nothing: a break that
is over, or a lost probe, is noticed when the next permit is asked for.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable
from enum import Enum

from attrs import define, frozen


class State(Enum):
    """A state of the breaker; the value is a metric's label."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class CallOutcome(Enum):
    """The end of a call, or that it was not permitted; the value is a metric's label. A call counts once."""

    SUCCESS = "success"
    SLOW = "slow"
    FAILURE = "failure"
    NOT_PERMITTED = "not_permitted"


@frozen(kw_only=True)
class BreakerPolicy:
    """The rules of the breaker: how many bad calls open it, for how long, and which probes close it.

    A wrong opening is cheap: for half a second, events go over the disk. A missed one is dear: each sender
    waits for the deadline. So two failures in a row are enough: one alone may be a connection that died of
    idleness, and with one event a minute no window would ever see enough calls.
    """

    window_s: float = 10.0
    minimum_calls: int = 10
    bad_ratio: float = 0.5
    slow_call_s: float = 0.25  # half the deadline of a call
    failures_in_a_row: int = 2
    first_break_s: float = 0.5
    longest_break_s: float = 15.0
    probes_to_close: int = 2
    probe_timeout_s: float = 5.0  # above every deadline: a probe that takes longer is lost


@define
class _Slice:
    number: int
    calls: int = 0
    bad: int = 0


class _Window:
    """The calls of the last ``span_s`` (to a tenth), counted by slices: traffic does not make it grow."""

    _SLICES = 10

    def __init__(self, span_s: float) -> None:
        self._slice_s = span_s / self._SLICES
        self._slices: deque[_Slice] = deque(maxlen=self._SLICES)

    def add(self, at_s: float, *, bad: bool) -> tuple[int, int]:
        """Count one more call; return how many calls the window holds now, and how many of them are bad."""
        number = int(at_s // self._slice_s)
        if not self._slices or self._slices[-1].number != number:
            self._slices.append(_Slice(number))
        self._slices[-1].calls += 1
        self._slices[-1].bad += bad
        live = [each for each in self._slices if each.number > number - self._SLICES]
        return sum(each.calls for each in live), sum(each.bad for each in live)


@define(eq=False)
class _Period:
    """The breaker's memory between two changes of state. Each change begins a new period."""

    window: _Window
    break_ends_s: float = math.inf
    failures_in_a_row: int = 0
    probe: Permit | None = None
    good_probes: int = 0


@define(eq=False)
class Permit:
    """Permission for one call. Report once how the call ended; later reports are ignored."""

    began_s: float
    period: _Period
    _settle: Callable[[Permit, float, CallOutcome], None]
    _settled: bool = False

    def succeeded(self, now_s: float) -> None:
        """Report that Redis answered. A job that Redis refuses for its own sake is an answer, too."""
        self._end(now_s, CallOutcome.SUCCESS)

    def failed(self, now_s: float) -> None:
        """Report that Redis was away or late, or could not serve anyone."""
        self._end(now_s, CallOutcome.FAILURE)

    def _end(self, now_s: float, outcome: CallOutcome) -> None:
        if not self._settled:
            self._settled = True
            self._settle(self, now_s, outcome)


class CircuitBreaker:
    """Counts how calls end, and decides which calls may be made.

    ``jitter`` gives numbers from 0 to 1 (``random.random``): replicas that share a Redis must not probe it in
    step. ``changed`` is called after each change, with the old state and the new one; it must not raise.
    ``calls`` counts each call when it ends, a lost probe as a failure. ``transitions`` counts the changes.
    """

    def __init__(
        self,
        policy: BreakerPolicy,
        jitter: Callable[[], float],
        changed: Callable[[State, State], None] = lambda _old, _new: None,
    ) -> None:
        self.state = State.CLOSED
        self.calls: dict[CallOutcome, int] = dict.fromkeys(CallOutcome, 0)
        self.transitions: Counter[tuple[State, State]] = Counter()
        self._policy = policy
        self._jitter = jitter
        self._changed = changed
        self._next_break_s = policy.first_break_s
        self._period = _Period(_Window(policy.window_s))

    def permit(self, now_s: float) -> Permit | None:
        """Ask to make one call now. None means: do not make it."""
        if now_s >= self._period_ends_s():
            if self._period.probe is None:
                self._change(State.HALF_OPEN, now_s)
            else:
                self._period.probe.failed(now_s)  # lost: its own report comes too late
        if not self._may_call():
            self.calls[CallOutcome.NOT_PERMITTED] += 1
            return None
        permit = Permit(now_s, self._period, self._settle)
        if self.state is State.HALF_OPEN:
            self._period.probe = permit
        return permit

    def retry_in_s(self, now_s: float) -> float:
        """Return the seconds until the next call may be permitted; 0 means now.

        While a probe is out, this is the time until it counts as lost; most probes end long before.
        """
        return 0.0 if self._may_call() else max(0.0, self._period_ends_s() - now_s)

    def _may_call(self) -> bool:
        return self.state is State.CLOSED or (self.state is State.HALF_OPEN and self._period.probe is None)

    def _period_ends_s(self) -> float:
        """Return when time alone ends the period: the break is over, or the probe is lost."""
        probe = self._period.probe
        return self._period.break_ends_s if probe is None else probe.began_s + self._policy.probe_timeout_s

    def _settle(self, permit: Permit, now_s: float, outcome: CallOutcome) -> None:
        if outcome is CallOutcome.SUCCESS and now_s - permit.began_s > self._policy.slow_call_s:
            outcome = CallOutcome.SLOW
        self.calls[outcome] += 1
        if permit.period is not self._period:
            return  # it shows Redis as it was in an earlier period
        if self.state is State.CLOSED:
            self._weigh_call(now_s, outcome)
        else:
            self._weigh_probe(now_s, outcome)

    def _weigh_call(self, now_s: float, outcome: CallOutcome) -> None:
        policy, period = self._policy, self._period
        calls, bad = period.window.add(now_s, bad=outcome is not CallOutcome.SUCCESS)
        too_many_bad = calls >= policy.minimum_calls and bad >= policy.bad_ratio * calls
        period.failures_in_a_row = period.failures_in_a_row + 1 if outcome is CallOutcome.FAILURE else 0
        if too_many_bad or period.failures_in_a_row >= policy.failures_in_a_row:
            self._change(State.OPEN, now_s)

    def _weigh_probe(self, now_s: float, outcome: CallOutcome) -> None:
        period = self._period
        period.probe = None
        period.good_probes += 1
        if outcome is not CallOutcome.SUCCESS:
            self._change(State.OPEN, now_s)
        elif period.good_probes >= self._policy.probes_to_close:
            self._change(State.CLOSED, now_s)

    def _change(self, new: State, now_s: float) -> None:
        old, self.state = self.state, new
        self._period = _Period(_Window(self._policy.window_s))
        if new is State.OPEN:
            # Half of a break is certain and half is chance, so none is longer than longest_break_s.
            self._period.break_ends_s = now_s + self._next_break_s * (1 - self._jitter() / 2)
            self._next_break_s = min(2 * self._next_break_s, self._policy.longest_break_s)
        elif new is State.CLOSED:
            self._next_break_s = self._policy.first_break_s
        self.transitions[old, new] += 1
        self._changed(old, new)

"""A circuit breaker: it notices that Redis is away or slow, and from then on nobody waits for it.

Each call needs a permit, and tells it how it ended::

    permit = breaker.permit(now_s)
    if permit is None:
        ...                       # do not call Redis: the spool takes the event
    permit.succeeded(now_s)       # or permit.failed(now_s), once, when the call has ended

A bad call is one that failed or was slow. Closed, the breaker permits every call, until too large a share of
the last seconds' calls was bad, or a few failures come in a row. Open, it permits none for the length of a
break. The first question after the break makes it half-open: a few probes may try, the rest are refused.
Enough good probes close it; a bad or lost one opens it again, for a longer break. An operator can overrule
all of this, either way.

Pure: no timer, no I/O. ``now_s`` is a reading of a monotonic clock (``time.monotonic``), not of a reactor,
which may run on wall time. What time alone brings about happens when the next permit is asked for.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable
from enum import Enum

from attrs import Factory, define, field, frozen
from attrs.validators import and_, ge, gt, le


class State(Enum):
    """Where the breaker stands; the value is a metric's label."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"
    FORCED_OPEN = "forced_open"
    FORCED_CLOSED = "forced_closed"


class CallOutcome(Enum):
    """How a call ended, or that it was refused; the value is a metric's label. A call is counted once."""

    SUCCESS = "success"
    SLOW = "slow"
    FAILURE = "failure"
    NOT_PERMITTED = "not_permitted"


Listener = Callable[[State, State, float], None]
"""Called with the old state, the new one, and the caller's ``now_s``, after the change. It must not raise."""

_positive, _at_least_one, _share = gt(0.0), ge(1), and_(gt(0.0), le(1.0))


@frozen(kw_only=True)
class BreakerPolicy:
    """When to open, for how long, and when to close. An impossible value raises ``ValueError``.

    A wrong opening is cheap: for half a second, events go over the disk. A missed one is dear: each sender
    waits for the deadline. So two failures in a row are enough: one alone may be a connection that died of
    idleness, and where one event comes a minute, no window would ever see enough calls.
    """

    window_s: float = field(default=10.0, validator=_positive)
    minimum_calls: int = field(default=10, validator=_at_least_one)
    bad_ratio: float = field(default=0.5, validator=_share)
    slow_call_s: float = field(default=0.25, validator=_positive)  # half the deadline of a call
    failures_in_a_row: int = field(default=2, validator=_at_least_one)
    first_break_s: float = field(default=0.5, validator=_positive)
    longest_break_s: float = field(default=15.0, validator=_positive)
    probes_at_once: int = field(default=1, validator=_at_least_one)
    probes_to_close: int = field(default=2, validator=_at_least_one)
    probe_timeout_s: float = field(default=5.0, validator=_positive)  # above every deadline: later is lost

    def __attrs_post_init__(self) -> None:
        if self.longest_break_s < self.first_break_s:
            raise ValueError("longest_break_s must not be below first_break_s")
        if self.probe_timeout_s < self.slow_call_s:
            raise ValueError("probe_timeout_s must not be below slow_call_s")


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
        """Count one more call; returns how many the window holds now, and how many of them are bad."""
        number = int(at_s // self._slice_s)
        if not self._slices or self._slices[-1].number != number:
            self._slices.append(_Slice(number))
        self._slices[-1].calls += 1
        self._slices[-1].bad += bad
        live = [each for each in self._slices if each.number > number - self._SLICES]
        return sum(each.calls for each in live), sum(each.bad for each in live)


@define(eq=False)
class _Period:
    """What is remembered between two changes of state. Each change begins a new one, and forgets the old."""

    window: _Window
    failures_in_a_row: int = 0
    break_ends_s: float = 0.0
    probes: list[Permit] = Factory(list)
    good_probes: int = 0


@define(eq=False)
class Permit:
    """Leave to make one call. Say once how it ended; what is said after that is ignored."""

    began_s: float
    period: _Period
    _settle: Callable[[Permit, float, CallOutcome], None]
    _settled: bool = False

    def succeeded(self, now_s: float) -> None:
        """Redis answered. That it refused a job for the job's own sake is an answer, too."""
        self._end(now_s, CallOutcome.SUCCESS)

    def failed(self, now_s: float) -> None:
        """Redis was away, or late, or could not serve anyone."""
        self._end(now_s, CallOutcome.FAILURE)

    def _end(self, now_s: float, outcome: CallOutcome) -> None:
        if not self._settled:
            self._settled = True
            self._settle(self, now_s, outcome)


class CircuitBreaker:
    """Counts how calls end, and decides who may make one.

    ``jitter`` gives numbers from 0 to 1 (``random.random``): replicas that share a Redis must not probe it in
    step. ``calls`` counts each call when it ends, a lost probe as a failure; ``transitions`` each (old, new).
    """

    def __init__(self, policy: BreakerPolicy, jitter: Callable[[], float]) -> None:
        self.state = State.CLOSED
        self.calls: dict[CallOutcome, int] = dict.fromkeys(CallOutcome, 0)
        self.transitions: Counter[tuple[State, State]] = Counter()
        self._policy = policy
        self._jitter = jitter
        self._last_reading_s = math.inf
        self._passed_s = 0.0
        self._next_break_s = policy.first_break_s
        self._period = _Period(_Window(policy.window_s))
        self._listeners: list[Listener] = []
        self._news: deque[tuple[State, State, float]] = deque()
        self._telling = False

    def listen(self, listener: Listener) -> None:
        """Have ``listener`` called once for each change from now on, in order."""
        self._listeners.append(listener)

    def permit(self, now_s: float) -> Permit | None:
        """Ask to make one call now. None means: do not make it."""
        at_s = self._read_clock(now_s)
        if at_s >= self._period_ends_s():
            if self.state is State.OPEN:
                self._change(State.HALF_OPEN, now_s)
            else:
                self._period.probes[0].failed(now_s)  # lost: nobody will say how it ended
        if not self._may_call():
            self.calls[CallOutcome.NOT_PERMITTED] += 1
            return None
        permit = Permit(at_s, self._period, self._settle)
        if self.state is State.HALF_OPEN:
            self._period.probes.append(permit)
        return permit

    def retry_in_s(self, now_s: float) -> float | None:
        """Seconds until it is worth asking again: 0 is now, None is not before a listener hears of a change.

        While every probe is out, it is the time until the oldest counts as lost; most end long before.
        """
        at_s = self._read_clock(now_s)
        if self.state is State.FORCED_OPEN:
            return None
        return 0.0 if self._may_call() else max(0.0, self._period_ends_s() - at_s)

    def force_open(self, now_s: float) -> None:
        """Permit nothing, whatever happens, until the operator says otherwise."""
        self._change(State.FORCED_OPEN, now_s)

    def force_closed(self, now_s: float) -> None:
        """Permit everything, whatever happens, until the operator says otherwise."""
        self._change(State.FORCED_CLOSED, now_s)

    def automatic(self, now_s: float) -> None:
        """End an override: where calls were flowing they go on, where none were a probe goes first."""
        if self.state is State.FORCED_OPEN:
            self._change(State.HALF_OPEN, now_s)
        elif self.state is State.FORCED_CLOSED:
            self._change(State.CLOSED, now_s)

    def _read_clock(self, now_s: float) -> float:
        """Seconds that have passed since the first reading, as the sum of the steps forward.

        A clock that is set back adds nothing, and goes on from there: no break moves out of reach.
        """
        self._passed_s += max(0.0, now_s - self._last_reading_s)
        self._last_reading_s = now_s
        return self._passed_s

    def _may_call(self) -> bool:
        if self.state is State.HALF_OPEN:
            return len(self._period.probes) < self._policy.probes_at_once
        return self.state in (State.CLOSED, State.FORCED_CLOSED)

    def _period_ends_s(self) -> float:
        """When time alone changes the state: the break is over, or the oldest probe is lost."""
        if self.state is State.OPEN:
            return self._period.break_ends_s
        if self._period.probes:
            return self._period.probes[0].began_s + self._policy.probe_timeout_s
        return math.inf

    def _settle(self, permit: Permit, now_s: float, outcome: CallOutcome) -> None:
        at_s = self._read_clock(now_s)
        if outcome is CallOutcome.SUCCESS and at_s - permit.began_s > self._policy.slow_call_s:
            outcome = CallOutcome.SLOW
        self.calls[outcome] += 1
        if permit.period is not self._period:
            return  # it tells of Redis as it was in an earlier period
        if self.state is State.CLOSED:
            self._weigh_call(at_s, now_s, outcome)
        elif self.state is State.HALF_OPEN:
            self._weigh_probe(permit, now_s, outcome)

    def _weigh_call(self, at_s: float, now_s: float, outcome: CallOutcome) -> None:
        policy, period = self._policy, self._period
        calls, bad = period.window.add(at_s, bad=outcome is not CallOutcome.SUCCESS)
        too_many_bad = calls >= policy.minimum_calls and bad >= policy.bad_ratio * calls
        period.failures_in_a_row = period.failures_in_a_row + 1 if outcome is CallOutcome.FAILURE else 0
        if too_many_bad or period.failures_in_a_row >= policy.failures_in_a_row:
            self._change(State.OPEN, now_s)

    def _weigh_probe(self, probe: Permit, now_s: float, outcome: CallOutcome) -> None:
        self._period.probes.remove(probe)
        if outcome is not CallOutcome.SUCCESS:
            self._change(State.OPEN, now_s)
            return
        self._period.good_probes += 1
        if self._period.good_probes >= self._policy.probes_to_close:
            self._change(State.CLOSED, now_s)

    def _change(self, new: State, now_s: float) -> None:
        old, self.state = self.state, new
        if new is old:
            return
        self._period = _Period(_Window(self._policy.window_s))
        if new is State.OPEN:
            # Half of a break is certain and half is chance, so none is longer than longest_break_s.
            break_s = self._next_break_s * (1 - self._jitter() / 2)
            self._period.break_ends_s = self._read_clock(now_s) + break_s
            self._next_break_s = min(2 * self._next_break_s, self._policy.longest_break_s)
        elif new is not State.HALF_OPEN:
            self._next_break_s = self._policy.first_break_s
        self.transitions[old, new] += 1
        self._tell(old, new, now_s)

    def _tell(self, old: State, new: State, now_s: float) -> None:
        """Tell every listener. A change that a listener causes is told after this one, not in between."""
        self._news.append((old, new, now_s))
        if self._telling:
            return
        self._telling = True
        try:
            while self._news:
                change = self._news.popleft()
                for listener in self._listeners:
                    listener(*change)
        finally:
            self._telling = False

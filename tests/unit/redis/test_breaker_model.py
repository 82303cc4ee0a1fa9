"""The circuit breaker against a model that remembers everything and is in no hurry.

Hypothesis asks, settles, loses and waits, in any order. The model keeps plain lists of all that happened and
says after each step what the breaker must show. All times are multiples of 1/64, so their sums are exact.
"""

from __future__ import annotations

from random import Random

from attrs import define
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from twisted.trial.unittest import SynchronousTestCase

from webhookd.redis.breaker import BreakerPolicy, CallOutcome, CircuitBreaker, Permit, State

WINDOW_S = 10.0
SLICE_S = 1.0
SLOW_S = 0.25
FIRST_BREAK_S = 0.5
PROBE_TIMEOUT_S = 5.0

policies = st.builds(
    BreakerPolicy,
    window_s=st.just(WINDOW_S),
    minimum_calls=st.integers(1, 6),
    bad_ratio=st.sampled_from([0.25, 0.5, 1.0]),
    slow_call_s=st.just(SLOW_S),
    failures_in_a_row=st.integers(1, 5),
    first_break_s=st.just(FIRST_BREAK_S),
    longest_break_s=st.sampled_from([0.5, 3.0, 15.0]),
    probes_to_close=st.integers(1, 3),
    probe_timeout_s=st.just(PROBE_TIMEOUT_S),
)


@define(eq=False)
class Call:
    """A permit, and what the model knows of it: when it was given, and between which changes of state."""

    permit: Permit
    began_s: float
    period: int
    settled: bool = False


class BreakerMachine(RuleBasedStateMachine):
    @initialize(policy=policies, seed=st.integers(0, 1000))
    def begin(self, policy: BreakerPolicy, seed: int) -> None:
        random = Random(seed)
        self.policy = policy
        self.reported: list[tuple[State, State]] = []
        self.breaker = CircuitBreaker(
            policy,
            lambda: random.randint(0, 16) / 16,
            lambda old, new: self.reported.append((old, new)),
        )
        self.now_s = 5000.0
        self.state = State.CLOSED
        self.changes: list[tuple[State, State]] = []
        self.calls: list[Call] = []
        self.counted = dict.fromkeys(CallOutcome, 0)
        self.asked = 0
        self.breaks = 0
        self.forget()

    def forget(self) -> None:
        self.results: list[tuple[float, bool, bool]] = []  # (when, failed, slow), since the last change
        self.break_ends_s = 0.0

    # What the model expects.

    def expect_change(self, new: State) -> None:
        self.changes.append((self.state, new))
        self.state = new
        self.forget()
        if new is State.OPEN:
            nominal_s = min(FIRST_BREAK_S * 2**self.breaks, self.policy.longest_break_s)
            self.breaks += 1
            break_s = self.breaker.retry_in_s(self.now_s)
            assert nominal_s / 2 <= break_s <= nominal_s
            self.break_ends_s = self.now_s + break_s
        elif new is State.CLOSED:
            self.breaks = 0

    def expect_end(self, call: Call, *, failed: bool) -> None:
        call.settled = True
        slow = self.now_s - call.began_s > SLOW_S
        outcome = CallOutcome.FAILURE if failed else CallOutcome.SLOW if slow else CallOutcome.SUCCESS
        self.counted[outcome] += 1
        if call.period != len(self.changes):
            return
        self.results.append((self.now_s, failed, slow))
        if self.state is State.CLOSED:
            if self.row_is_bad() or self.window_is_bad():
                self.expect_change(State.OPEN)
        elif self.state is State.HALF_OPEN:
            if failed or slow:
                self.expect_change(State.OPEN)
            elif len(self.results) == self.policy.probes_to_close:
                self.expect_change(State.CLOSED)

    def row_is_bad(self) -> bool:
        row = self.results[-self.policy.failures_in_a_row :]
        return len(row) == self.policy.failures_in_a_row and all(failed for _, failed, _ in row)

    def window_is_bad(self) -> bool:
        oldest_s = (self.now_s // SLICE_S) * SLICE_S - (WINDOW_S - SLICE_S)
        bad = [failed or slow for at_s, failed, slow in self.results if at_s >= oldest_s]
        return len(bad) >= self.policy.minimum_calls and sum(bad) / len(bad) >= self.policy.bad_ratio

    def probes(self) -> list[Call]:
        """The calls that are out and were begun since the last change; half-open, this is the probe."""
        return [call for call in self.calls if not call.settled and call.period == len(self.changes)]

    # What happens.

    @rule()
    def ask(self) -> None:
        permit = self.breaker.permit(self.now_s)
        self.asked += 1
        if self.state is State.OPEN and self.now_s >= self.break_ends_s:
            self.expect_change(State.HALF_OPEN)
        elif self.state is State.HALF_OPEN and self.probes():
            oldest = self.probes()[0]
            if self.now_s - oldest.began_s >= PROBE_TIMEOUT_S:
                self.expect_end(oldest, failed=True)
        expected = self.state is State.CLOSED or (self.state is State.HALF_OPEN and not self.probes())
        assert (permit is not None) == expected, (self.state, permit)
        if permit is None:
            self.counted[CallOutcome.NOT_PERMITTED] += 1
        else:
            self.calls.append(Call(permit, self.now_s, len(self.changes)))

    @precondition(lambda self: any(not call.settled for call in self.calls))
    @rule(data=st.data(), failed=st.booleans())
    def settle(self, data: st.DataObject, *, failed: bool) -> None:
        """A call ends. One that is never chosen is a lost one."""
        call = data.draw(st.sampled_from([call for call in self.calls if not call.settled]))
        self.say(call, failed=failed)
        self.expect_end(call, failed=failed)

    @precondition(lambda self: any(call.settled for call in self.calls))
    @rule(data=st.data(), failed=st.booleans())
    def settle_again(self, data: st.DataObject, *, failed: bool) -> None:
        self.say(data.draw(st.sampled_from([call for call in self.calls if call.settled])), failed=failed)

    def say(self, call: Call, *, failed: bool) -> None:
        if failed:
            call.permit.failed(self.now_s)
        else:
            call.permit.succeeded(self.now_s)

    @rule(step_s=st.sampled_from([1 / 64, SLOW_S, 17 / 64, 0.5, 1.0, 4.5, PROBE_TIMEOUT_S, 15.0, 1e9]))
    def wait(self, step_s: float) -> None:
        self.now_s += step_s

    @precondition(lambda self: self.state is State.OPEN)
    @rule()
    def wait_for_the_end_of_the_break(self) -> None:
        """Or half-open would be too rare to be tested in depth."""
        self.wait(max(0.0, self.break_ends_s - self.now_s))

    @rule(failed=st.booleans())
    def ask_and_settle_at_once(self, failed: bool) -> None:
        """Most calls take no time that matters."""
        asked = len(self.calls)
        self.ask()
        for call in self.calls[asked:]:
            self.say(call, failed=failed)
            self.expect_end(call, failed=failed)

    # What must hold after each step.

    @invariant()
    def it_says_when_to_ask_again(self) -> None:
        retry_s = self.breaker.retry_in_s(self.now_s)
        if self.state is State.OPEN:
            assert retry_s == max(0.0, self.break_ends_s - self.now_s)
        elif self.state is State.HALF_OPEN and self.probes():
            assert retry_s == max(0.0, self.probes()[0].began_s + PROBE_TIMEOUT_S - self.now_s)
        else:
            assert retry_s == 0.0

    @invariant()
    def it_is_in_the_state_that_the_model_is_in(self) -> None:
        assert self.breaker.state is self.state

    @invariant()
    def it_has_reported_each_change_once_and_in_order(self) -> None:
        assert self.reported == self.changes
        assert self.breaker.transitions.total() == len(self.changes)

    @invariant()
    def counters_add_up(self) -> None:
        assert self.breaker.calls == self.counted
        out = sum(not call.settled for call in self.calls)
        assert sum(self.breaker.calls.values()) + out == self.asked

    @invariant()
    def there_is_one_probe_at_most(self) -> None:
        assert self.state is not State.HALF_OPEN or len(self.probes()) <= 1


class BreakerModelTests(SynchronousTestCase):
    def test_it_does_what_the_model_does(self) -> None:
        run_state_machine_as_test(
            BreakerMachine,
            settings=settings(max_examples=150, stateful_step_count=60, database=None),
        )

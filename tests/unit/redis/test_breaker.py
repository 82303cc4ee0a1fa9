"""The circuit breaker, one transition at a time. Time is a number that the tests set."""

from __future__ import annotations

from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from webhookd.redis.breaker import BreakerPolicy, CallOutcome, CircuitBreaker, Permit, State

BREAK_S = 1.0
SLOW_S = 0.25
A_SLOW_CALL_S = 0.375


class BreakerCase(SynchronousTestCase):
    """A breaker with a break of one second, no jitter, and a clock that the test moves."""

    def setUp(self) -> None:
        self.now_s = 1000.0
        self.changes: list[tuple[State, State]] = []
        self.set_up_breaker()

    def set_up_breaker(self, jitter: float = 0.0, **policy: Any) -> None:
        values: dict[str, Any] = {"first_break_s": BREAK_S, "longest_break_s": 8.0, "slow_call_s": SLOW_S}
        self.changes.clear()
        self.breaker = CircuitBreaker(
            BreakerPolicy(**(values | policy)),
            lambda: jitter,
            lambda old, new: self.changes.append((old, new)),
        )

    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds

    def permitted(self) -> Permit:
        permit = self.breaker.permit(self.now_s)
        assert permit is not None, f"not permitted in {self.breaker.state}"
        return permit

    def assert_refused(self) -> None:
        self.assertIsNone(self.breaker.permit(self.now_s))

    def assert_state(self, state: State) -> None:
        self.assertIs(self.breaker.state, state)

    def calls_succeed(self, times: int = 1) -> None:
        for _ in range(times):
            self.permitted().succeeded(self.now_s)

    def calls_fail(self, times: int = 1) -> None:
        for _ in range(times):
            self.permitted().failed(self.now_s)

    def calls_are_slow(self, times: int = 1) -> None:
        for _ in range(times):
            permit = self.permitted()
            self.pass_time(A_SLOW_CALL_S)
            permit.succeeded(self.now_s)

    def open(self) -> None:
        self.calls_fail(2)
        self.assert_state(State.OPEN)

    def half_open(self) -> Permit:
        """Open, and let the break pass; returns the first probe."""
        self.open()
        self.pass_time(BREAK_S)
        return self.permitted()


class ClosedTests(BreakerCase):
    def test_it_begins_closed_and_permits_all_at_once(self) -> None:
        self.assert_state(State.CLOSED)
        self.assertEqual(len({self.permitted() for _ in range(100)}), 100)
        self.assertEqual(self.breaker.retry_in_s(self.now_s), 0.0)

    def test_one_failure_does_not_open_it(self) -> None:
        self.calls_fail()
        self.assert_state(State.CLOSED)

    def test_two_failures_in_a_row_open_it_however_far_apart(self) -> None:
        self.calls_fail()
        self.pass_time(3600)
        self.calls_fail()
        self.assert_state(State.OPEN)

    def test_a_success_between_two_failures_breaks_the_run(self) -> None:
        for _ in range(4):
            self.calls_fail()
            self.calls_succeed()
        self.assert_state(State.CLOSED)

    def test_a_slow_success_breaks_the_run_too(self) -> None:
        self.calls_fail()
        self.calls_are_slow()
        self.calls_fail()
        self.assert_state(State.CLOSED)

    def test_the_share_of_failures_opens_it_once_there_are_enough_calls(self) -> None:
        for _ in range(4):
            self.calls_succeed()
            self.calls_fail()
        self.calls_succeed()
        self.assert_state(State.CLOSED)
        self.calls_fail()  # the tenth call, the fifth failure
        self.assert_state(State.OPEN)

    def test_a_share_of_failures_below_the_ratio_does_not_open_it(self) -> None:
        for _ in range(50):
            self.calls_succeed(2)
            self.calls_fail()
        self.assert_state(State.CLOSED)

    def test_the_share_of_slow_calls_opens_it_although_all_succeed(self) -> None:
        self.calls_succeed(5)
        self.calls_are_slow(4)
        self.assert_state(State.CLOSED)
        self.calls_are_slow()
        self.assert_state(State.OPEN)

    def test_a_call_of_exactly_the_limit_is_not_slow(self) -> None:
        for _ in range(20):
            permit = self.permitted()
            self.pass_time(SLOW_S)
            permit.succeeded(self.now_s)
        self.assert_state(State.CLOSED)

    def test_failed_and_slow_calls_add_up(self) -> None:
        self.calls_are_slow(2)
        self.calls_succeed(5)
        self.calls_fail()
        self.calls_are_slow()
        self.assert_state(State.CLOSED)
        self.calls_fail()
        self.assert_state(State.OPEN)

    def test_the_window_forgets_what_is_as_old_as_it_is_long(self) -> None:
        self.set_up_breaker(minimum_calls=2, failures_in_a_row=100)
        self.calls_fail()
        self.pass_time(10.0)
        self.calls_fail()
        self.assert_state(State.CLOSED)
        self.pass_time(9.0)
        self.calls_fail()
        self.assert_state(State.OPEN)

    def test_the_window_holds_one_call_a_second_for_all_its_seconds(self) -> None:
        self.set_up_breaker(minimum_calls=10, failures_in_a_row=100)
        for _ in range(9):
            self.calls_fail()
            self.pass_time(1.0)
        self.assert_state(State.CLOSED)
        self.calls_fail()
        self.assert_state(State.OPEN)

    def test_the_window_slides(self) -> None:
        for _ in range(100):  # ten calls in ten seconds are never reached
            self.pass_time(2.0)
            self.calls_are_slow()
        self.assert_state(State.CLOSED)


class OpenTests(BreakerCase):
    def test_it_permits_nothing_until_the_break_is_over(self) -> None:
        self.open()
        self.assert_refused()
        self.pass_time(BREAK_S - 0.0625)
        self.assert_refused()
        self.assertEqual(self.breaker.retry_in_s(self.now_s), 0.0625)
        self.assert_state(State.OPEN)

    def test_the_first_question_after_the_break_is_a_probe(self) -> None:
        self.open()
        self.pass_time(BREAK_S)
        self.assertEqual(self.breaker.retry_in_s(self.now_s), 0.0)
        self.assert_state(State.OPEN)  # looking changes nothing
        self.permitted()
        self.assert_state(State.HALF_OPEN)

    def test_late_results_of_calls_begun_before_do_not_lengthen_the_break(self) -> None:
        late = [self.permitted() for _ in range(20)]
        self.open()
        for permit in late:
            permit.failed(self.now_s)
        self.assertEqual(self.breaker.retry_in_s(self.now_s), BREAK_S)
        self.assertEqual(len(self.changes), 1)

    def test_jitter_takes_up_to_half_of_the_break_away(self) -> None:
        for jitter, expected_s in ((0.0, 1.0), (0.5, 0.75), (1.0, 0.5)):
            self.set_up_breaker(jitter=jitter)
            self.open()
            self.assertEqual(self.breaker.retry_in_s(self.now_s), expected_s)

    def test_breaks_double_up_to_the_longest_while_probes_fail(self) -> None:
        self.open()
        breaks_s = []
        for _ in range(6):
            breaks_s.append(self.breaker.retry_in_s(self.now_s))
            self.pass_time(breaks_s[-1])
            self.calls_fail()
        self.assertEqual(breaks_s, [1.0, 2.0, 4.0, 8.0, 8.0, 8.0])

    def test_the_break_is_short_again_after_it_was_closed(self) -> None:
        self.half_open().failed(self.now_s)
        self.pass_time(2 * BREAK_S)
        self.calls_succeed(2)
        self.assert_state(State.CLOSED)
        self.open()
        self.assertEqual(self.breaker.retry_in_s(self.now_s), BREAK_S)


class HalfOpenTests(BreakerCase):
    def test_one_probe_at_a_time(self) -> None:
        probe = self.half_open()
        self.assert_refused()
        probe.succeeded(self.now_s)
        self.permitted()
        self.assert_refused()

    def test_enough_good_probes_close_it(self) -> None:
        self.half_open().succeeded(self.now_s)
        self.assert_state(State.HALF_OPEN)
        self.calls_succeed()
        self.assert_state(State.CLOSED)

    def test_a_failed_probe_opens_it(self) -> None:
        self.half_open().failed(self.now_s)
        self.assert_state(State.OPEN)
        self.assert_refused()

    def test_a_slow_probe_opens_it(self) -> None:
        probe = self.half_open()
        self.pass_time(A_SLOW_CALL_S)
        probe.succeeded(self.now_s)
        self.assert_state(State.OPEN)

    def test_good_probes_do_not_carry_over_to_the_next_try(self) -> None:
        self.half_open().succeeded(self.now_s)
        self.calls_fail()
        self.pass_time(2 * BREAK_S)
        self.calls_succeed()
        self.assert_state(State.HALF_OPEN)

    def test_a_lost_probe_counts_as_failed_after_its_time(self) -> None:
        lost = self.half_open()
        self.pass_time(4.75)
        self.assert_refused()
        self.assertEqual(self.breaker.retry_in_s(self.now_s), 0.25)
        self.assert_state(State.HALF_OPEN)
        self.pass_time(0.25)
        self.assert_refused()
        self.assert_state(State.OPEN)
        self.assertEqual(self.breaker.retry_in_s(self.now_s), 2 * BREAK_S)

        failures = self.breaker.calls[CallOutcome.FAILURE]
        lost.succeeded(self.now_s)  # it turns up after all: too late to say anything
        self.assertEqual(self.breaker.calls[CallOutcome.FAILURE], failures)
        self.assertEqual(self.breaker.calls[CallOutcome.SUCCESS], 0)

    def test_calls_begun_while_it_was_closed_are_no_probes(self) -> None:
        before = [self.permitted(), self.permitted()]
        self.half_open()
        for permit in before:
            permit.succeeded(self.now_s)
        self.assert_state(State.HALF_OPEN)


class CounterTests(BreakerCase):
    def test_every_outcome_is_there_at_zero(self) -> None:
        self.assertEqual(self.breaker.calls, dict.fromkeys(CallOutcome, 0))

    def test_each_call_is_counted_once_by_how_it_ended(self) -> None:
        late = self.permitted()
        self.calls_succeed(3)
        self.calls_are_slow()
        self.open()
        self.assert_refused()
        late.failed(self.now_s)  # slow, too, and of an earlier period: one failure
        self.assertEqual(
            self.breaker.calls,
            {
                CallOutcome.SUCCESS: 3,
                CallOutcome.SLOW: 1,
                CallOutcome.FAILURE: 3,
                CallOutcome.NOT_PERMITTED: 1,
            },
        )

    def test_a_permit_counts_once_however_often_it_is_settled(self) -> None:
        permit = self.permitted()
        permit.succeeded(self.now_s)
        permit.failed(self.now_s)
        permit.failed(self.now_s)
        self.assert_state(State.CLOSED)
        self.assertEqual(sum(self.breaker.calls.values()), 1)


class ChangeTests(BreakerCase):
    def test_each_change_is_reported_once_and_in_order(self) -> None:
        self.half_open().succeeded(self.now_s)
        self.calls_succeed()
        self.assertEqual(
            self.changes,
            [
                (State.CLOSED, State.OPEN),
                (State.OPEN, State.HALF_OPEN),
                (State.HALF_OPEN, State.CLOSED),
            ],
        )
        self.assertEqual(self.breaker.transitions, dict.fromkeys(self.changes, 1))

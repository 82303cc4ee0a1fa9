"""The histogram that the working parts keep."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from webhookd.histogram import BATCH_SIZES, DURATIONS_S, Histogram


class HistogramTests(SynchronousTestCase):
    def test_it_begins_with_zeros(self) -> None:
        histogram = Histogram((1.0, 2.0))
        self.assertEqual((histogram.buckets, histogram.sum), ([0, 0, 0], 0.0))

    def test_a_bound_is_the_upper_end_of_its_bucket(self) -> None:
        histogram = Histogram((1.0, 2.0))
        for value in (0.5, 1.0, 1.5, 2.0, 2.5):
            histogram.observe(value)
        self.assertEqual((histogram.buckets, histogram.sum), ([2, 2, 1], 7.5))

    @given(st.lists(st.floats(0, 10)))
    def test_each_observation_is_in_one_bucket(self, values: list[float]) -> None:
        histogram = Histogram(DURATIONS_S)
        for value in values:
            histogram.observe(value)
        self.assertEqual(sum(histogram.buckets), len(values))
        for number, bound in enumerate(DURATIONS_S, start=1):
            self.assertEqual(sum(histogram.buckets[:number]), sum(value <= bound for value in values), bound)
        self.assertAlmostEqual(histogram.sum, sum(values))

    def test_the_bounds_hold_the_limits_that_alerts_ask_for(self) -> None:
        self.assertLessEqual({0.05, 5.0}, set(DURATIONS_S))  # the promise, and when Chatwoot gives up
        self.assertLessEqual({1, 128}, set(BATCH_SIZES))  # alone, and the largest call

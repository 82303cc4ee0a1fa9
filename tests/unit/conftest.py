"""Fail a test that logs a failure, as trial does for its own test cases: also for plain functions."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from twisted.logger import ILogObserver, LogEvent, globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import provider


@pytest.fixture(autouse=True)
def logged_failures(request: pytest.FixtureRequest) -> Iterator[list[LogEvent]]:
    """The failures logged by the test so far; one that expects some looks at them and clears the list.

    Trial's test cases see to it themselves, under pytest too, and have flushLoggedErrors.
    """
    failures: list[LogEvent] = []
    if isinstance(request.instance, SynchronousTestCase):
        yield failures
        return

    @provider(ILogObserver)
    def observe(event: LogEvent) -> None:
        if "log_failure" in event:
            failures.append(event)

    globalLogPublisher.addObserver(observe)
    yield failures
    globalLogPublisher.removeObserver(observe)
    assert [event["log_failure"] for event in failures] == []

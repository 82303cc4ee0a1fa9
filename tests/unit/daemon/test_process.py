"""The process's signals, and its limit of open files."""

from __future__ import annotations

import resource
import signal
import sys
from collections.abc import Callable
from typing import Any, cast

from twisted.internet.testing import MemoryReactorClock
from twisted.trial.unittest import SynchronousTestCase

from webhookd.daemon.process import end_on_signals, max_connections, raise_descriptor_limit
from webhookd.http import MAX_CONNECTIONS
from webhookd.reactor import IReactor


class DescriptorTests(SynchronousTestCase):
    def test_senders_get_what_the_daemon_does_not_need_itself(self) -> None:
        for descriptors, connections in ((64, 32), (1024, 824), (10**6, MAX_CONNECTIONS)):
            self.assertEqual(max_connections(descriptors), connections)

    def test_the_limit_is_raised_as_far_as_it_goes(self) -> None:
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))

        raised = raise_descriptor_limit()

        self.assertEqual(resource.getrlimit(resource.RLIMIT_NOFILE), (limits[1], limits[1]))
        self.assertEqual(raised, sys.maxsize if limits[1] == resource.RLIM_INFINITY else limits[1])


class SignalTests(SynchronousTestCase):
    def test_repeated_signals_stop_the_daemon_once(self) -> None:
        class Reactor(MemoryReactorClock):
            stops = 0

            def callFromThread(self, function: Callable[[], None], *_arguments: Any, **_options: Any) -> None:
                function()

            def stop(self) -> None:
                self.stops += 1

        for number in (signal.SIGTERM, signal.SIGINT):
            self.addCleanup(signal.signal, number, signal.getsignal(number))
        before = signal.getsignal(signal.SIGTERM)
        reactor = Reactor()
        end_on_signals(cast(IReactor, reactor))
        self.assertIs(signal.getsignal(signal.SIGTERM), before)

        for function, arguments, options in reactor.whenRunningHooks:
            function(*arguments, **options)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)

        self.assertEqual(reactor.stops, 1)

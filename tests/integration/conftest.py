"""Fixtures of the integration tests: real servers and the installed daemon."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, Protocol

import pytest

from tests.support.daemon import Daemon, Replicas
from tests.support.process import ReservedPort
from tests.support.servers import RedisServer


@pytest.fixture
def redis(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    """A Redis for one test: Debian's, or the flavour of the test's parameter.

    ``@pytest.mark.parametrize("redis", FLAVOURS, indirect=True)`` runs a test on each flavour.
    """
    with RedisServer(getattr(request, "param", "redis-7.0")) as server:
        yield server


class StartDaemon(Protocol):
    """``start_daemon(*options, environ=..., directory=...)``: a running daemon, which the test may stop."""

    def __call__(self, *options: str, **settings: Any) -> Daemon: ...


class StartReplicas(Protocol):
    """``start_replicas(count, *options, environ=...)``: that many running daemons."""

    def __call__(self, count: int, *options: str, **settings: Any) -> Replicas: ...


@pytest.fixture
def start_daemon() -> Iterator[StartDaemon]:
    """Start daemons that end with the test. If the test fails, pytest shows their logs."""
    with ExitStack() as stack:

        def start(*options: str, **settings: Any) -> Daemon:
            daemon = stack.enter_context(Daemon(*options, **settings))
            stack.callback(_show_log, daemon)
            return daemon

        yield start


@pytest.fixture
def start_replicas() -> Iterator[StartReplicas]:
    """Start replicas that end with the test. If the test fails, pytest shows their logs."""
    with ExitStack() as stack:

        def start(count: int, *options: str, **settings: Any) -> Replicas:
            replicas = stack.enter_context(Replicas(count, *options, **settings))
            for daemon in replicas:
                stack.callback(_show_log, daemon)
            return replicas

        yield start


def _show_log(daemon: Daemon) -> None:
    print(f"--- webhookd on port {daemon.port}:\n{daemon.log}")


@pytest.fixture
def dead_port() -> Iterator[int]:
    """A port that refuses connections."""
    with ReservedPort() as port:
        yield port.number

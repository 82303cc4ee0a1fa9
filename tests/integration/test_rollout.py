"""Replicas come and go under load. No sender may notice.

``make rollout`` runs these with the promised load, ``make test-all`` with less.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.bullmq import Queue
from tests.support.daemon import Daemon
from tests.support.nginx import Load, Nginx, assert_each_is_one_job
from tests.support.servers import RedisServer
from tests.support.webhooks import connected, post, webhook
from webhookd.bullmq.keys import QueueKeys

IS_FULL = os.environ.get("WEBHOOKD_ROLLOUT") == "full"
PER_SECOND = 300 if IS_FULL else 100
ROUNDS = 5 if IS_FULL else 1
MANY = 5 if IS_FULL else 3

pytestmark = pytest.mark.timeout(600)


class Fleet:
    """Replicas with one spool root, behind one nginx."""

    def __init__(self, stack: ExitStack, redis: RedisServer, spool: Path, count: int) -> None:
        self._stack = stack
        self._options = "--redis", redis.url, "--spool", str(spool), "--drain-timeout", "1"
        self.replicas: list[Daemon] = []
        self._launch(count)
        self.nginx = stack.enter_context(Nginx(*self.ports))
        stack.callback(lambda: print(f"--- nginx:\n{self.nginx.log[-10_000:]}"))

    @property
    def ports(self) -> list[int]:
        return [replica.port for replica in self.replicas]

    def _launch(self, count: int) -> None:
        new = [self._stack.enter_context(Daemon(*self._options)) for _ in range(count)]
        self.replicas += [connected(replica) for replica in new]

    def grow(self, count: int) -> None:
        """Start replicas, and add them to nginx when they are ready."""
        self._launch(count - len(self.replicas))
        self.nginx.scale(*self.ports)

    def shrink(self, count: int) -> list[Daemon]:
        """Stop the last replicas, and remove them from nginx later, as Docker does. Return them."""
        removed, self.replicas = self.replicas[count:], self.replicas[:count]
        for replica in removed:
            assert replica.stop() == 0
        self.nginx.scale(*self.ports)
        return removed


def assert_unnoticed(redis: RedisServer, load: Load) -> None:
    """Check that each event was acknowledged, and is one job."""
    assert load.failed == []
    assert_each_is_one_job(Queue(redis.client(), QueueKeys("bull", "chatwoot")), load.accepted)


def test_a_rolling_restart_and_a_kill_cost_nothing(redis: RedisServer, tmp_path: Path) -> None:
    with ExitStack() as stack:
        fleet = Fleet(stack, redis, tmp_path, 3)
        with Load(fleet.nginx.port, PER_SECOND) as load:
            load.wait_for(PER_SECOND)
            for _ in range(ROUNDS):
                for replica in fleet.replicas:
                    assert replica.stop() == 0
                    connected(replica.start())
                fleet.replicas[0].kill()
                load.wait_for(PER_SECOND)
                connected(fleet.replicas[0].start())
            load.wait_for(PER_SECOND)

    assert_unnoticed(redis, load)


@pytest.mark.slow
def test_new_replicas_get_their_share_and_removed_ones_are_not_missed(
    redis: RedisServer, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        fleet = Fleet(stack, redis, tmp_path, 1)
        with Load(fleet.nginx.port, PER_SECOND) as load:
            load.wait_for(PER_SECOND)
            fleet.grow(MANY)
            load.wait_for(PER_SECOND)
            fleet.shrink(2)
            load.wait_for(PER_SECOND)
        answered = {request["replica"] for request in fleet.nginx.requests}

    assert_unnoticed(redis, load)
    assert len({replica for replica in answered if ", " not in replica}) == MANY


@pytest.mark.slow
def test_the_spools_of_removed_replicas_are_adopted(redis: RedisServer, tmp_path: Path) -> None:
    with ExitStack() as stack:
        fleet = Fleet(stack, redis, tmp_path, MANY)
        with Load(fleet.nginx.port, PER_SECOND) as load:
            load.wait_for(PER_SECOND)
            redis.suspend()
            load.wait_for(2 * PER_SECOND)
            removed = fleet.shrink(2)
        assert "events stay in the spool" in "".join(replica.log for replica in removed)
        redis.resume()
        if not IS_FULL:
            fleet.grow(MANY)  # a new replica adopts at once, the others look for orphans twice a minute

        assert_unnoticed(redis, load)
        assert post(fleet.nginx.port, webhook()).status == 202

"""After an outage of Redis, the spool becomes empty, although the senders never pause."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from threading import Event

from tests.integration.conftest import StartDaemon
from tests.support.bullmq import Queue
from tests.support.process import wait_until
from tests.support.servers import RedisServer
from tests.support.webhooks import connected, outcome, post, webhook
from webhookd.bullmq.keys import QueueKeys

_SENDERS = 8
_FIRST_OF_EACH = 100_000
_OUTAGE_S = 0.5
_PATIENCE_S = 60.0


def test_events_go_to_redis_again_under_load(redis: RedisServer, start_daemon: StartDaemon) -> None:
    daemon = connected(start_daemon("--redis", redis.url))
    ended = Event()
    latest: dict[int, str] = {}
    taken: list[str] = []

    def send(sender: int) -> None:
        for number in count(_FIRST_OF_EACH * (sender + 1)):
            if ended.is_set():
                return
            event = webhook(number)
            latest[sender] = outcome(post(daemon.port, event))[1]
            taken.append(event.job_id)

    with ThreadPoolExecutor(_SENDERS) as pool:
        senders = [pool.submit(send, number) for number in range(_SENDERS)]
        try:
            redis.suspend()
            wait_until(lambda: set(latest.values()) == {"spooled"}, "all events go to the spool")
            time.sleep(_OUTAGE_S)  # so that many are there
            redis.resume()
            wait_until(lambda: set(latest.values()) == {"queued"}, "all events go to Redis", _PATIENCE_S)
        finally:
            ended.set()
    for each in senders:
        each.result()

    with redis.client() as client:
        assert sorted(Queue(client, QueueKeys("bull", "chatwoot")).held_ids()) == sorted(taken)

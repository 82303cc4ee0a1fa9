"""A worker for webhookd's jobs. It processes each message from a customer, and ignores everything else.

    REDIS_URL=redis://127.0.0.1:6379/0 python worker.py

WEBHOOK_QUEUE and WEBHOOK_PREFIX are those of webhookd. On SIGTERM or Ctrl-C it finishes its jobs, and exits.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import redis.asyncio
from bullmq import Job, Worker

REDIS_URL = os.environ.get("REDIS_URL", "redis://127.0.0.1:6379/0")
QUEUE = os.environ.get("WEBHOOK_QUEUE", "chatwoot")
PREFIX = os.environ.get("WEBHOOK_PREFIX", "bull")
REMEMBERED_FOR_S = 7 * 24 * 3600
"""Longer than Chatwoot, webhookd or a person may repeat an event."""

Event = dict[str, Any]

log = logging.getLogger("worker")


async def handle(message: Event) -> None:
    """Do your own work here. It may raise: BullMQ retries the job."""
    log.info("message %s in conversation %s: here is your work", message["id"], message["conversation"]["id"])


def event_of(job: Job) -> Event:
    """Return the event of a job, for either ``--job-data`` of webhookd."""
    is_envelope = "payload" in job.data and "deliveryId" in job.data
    event: Event = job.data["payload"] if is_envelope else job.data
    return event


def is_from_customer(event: Event) -> bool:
    """Return True if a customer wrote the message.

    Chatwoot also sends an event for each answer of an agent, a bot or its API: these are ``outgoing``. A
    worker that answers them answers itself, forever. Notes between agents are ``private``.
    """
    is_message = event["event"] == "message_created"
    return is_message and event["message_type"] == "incoming" and not event["private"]


class Processor:
    """Processes each customer's message once: Redis remembers which were done."""

    def __init__(self, client: redis.asyncio.Redis) -> None:
        self._client = client

    async def __call__(self, job: Job, token: str) -> str:
        event = event_of(job)
        return await self._once(job.id, lambda: handle(event)) if is_from_customer(event) else "ignored"

    async def _once(self, job_id: str, work: Callable[[], Awaitable[None]]) -> str:
        """Do the work, unless it was done before.

        The mark is written after the work: a crash in between repeats the work. If the mark came first, the
        crash would lose a message. With a database, write both in one transaction: then it is once.
        """
        mark = f"done:{job_id}"
        if await self._client.exists(mark):
            return "was done before"
        await work()
        await self._client.set(mark, "1", ex=REMEMBERED_FOR_S)
        return "done"


async def main() -> None:
    """Process jobs until a signal arrives."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    end = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, end.set)

    async with redis.asyncio.from_url(REDIS_URL) as client:
        options = {"connection": REDIS_URL, "prefix": PREFIX, "concurrency": 8}
        worker = Worker(QUEUE, Processor(client), options)
        worker.on("completed", lambda job, result: log.info("%s: %s", job.id, result))
        worker.on("failed", lambda job, error: log.error("%s: %s", job.id, error))
        worker.on("error", lambda error, *_: log.error("%s", error))
        log.info("waiting for jobs of the queue %s", QUEUE)
        await end.wait()
        await worker.close()  # takes no further jobs, and finishes those in progress


if __name__ == "__main__":
    asyncio.run(main())

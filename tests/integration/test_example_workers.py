"""The workers of docs/worker do each message of a customer once, and ignore all other jobs."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.integration.conftest import StartDaemon
from tests.support.process import ChildProcess, MissingTool, node, wait_until
from tests.support.servers import RedisServer
from tests.support.webhooks import Webhook, connected, outcome, post
from webhookd.samples import SAMPLES

EXAMPLES = Path(__file__).parents[2] / "docs" / "worker"

FROM_CUSTOMERS = {"message_created", "message_created.id_collides_with_conversation"}
"""The samples for a worker. All others are updates, private notes, and our own answers."""

JOBS = {sample.job_id: sample for sample in SAMPLES.values()}
"""One sample for each job: two of them are the same event."""

RESULTS = {f"{job_id}: {'done' if one.name in FROM_CUSTOMERS else 'ignored'}" for job_id, one in JOBS.items()}


class ExampleWorker(ChildProcess):
    """One of the examples, started as its readme says."""

    name = "example"

    def __init__(self, language: str, redis: RedisServer) -> None:
        super().__init__()
        self._language = language
        self._redis = redis

    def argv(self) -> Sequence[str]:
        if self._language == "python":
            return [sys.executable, str(EXAMPLES / "python" / "worker.py")]
        if not (EXAMPLES / "node" / "node_modules").exists():
            raise MissingTool("run `make docs/worker/node/node_modules/.package-lock.json`")
        return [node(), str(EXAMPLES / "node" / "worker.js")]

    def environ(self) -> Mapping[str, str]:
        return {**super().environ(), "PATH": os.environ["PATH"], "REDIS_URL": self._redis.url}

    def is_ready(self) -> bool:
        return "waiting for jobs of the queue chatwoot\n" in self.log

    def results(self) -> list[str]:
        """Return the result of each job, in order."""
        return [line for line in self.log.splitlines() if line.startswith("chatwoot.")]

    def works(self) -> list[str]:
        """Return the work for each message."""
        return [line for line in self.log.splitlines() if line.startswith("message ")]


@pytest.mark.parametrize("language", ["node", "python"])
def test_it_does_each_message_of_a_customer_once_and_ignores_all_others(
    language: str, redis: RedisServer, start_daemon: StartDaemon
) -> None:
    # Redis forgets jobs at once, so the same event becomes a new job. Usually this takes an hour.
    forgetful = ["--redis", redis.url, "--dedup-ttl", "0", "--lock-ttl", "1"]
    forgetful += ["--job-options", '{"removeOnComplete": true}']
    daemon = connected(start_daemon(*forgetful))
    other_daemon = connected(start_daemon(*forgetful, "--job-data", "envelope"))
    with ExampleWorker(language, redis) as worker:
        for sample in JOBS.values():
            post(daemon.port, Webhook.from_sample(sample))
        wait_until(lambda: len(worker.results()) == len(RESULTS), "all jobs are finished")
        assert set(worker.results()) == RESULTS

        message = Webhook.from_sample(SAMPLES["message_created"])
        assert outcome(post(other_daemon.port, message)) == (202, "queued")
        wait_until(lambda: len(worker.results()) > len(RESULTS), "the job that comes again is finished")
        assert worker.results()[-1] == f"{message.job_id}: was done before"
        assert len(worker.works()) == len(FROM_CUSTOMERS)
        assert worker.stop() == 0

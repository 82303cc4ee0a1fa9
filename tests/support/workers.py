"""Real BullMQ workers: Node processes that finish jobs, and report each (tests/node/worker.js)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from attrs import frozen

from .process import ChildProcess, node

LINES = ("bullmq5", "bullmq6")
"""The versions of BullMQ that users run."""

_SCRIPT = Path(__file__).parents[1] / "node" / "worker.js"


@frozen
class Processed:
    """One call of a worker's processor: the job, and the digest of its ``data`` in Redis."""

    id: str
    name: str
    sha256: str


class Worker(ChildProcess):
    """One Node process with a BullMQ Worker. `stop` lets it finish its jobs."""

    name = "worker"

    def __init__(
        self,
        line: str,
        redis_port: int,
        *,
        queue: str = "chatwoot",
        prefix: str = "bull",
        concurrency: int = 8,
    ) -> None:
        super().__init__()
        self._arguments = [line, str(redis_port), prefix, queue, str(concurrency)]

    def argv(self) -> Sequence[str]:
        return [node(), str(_SCRIPT), *self._arguments]

    def is_ready(self) -> bool:
        """Return true if it waits for jobs."""
        return self.log.startswith("ready\n")

    @property
    def processed(self) -> list[Processed]:
        """The calls so far, in order."""
        lines = self.log.split("\n")[1:-1]
        return [Processed(**json.loads(line)) for line in lines]

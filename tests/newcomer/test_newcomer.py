"""A newcomer's path: from a clean copy of the repository to the first job that a worker has finished.

``make newcomer`` runs it, separately from the other tests, because it creates a virtual environment. It takes
half a minute, or longer to download packages.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.process import ReservedPort, wait_until
from tests.support.reader import Running, Terminal, commands, copy_repository

INSTALLS_IN_S = 300.0
SEND = ".venv/bin/webhookd send"
COUNT = ".venv/bin/webhookd jobs counts"
DOCTOR = ".venv/bin/webhookd doctor"
WORK = "REDIS_URL=redis://127.0.0.1:$(cat var/embedded/port)/0 node docs/worker/node/worker.js"


@pytest.mark.timeout(600)
def test_from_a_clean_copy_to_the_first_job_that_is_done(tmp_path: Path) -> None:
    assert {"make run", SEND, COUNT, WORK} <= set(commands("README.md"))
    copy = copy_repository(tmp_path / "webhookd")
    with ExitStack() as stack:
        port = ReservedPort()
        stack.callback(port.close)
        environ = {"PORT": str(port.number), "WEBHOOK_SECRET": "a newcomer's", "REDIS_URL": "embedded:"}
        terminal = Terminal(copy, environ, {"3001": str(port.number)})

        daemon = Running(terminal, "make run", "connected to Redis")
        stack.callback(daemon.close)
        daemon.launch()
        daemon.wait_ready(INSTALLS_IN_S)

        job_id = terminal.enter(SEND).split()[2]
        assert json.loads(terminal.enter(f"{COUNT} --json"))["chatwoot"]["waiting"] == 1
        assert job_id in terminal.enter(f".venv/bin/webhookd jobs show {job_id}")

        terminal.enter("npm --prefix docs/worker/node ci --prefer-offline --no-audit --no-fund")
        with Running(terminal, WORK, "waiting for jobs") as worker:
            wait_until(lambda: f"{job_id}: done\n" in worker.log, "the worker does the job")
            assert worker.stop() == 0
        assert json.loads(terminal.enter(f"{COUNT} --json"))["chatwoot"]["completed"] == 1

        levels = json.loads(terminal.enter(f"{DOCTOR} --strict --json"))["levels"]
        assert (levels["warn"], levels["fail"]) == (0, 0), levels
        daemon.stop()

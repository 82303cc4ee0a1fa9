"""The daemon under test: ``twistd webhookd`` as a child process.

It is installed from the built wheel, and is never the checkout. ``make wheel`` builds and installs it.
``WEBHOOKD_TEST_TWISTD`` names the ``twistd`` of another installation.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Self

from .http import Response, get
from .process import ChildProcess, MissingTool, Resource

_REPOSITORY = Path(__file__).parents[2]


def installed_twistd() -> Path:
    """Return the path of the ``twistd`` whose webhookd is tested."""
    path = Path(os.environ.get("WEBHOOKD_TEST_TWISTD", _REPOSITORY / ".venv" / "bin" / "twistd"))
    if not path.exists():
        raise MissingTool(f"there is no {path}: run `make wheel`")
    return path


class Daemon(ChildProcess):
    """One webhookd, with its own working directory, which holds its ``var/``.

    ``options`` are its command line, and ``environ`` is added to its environment. It listens on `port` on
    loopback, also after a restart. It has an ops endpoint only if the options name one.
    """

    name = "webhookd"
    host = "127.0.0.1"
    patience: Mapping[str, str] = {"WEBHOOK_REDIS_DEADLINE": "1.5"}
    """The longest deadline: on a busy machine the default spools or refuses what a test expects in Redis."""

    def __init__(
        self,
        *options: str,
        environ: Mapping[str, str] | None = None,
        directory: Path | None = None,
        twistd: Path | None = None,
    ) -> None:
        super().__init__(directory)
        self.options = options
        self.twistd = twistd or installed_twistd()
        self.port = self.reserve_port()
        self._environ = environ or {}

    @property
    def url(self) -> str:
        """The URL that it serves, without a slash at the end."""
        return f"http://{self.host}:{self.port}"

    @property
    def webhook_url(self) -> str:
        """The URL for Chatwoot's webhooks."""
        return f"{self.url}/webhook/chatwoot"

    def argv(self) -> Sequence[str]:
        endpoint = ["--interface", self.host, "--port", str(self.port), "--ops-endpoint", "off"]
        return [str(self.twistd), "-n", "--pidfile=", "webhookd", *endpoint, *self.options]

    def environ(self) -> Mapping[str, str]:
        return {**super().environ(), **self.patience, **self._environ}

    def is_ready(self) -> bool:
        """Return true if ``/health/live`` answers."""
        try:
            return self.get("/health/live").status == 200
        except (OSError, HTTPException):
            return False

    def get(self, path: str) -> Response:
        """Fetch one path."""
        return get(self.port, path)


class Replicas(Resource):
    """Several daemons with the same options, each in its own directory."""

    def __init__(self, count: int, *options: str, environ: Mapping[str, str] | None = None) -> None:
        self.daemons = [Daemon(*options, environ=environ) for _ in range(count)]

    def __iter__(self) -> Iterator[Daemon]:
        return iter(self.daemons)

    def __getitem__(self, index: int) -> Daemon:
        return self.daemons[index]

    def __len__(self) -> int:
        return len(self.daemons)

    def start(self) -> Self:
        """Start all at the same time, and return when all are ready."""
        for daemon in self.daemons:
            daemon.launch()
        for daemon in self.daemons:
            daemon.wait_ready()
        return self

    def close(self) -> None:
        for daemon in self.daemons:
            daemon.close()

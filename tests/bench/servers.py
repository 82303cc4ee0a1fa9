"""The servers under test and their helpers: child processes, each on its core."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from tests.support.daemon import Daemon
from tests.support.process import ChildProcess, MissingTool, find_tool, is_listening
from tests.support.servers import RedisServer

from .machine import pinned

_HERE = Path(__file__).parent
QUEUE = "chatwoot"


class Server(Protocol):
    """A process that accepts webhooks."""

    name: str
    port: int

    @property
    def pid(self) -> int:
        """The process id."""

    def holds_jobs(self) -> bool:
        """Return True while answered events are not yet in Redis."""


class BenchRedis(RedisServer):
    """Debian's Redis, the same for all, without persistence: the bench does not measure its disk."""

    def __init__(self, core: int) -> None:
        super().__init__(config=["maxmemory-policy noeviction"])
        self._core = core

    def argv(self) -> Sequence[str]:
        return pinned(self._core, super().argv())

    def empty(self) -> None:
        """Delete all jobs and locks."""
        with self.client(socket_timeout=60.0) as client:
            client.flushall()


class Webhookd(Daemon):
    """The installed webhookd with its defaults."""

    patience: Mapping[str, str] = {}

    def __init__(self, core: int, redis: RedisServer, *options: str) -> None:
        super().__init__("--redis", redis.url, *options)
        self._core = core

    def argv(self) -> Sequence[str]:
        return pinned(self._core, super().argv())

    def holds_jobs(self) -> bool:
        """Return True if the spool has records."""
        return bool(json.loads(self.get("/health").body)["spool"]["records"])


class _Listener(ChildProcess):
    """A program that is ready when it listens on `port`."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__()
        self.port = self.reserve_port()

    def is_ready(self) -> bool:
        return is_listening(self.port)


class Peer(_Listener):
    """Express or Fastify with ioredis and BullMQ, in production mode."""

    def __init__(self, name: str, core: int, redis: RedisServer) -> None:
        super().__init__(name)
        self._core = core
        self._redis_url = redis.url

    def argv(self) -> Sequence[str]:
        peers = _HERE / "peers"
        if not (peers / "node_modules").exists():
            raise MissingTool(f"run `npm ci` in {peers}, or `make bench`")
        node = find_tool("node", "it is in Debian's package nodejs")
        return pinned(self._core, [node, str(peers / f"{self.name}.js")])

    def holds_jobs(self) -> bool:
        """Return False: the peers answer when the job is in Redis."""
        return False

    def environ(self) -> Mapping[str, str]:
        own = {
            "NODE_ENV": "production",
            "PORT": str(self.port),
            "REDIS_URL": self._redis_url,
            "QUEUE": QUEUE,
        }
        return {**super().environ(), **own}


class Echo(_Listener):
    """The bare protocol of `tests.bench.echo`."""

    def __init__(self, core: int) -> None:
        super().__init__("echo")
        self._core = core

    def argv(self) -> Sequence[str]:
        return pinned(self._core, [sys.executable, str(_HERE / "echo.py"), str(self.port)])


_NGINX_CONF = """\
# One process, so that nothing is left when it ends.
daemon off;
master_process off;
pid {directory}/nginx.pid;
error_log {directory}/error.log;
events {{ worker_connections 8192; }}
http {{
  access_log off;
  client_max_body_size 16m;
  client_body_buffer_size 64k;
  client_body_temp_path {directory}/body;
  proxy_temp_path {directory}/proxy;
  fastcgi_temp_path {directory}/fastcgi;
  uwsgi_temp_path {directory}/uwsgi;
  scgi_temp_path {directory}/scgi;
  upstream replicas {{
    least_conn;
{servers}
    keepalive 64;
  }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://replicas;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
    }}
  }}
}}
"""


class Nginx(_Listener):
    """Debian's nginx in front of some replicas."""

    def __init__(self, core: int, replicas: Sequence[Server]) -> None:
        super().__init__("nginx")
        self._core = core
        self._replicas = replicas

    def argv(self) -> Sequence[str]:
        servers = "\n".join(f"    server 127.0.0.1:{replica.port};" for replica in self._replicas)
        path = self.directory / "nginx.conf"
        path.write_text(_NGINX_CONF.format(directory=self.directory, port=self.port, servers=servers))
        nginx = find_tool("nginx", "it is in Debian's package nginx-light")
        return pinned(self._core, [nginx, "-c", str(path), "-e", str(self.directory / "error.log")])

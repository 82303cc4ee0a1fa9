"""nginx in front of a daemon, as in production: it parses requests by its own rules, and passes them on."""

from __future__ import annotations

import os
from collections.abc import Sequence

from attrs import frozen

from tests.support.process import ChildProcess, find_tool, is_listening, wait_until

_CONFIGURATION = """
{user}
daemon off;
worker_processes 1;
pid {directory}/nginx.pid;
error_log {directory}/error.log warn;
events {{ worker_connections 1024; }}
http {{
    log_format statuses "$status $upstream_status";
    access_log {directory}/access.log statuses;
    client_body_temp_path {directory}/client;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    client_max_body_size 16m;
    upstream webhookd {{
        {servers}
        keepalive 4;  # several clients share a connection: what smuggling needs
    }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://webhookd;
            proxy_http_version 1.1;
            proxy_next_upstream error timeout non_idempotent;
            proxy_set_header Connection "";
            proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
        }}
    }}
}}
"""


@frozen
class Seen:
    """A request as nginx parsed it: the status of its answer, and of the daemon's, if it was passed on."""

    status: int
    by_daemon: int | None


class Nginx(ChildProcess):
    """Debian's nginx in front of some ports."""

    name = "nginx"

    def __init__(self, *target_ports: int) -> None:
        super().__init__()
        self.port = self.reserve_port()
        self._target_ports = target_ports
        self._access_log = self.directory / "access.log"
        self._is_read_to = 0

    def argv(self) -> Sequence[str]:
        path = self.directory / "nginx.conf"
        path.write_text(
            _CONFIGURATION.format(
                user="user root;" if os.geteuid() == 0 else "",
                directory=self.directory,
                port=self.port,
                servers=" ".join(f"server 127.0.0.1:{port} max_fails=0;" for port in self._target_ports),
            )
        )
        nginx = find_tool("nginx", "it is in Debian's package nginx")
        return [nginx, "-c", str(path), "-e", str(self.directory / "error.log"), "-p", str(self.directory)]

    def is_ready(self) -> bool:
        """Return True if it accepts connections."""
        return is_listening(self.port)

    def seen(self, count: int) -> list[Seen]:
        """Return the requests since the last call; wait for at least ``count``."""
        wait_until(lambda: len(self._new_lines()) >= count, f"nginx has logged {count} requests")
        lines = self._new_lines()
        self._is_read_to += len(lines)
        return [_seen(line) for line in lines]

    def _new_lines(self) -> list[str]:
        return (
            self._access_log.read_text().splitlines()[self._is_read_to :] if self._access_log.exists() else []
        )


def _seen(line: str) -> Seen:
    status, by_daemon = line.split(" ", 1)
    return Seen(int(status), int(by_daemon) if by_daemon.isdigit() else None)

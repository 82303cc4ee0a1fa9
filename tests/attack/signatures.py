"""Authentication of the whole daemon: forged, replayed and stale signatures, a rotation under load."""

from __future__ import annotations

import hmac
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from threading import Event, Thread

from attrs import frozen

from tests.support.daemon import Daemon
from tests.support.http import Response
from tests.support.process import wait_until
from tests.support.servers import RedisServer
from tests.support.webhooks import connected, outcome

from .framing import message
from .nginx import Nginx
from .target import Tally, Target
from .wire import exchange

SECRET = "kZ9m7Yb2c1d4e5f6g7h8i9jk"
OPTIONS = ("--secret", SECRET)
PATH = "/webhook/chatwoot"
DELIVERY = "587b7988-4119-4eae-865f-daed46efd91%d"


def digest(secret: str, timestamp: str, body: bytes) -> str:
    """Return what Chatwoot writes after ``sha256=``, computed without webhookd."""
    return hmac.new(secret.encode(), timestamp.encode() + b"." + body, "sha256").hexdigest()


def now(shift_s: int = 0) -> str:
    """Return the timestamp ``shift_s`` seconds from now."""
    return str(int(time.time()) + shift_s)


def request(body: bytes, *lines: str, path: str = PATH) -> bytes:
    """Return a POST with these header lines in addition to the necessary ones."""
    start = [
        f"POST {path} HTTP/1.1",
        "Host: h",
        "Connection: close",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    ]
    return "\r\n".join([*start, *lines, "", ""]).encode("latin-1") + body


def signed(body: bytes, secret: str = SECRET, *, shift_s: int = 0, delivery: int = 1) -> bytes:
    """Return a delivery as Chatwoot signs it."""
    timestamp = now(shift_s)
    return request(
        body,
        f"X-Chatwoot-Delivery: {DELIVERY % delivery}",
        f"X-Chatwoot-Timestamp: {timestamp}",
        f"X-Chatwoot-Signature: sha256={digest(secret, timestamp, body)}",
    )


@frozen
class Attempt:
    """A request, and its answer."""

    name: str
    data: bytes
    status: int
    word: str


def _attempt(name: str, word: str, *lines: str, body: bytes | None = None, path: str = PATH) -> Attempt:
    return Attempt(name, request(message(1) if body is None else body, *lines, path=path), 401, word)


def attempts() -> Iterator[Attempt]:
    """Yield good signatures, and what only looks like one."""
    body, stamp = message(1), now()
    good = digest(SECRET, stamp, body)
    timestamp = f"X-Chatwoot-Timestamp: {stamp}"
    signature = f"X-Chatwoot-Signature: sha256={good}"
    yield Attempt("a good one", signed(body), 202, "queued")
    yield _attempt("none", "missing_signature")
    yield _attempt("only a timestamp", "missing_signature", timestamp)
    yield _attempt("no timestamp", "malformed_signature", signature)
    for name, value in (
        ("empty", ""),
        ("only the prefix", "sha256="),
        ("without its prefix", good),
        ("another algorithm", f"sha1={good}"),
        ("upper case", f"sha256={good.upper()}"),
        ("prefix in upper case", f"SHA256={good}"),
        ("cut off", f"sha256={good[:-1]}"),
        ("half", f"sha256={good[:32]}"),
        ("longer", f"sha256={good}0"),
        ("no hex", "sha256=" + "z" * 64),
        ("zeros", "sha256=" + "0" * 64),
        ("beyond ASCII", f"sha256={good[:-1]}\xe9"),
        ("quoted", f'"sha256={good}"'),
        ("twice in one", f"sha256={good},sha256={good}"),
        ("of only the body", "sha256=" + hmac.new(SECRET.encode(), body, "sha256").hexdigest()),
        ("by no key", "sha256=" + digest("", stamp, body)),
        ("by another key", "sha256=" + digest(SECRET + "x", stamp, body)),
        ("of 10 kB", "sha256=" + good * 160),
        ("a hash without a key", "sha256=" + hmac.new(b"", b"", "sha256").hexdigest()),
    ):
        yield _attempt(f"signature {name}", "wrong_signature", timestamp, f"X-Chatwoot-Signature: {value}")
    yield _attempt("two signatures", "wrong_signature", timestamp, signature, signature)
    yield _attempt(
        "two signatures, the second one good",
        "wrong_signature",
        timestamp,
        "X-Chatwoot-Signature: sha256=0",
        signature,
    )
    yield _attempt("body and one byte", "wrong_signature", timestamp, signature, body=body + b" ")
    yield _attempt("another body", "wrong_signature", timestamp, signature, body=message(2))
    yield _attempt("no body", "wrong_signature", timestamp, signature, body=b"")
    for name, value, word in (
        ("two", f"{stamp}\r\nX-Chatwoot-Timestamp: {stamp}", "malformed_signature"),
        ("NaN", "NaN", "malformed_signature"),
        ("1e99", "1e99", "malformed_signature"),
        ("signed", f"+{stamp}", "malformed_signature"),
        ("negative", f"-{stamp}", "malformed_signature"),
        ("a fraction", f"{stamp}.0", "malformed_signature"),
        ("hex", hex(int(stamp)), "malformed_signature"),
        ("empty", "", "malformed_signature"),
        ("40 digits", "9" * 40, "malformed_signature"),
        ("10 kB of digits", "1" * 10_000, "malformed_signature"),
        ("digits of another script", "\xb2\xb3", "malformed_signature"),
        ("other than the signed one", now(1), "wrong_signature"),
        ("milliseconds", f"{stamp}000", "malformed_signature"),
    ):
        yield _attempt(f"timestamp {name}", word, f"X-Chatwoot-Timestamp: {value}", signature)
    for shift_s in (-10_000_000, -310, 310, 10_000_000):
        yield Attempt(f"{shift_s} s away", signed(body, shift_s=shift_s), 401, "stale_signature")
    for shift_s in (-290, 290):
        yield Attempt(f"{shift_s} s away", signed(body, shift_s=shift_s), 200, "already_queued")
    yield Attempt(
        "a token, and none is configured", request(body, "X-Webhook-Token: x"), 401, "missing_signature"
    )
    yield _attempt("the secret as a token", "missing_signature", path=f"{PATH}?token={SECRET}")
    yield _attempt("the secret as a header", "missing_signature", f"X-Webhook-Token: {SECRET}")
    yield _attempt("Basic, no base64", "missing_signature", "Authorization: Basic \xff\xff")
    yield _attempt("a body that is not JSON", "wrong_signature", timestamp, signature, body=b"\x00")


def attack_signatures(target: Target) -> Tally:
    """Send each attempt, then replay a captured request."""
    tally = Tally("signatures")
    for attempt in attempts():
        _judge(tally, attempt, target.port)
    tally.expect("all", "jobs", target.job_ids(), [1])
    _replay(tally, target)
    tally.problems += target.problems()
    return tally


def _judge(tally: Tally, attempt: Attempt, port: int) -> None:
    exchanged = exchange(port, attempt.data)
    tally.count(attempt.name, exchanged.answers)
    got = [outcome(answer) for answer in exchanged.answers]
    tally.expect(attempt.name, "answer", got, [(attempt.status, attempt.word)])


def _replay(tally: Tally, target: Target) -> None:
    """Send a captured request again. Its delivery id is not signed, so an attacker can change it."""
    body = message(5)
    again = [
        Attempt("captured", signed(body), 202, "queued"),
        Attempt("replayed", signed(body), 200, "already_queued"),
        Attempt("replayed under another delivery id", signed(body, delivery=2), 200, "already_queued"),
        Attempt("replayed after the window", signed(body, shift_s=-310), 401, "stale_signature"),
    ]
    for attempt in again:
        _judge(tally, attempt, target.port)
    tally.expect("replays", "jobs", target.job_ids(), [5])


class _Sender(Thread):
    """Sends messages one after the other, signed with the current secret, until ``stop``."""

    def __init__(self, port: int, secret: str) -> None:
        super().__init__()
        self.secret = secret
        self.sent = 0
        self.bad: list[Response] = []
        self._port = port
        self._stopped = Event()

    def run(self) -> None:
        while not self._stopped.is_set():
            self.sent += 1
            (answer,) = exchange(self._port, signed(message(self.sent), self.secret)).answers
            if answer.status != 202:
                self.bad.append(answer)

    def stop(self) -> None:
        """Stop, and wait for the last answer."""
        self._stopped.set()
        self.join()


def attack_rotation() -> Tally:
    """Rotate a secret (old, then both, then new) on two replicas in turn, while events arrive."""
    tally = Tally("rotation of a secret")
    old, new = ["--secret", "the-old-secret"], ["--secret", "the-new-secret"]
    with ExitStack() as stack:
        redis = stack.enter_context(RedisServer())
        daemons = [Daemon("--redis", redis.url, *old) for _ in range(2)]
        for daemon in daemons:
            connected(stack.enter_context(daemon))
        nginx = stack.enter_context(Nginx(*[daemon.port for daemon in daemons]))
        sender = _Sender(nginx.port, old[1])
        sender.start()
        stack.callback(sender.stop)
        _roll(daemons, redis, [*old, *new])
        sender.secret = new[1]
        _roll(daemons, redis, new)
        sender.stop()
        tally.count("under load", sender.bad)
        tally.expect("under load", "refusals", [one.status for one in sender.bad], [])
        # Events that came before a new process had connected to Redis are in its spool.
        wait_until(lambda: _length(redis) == sender.sent, f"{sender.sent} events are {sender.sent} jobs")
        (refused,) = exchange(nginx.port, signed(message(1), old[1])).answers
        tally.count("the old secret, afterwards", [refused])
        tally.expect("the old secret, afterwards", "answer", outcome(refused), (401, "wrong_signature"))
        tally.notes.append(f"{sender.sent} events while two replicas were restarted twice")
    return tally


def _roll(daemons: Sequence[Daemon], redis: RedisServer, options: Sequence[str]) -> None:
    for daemon in daemons:
        daemon.options = ("--redis", redis.url, *options)
        daemon.restart()
        connected(daemon)


def _length(redis: RedisServer) -> object:
    with redis.client() as client:
        return client.llen("bull:chatwoot:wait")

"""Bodies: traps for JSON parsers, sizes, codings; accepted bodies are stored byte for byte."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from hashlib import sha256

from attrs import frozen

from tests.support.process import wait_until
from tests.support.webhooks import outcome
from tests.support.workers import LINES, Worker

from .target import Tally, Target
from .wire import exchange

MAX_BODY_BYTES = 16_777_216
PATH = "/webhook/chatwoot"


@frozen
class Body:
    """A body, and its answer."""

    name: str
    data: bytes
    status: int = 202
    word: str = "queued"
    lines: tuple[str, ...] = ()

    @property
    def request(self) -> bytes:
        """The whole request."""
        lines = [f"POST {PATH} HTTP/1.1", "Host: h", "Connection: close", *self._lines(), "", ""]
        return "\r\n".join(lines).encode() + self.data

    def _lines(self) -> tuple[str, ...]:
        length = f"Content-Length: {len(self.data)}"
        return (
            self.lines if any("Transfer-Encoding" in line for line in self.lines) else (length, *self.lines)
        )


def event(more: bytes, name: bytes = b"odd") -> bytes:
    """Return an object with an event and these fields."""
    return b'{"event":"%b",%b}' % (name, more)


def _nested(depth: int) -> bytes:
    return event(b'"a":' + b"[" * depth + b"]" * depth)


def padded(size: int) -> bytes:
    """Return an event of exactly ``size`` bytes."""
    head, tail = event(b'"a":"%b"').split(b"%b")
    return head + b"x" * (size - len(head) - len(tail)) + tail


def taken() -> Iterator[Body]:
    """Yield bodies that a worker's JSON.parse reads, so that each must become a job."""
    yield Body("duplicate keys", b'{"event":"a","event":"odd","id":1,"id":2}')
    yield Body("nested 500 deep", _nested(500))
    yield Body("a huge integer", event(b'"id":' + b"9" * 4000))
    yield Body("a huge negative integer", event(b'"id":-' + b"9" * 4000))
    yield Body("an exponent out of range", event(b'"id":1e999,"a":-1e999,"b":1e-999'))
    yield Body("a fraction of 10,000 digits", event(b'"id":0.' + b"1" * 10_000))
    yield Body("a lone surrogate", event(b'"a":"\\ud800","\\udc00":1'))
    yield Body("a surrogate pair, and one in the wrong order", event(b'"a":"\\ud83d\\ude00 \\ude00\\ud83d"'))
    yield Body("NUL, escaped", event(b'"a":"\\u0000"'))
    yield Body("U+2028", event('"a":"\u2028\u2029"'.encode()))
    yield Body("spaces around it", b" \t\r\n" + event(b'"a":1') + b"\n\n ")
    yield Body("ids of other types", event(b'"id":true,"inbox":[],"account":"x","conversation":null'))
    yield Body("__proto__", event(b'"__proto__":{"id":1},"constructor":{}'))
    yield Body("noncharacters", event('"a":"\uffff\U0010ffff"'.encode()))
    yield Body("an event's name of 10 kB", event(b'"a":1', b"x" * 10_240))
    yield Body("an event's name with CR LF", event(b'"a":1', b"x\\r\\nSet-Cookie: a\\r\\n\\r\\n"))
    yield Body("an event's name in colours", event(b'"a":1', b"\\u001b[31mred\\u001b[0m\\u0007"))
    yield Body("an event's name like a key", event(b'"a":1', b"a:b:c{d}e"))
    yield Body("an event's name like a path", event(b'"a":1', b"../../etc/passwd"))
    yield Body("an event's name like a format", event(b'"a":1', b"{0.__class__} %s %n ${jndi:ldap://x}"))
    yield Body("an event's name of NULs", event(b'"a":1', b"\\u0000\\u0000"))
    yield Body("5 MB", padded(5_000_000))
    yield Body("the largest", padded(MAX_BODY_BYTES))
    content = event(b'"a":"in chunks"')
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in content) + b"0\r\n\r\n"
    yield Body("in chunks of a byte", chunks, lines=("Transfer-Encoding: chunked",))


def refused() -> Iterator[Body]:
    """Yield bodies that no worker could read, or that are too large."""
    plain = event(b'"a":1')
    for name, data, word in (
        ("nothing", b"", "not_json"),
        ("spaces", b"  \n", "not_json"),
        ("NUL", b"\x00", "not_json"),
        ("nested 100,000 deep", _nested(100_000), "not_json"),
        ("nested objects, 100,000 deep", b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "not_json"),
        ("nested, and never closed", b"[" * 1_000_000, "not_json"),
        (
            "an id of another type, and 16 MiB of lists",
            event(b'"id":"1","a":[' + b"[]," * 5_000_000 + b"1]"),
            "not_json",
        ),
        ("NaN", event(b'"a":NaN'), "not_json"),
        ("Infinity", event(b'"a":-Infinity'), "not_json"),
        ("a BOM", b"\xef\xbb\xbf" + plain, "not_json"),
        ("a comment", event(b'"a":1/**/'), "not_json"),
        ("single quotes", b"{'event':'a'}", "not_json"),
        ("a comma at the end", b'{"event":"a",}', "not_json"),
        ("a control character in a string", event(b'"a":"\x01"'), "not_json"),
        ("a line end in a string", event(b'"a":"\n"'), "not_json"),
        ("a number that begins with 0", event(b'"a":01'), "not_json"),
        ("a plus sign", event(b'"a":+1'), "not_json"),
        ("hex", event(b'"a":0x1'), "not_json"),
        ("a wrong escape", event(b'"a":"\\x41"'), "not_json"),
        ("cut off", plain[:-1], "not_json"),
        ("two of them", plain + plain, "not_json"),
        ("a NUL after it", plain + b"\x00", "not_json"),
        ("another space", "\u00a0".encode() + plain, "not_json"),
        ("a form feed", b"\x0c" + plain, "not_json"),
        ("UTF-16", plain.decode().encode("utf-16"), "not_utf8"),
        ("UTF-16 without a BOM", plain.decode().encode("utf-16-le"), "not_json"),
        ("UTF-32", plain.decode().encode("utf-32-be"), "not_json"),
        ("Latin-1", event(b'"a":"\xe9"'), "not_utf8"),
        ("UTF-8, cut off", event(b'"a":"\xf0\x9f\x98"'), "not_utf8"),
        ("UTF-8, too long", event(b'"a":"\xc0\xaf"'), "not_utf8"),
        ("a surrogate in UTF-8", event(b'"a":"\xed\xa0\x80"'), "not_utf8"),
        ("UTF-8 beyond Unicode", event(b'"a":"\xf4\x90\x80\x80"'), "not_utf8"),
        ("a list", b"[]", "not_an_object"),
        ("a string", b'"event"', "not_an_object"),
        ("a number", b"1", "not_an_object"),
        ("null", b"null", "not_an_object"),
        ("an empty object", b"{}", "no_event"),
        ("an event that is null", b'{"event":null}', "no_event"),
        ("an event that is empty", b'{"event":""}', "no_event"),
        ("an event that is a number", b'{"event":1}', "no_event"),
        ("an event in capitals", b'{"EVENT":"a"}', "no_event"),
    ):
        yield Body(name, data, 400, word)
    bomb = gzip.compress(bytes(1_000_000))
    for coding in ("gzip", "deflate", "br", "identity, gzip", "GZIP", "x-gzip"):
        yield Body(f"coding {coding}", bomb, 415, "unsupported_encoding", (f"Content-Encoding: {coding}",))
    for media in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "",
        "/",
    ):
        yield Body(f"type {media}", plain, 415, "unsupported_media_type", (f"Content-Type: {media}",))
    yield Body("one byte too many", padded(MAX_BODY_BYTES + 1), 413, "too_large")
    chunk = b"%x\r\n%b\r\n" % (1 << 20, b"x" * (1 << 20))
    chunked = ("Transfer-Encoding: chunked",)
    yield Body("too many chunks", chunk * 17 + b"0\r\n\r\n", 413, "too_large", chunked)
    yield Body("one chunk that is too large", b"ffffffff\r\n" + b"x" * (17 << 20), 413, "too_large", chunked)


def attack_bodies(target: Target) -> Tally:
    """Send each body; an accepted one must be in Redis, byte for byte."""
    tally = Tally("bodies")
    for body in (*taken(), *refused()):
        exchanged = exchange(target.port, body.request)
        tally.count(body.name, exchanged.answers)
        got = [outcome(answer) for answer in exchanged.answers]
        tally.expect(body.name, "answer", got, [(body.status, body.word)])
        wanted = [_content(body)] if body.status == 202 else []
        tally.expect(body.name, "stored byte for byte", target.jobs() == wanted, wanted=True)
    tally.problems += target.problems()
    return tally


def attack_workers(target: Target) -> Tally:
    """Let real workers read the accepted bodies."""
    tally = Tally("bodies, read by workers")
    for line in LINES:
        for body in taken():
            tally.count(body.name, exchange(target.port, body.request).answers)
        tally.problems += [f"{line} has not read {name}" for name in _unread(target, line)]
        target.client.flushall()
    tally.problems += target.problems()
    return tally


def _unread(target: Target, line: str) -> list[str]:
    sent = {sha256(_content(body)).hexdigest(): body.name for body in taken()}
    with Worker(line, target.redis.port) as worker:
        wait_until(lambda: len(worker.processed) >= len(sent), f"{line} has read all jobs")
        return [sent[one] for one in sent.keys() - {done.sha256 for done in worker.processed}]


def _content(body: Body) -> bytes:
    """Return the body without its transfer coding."""
    if not body.lines:
        return body.data
    data, rest = b"", body.data
    while not rest.startswith(b"0\r\n"):
        size, _, rest = rest.partition(b"\r\n")
        data, rest = data + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    json.loads(data)
    return data

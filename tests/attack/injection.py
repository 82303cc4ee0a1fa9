"""Data that a request claims: names that break a log, floods of names, and forged addresses."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from itertools import islice

from attrs import frozen

from tests.support.prometheus import ObservedDaemon
from tests.support.webhooks import outcome

from .bodies import event
from .connections import resident_bytes
from .framing import message
from .signatures import request
from .target import Tally, Target
from .wire import exchange

#: The characters that could end a line in a log, or control a terminal.
_UNPRINTABLE = {chr(code) for code in (*range(32), *range(127, 160))} - {"\n", "\t"}
_PATH = "/webhook/chatwoot"
_CONNECTIONS = 20

NAMES = (
    b"x\\r\\n2026-01-01T00:00:00.000+00:00 critical forged",
    b'x\\n{\\"time\\": \\"2026-01-01T00:00:00.000+00:00\\", \\"level\\": \\"critical\\"}',
    b"\\u001b[31mred\\u001b[0m",
    b"\\u001b]0;title\\u0007",
    b"\\u0085\\u2028\\u2029\\u009b",
    b"\\u0000\\u0008\\u007f",
    b"{log_source} {0} {} %s %(asctime)s",
    b'\\",\\"forged\\":\\"',
    b"x" * 10_240,
    b"\\ud800",
    "\u202egnp".encode(),
)


def attack_logs(target: Target) -> Tally:
    """Send names, paths, headers and sources that would forge log lines, at level debug."""
    tally = Tally("injection into logs")
    for name in NAMES:
        data = request(event(b'"id":1', name), f"X-Chatwoot-Delivery: {name.decode('latin-1')}")
        tally.count(f"event {name[:30]!r}", exchange(target.port, data).answers)
        path = f"{_PATH}/" + "".join(f"%{byte:02x}" for byte in name[:2000])
        data = request(message(1), f"User-Agent: {name.decode('latin-1')}", path=path)
        exchanged = exchange(target.port, data)
        tally.count(f"source {name[:30]!r}", exchanged.answers)
        tally.expect(f"source {name[:30]!r}", "status", exchanged.statuses, [404])
    target.client.flushall()
    log = target.daemon.log
    lines = log.splitlines()
    tally.expect("all", "unprintable in the log", sorted(set(log) & _UNPRINTABLE), [])
    forged = [line for line in lines if line.startswith(("2026-01-01", '{"time": "2026-01-01'))]
    tally.expect("all", "forged lines", forged, [])
    tally.expect("all", "lines of more than 2,000", [line for line in lines if len(line) > 2000], [])
    tally.problems += target.problems()
    return tally


def attack_names(target: Target, count: int) -> Tally:
    """Send ``count`` event names and source names, all different: memory and metrics must not grow."""
    tally = Tally(f"{count:,} names of events and sources")
    _flood(target, _names("warm", count // 10))
    target.client.flushall()
    before = resident_bytes(target.daemon.pid)
    statuses = _flood(target, _names("name", count))
    grown = resident_bytes(target.daemon.pid) - before
    tally.tried = 2 * count
    tally.accepted, tally.refused = statuses.count(202), statuses.count(404)
    tally.expect("all", "answers", (tally.accepted, tally.refused), (count, count))
    tally.expect("all", "jobs", target.client.llen("bull:chatwoot:wait"), count)
    if grown > 64 << 20:  # the last jobs, which are kept for a loss in Redis, take at most 32 MiB
        tally.problems.append(f"the daemon grew by {grown >> 20} MiB")
    assert isinstance(target.daemon, ObservedDaemon)
    metrics = target.daemon.scrape()
    tally.expect("all", "names in the metrics", "name_" in metrics or "warm_" in metrics, wanted=False)
    tally.expect("all", "fewer than 1,000 lines of metrics", len(metrics.splitlines()) < 1000, wanted=True)
    tally.notes.append(f"grew by {grown / (1 << 20):.0f} MiB; {len(metrics.splitlines())} lines of metrics")
    target.client.flushall()
    tally.problems += target.problems()
    return tally


def _names(word: str, count: int) -> Iterator[bytes]:
    """Yield a new event and an event of a new source for each number; the connections stay open."""
    for number in range(count):
        body = event(b'"id":%d' % (number + 1), f"{word}_{number}".encode())
        for path in (_PATH, f"{_PATH}/{word}_{number}"):
            head = (
                f"POST {path} HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n"
            )
            yield head.encode() + body


def _flood(target: Target, requests: Iterator[bytes]) -> list[int]:
    """Send all in batches on some connections; return the statuses."""
    connections = [
        socket.create_connection(("127.0.0.1", target.port), timeout=20.0) for _ in range(_CONNECTIONS)
    ]
    statuses: list[int] = []
    batch = list(islice(requests, _CONNECTIONS * 8))
    while batch:
        shares = [batch[start::_CONNECTIONS] for start in range(_CONNECTIONS)]
        for connection, share in zip(connections, shares, strict=True):
            connection.sendall(b"".join(share))
        for connection, share in zip(connections, shares, strict=True):
            statuses += _statuses(connection, len(share))
        batch = list(islice(requests, _CONNECTIONS * 8))
    for connection in connections:
        connection.close()
    return statuses


def _statuses(connection: socket.socket, count: int) -> list[int]:
    data = b""
    while data.count(b"}\n") < count:
        piece = connection.recv(65_536)
        if not piece:
            break
        data += piece
    return [int(line[:3]) for line in data.split(b"HTTP/1.1 ")[1:]]


@frozen
class Claim:
    """A claimed client address, and if the allow-list accepts it."""

    name: str
    lines: Sequence[str]
    is_taken: bool
    from_address: str = "127.0.0.1"


ALLOW_LIST_OPTIONS = ("--networks", "203.0.113.0/24,2001:db8::/32")
TRUST_OPTIONS = ("--trusted-proxies", "127.0.0.1,10.0.0.0/8")

CLAIMS: Sequence[Claim] = (
    Claim("the proxy itself", (), is_taken=False),
    Claim("a client behind the proxy", ("X-Forwarded-For: 203.0.113.7",), is_taken=True),
    Claim("a client with IPv6", ("X-Forwarded-For: 2001:db8::7",), is_taken=True),
    Claim("a client in IPv4 as IPv6", ("X-Forwarded-For: ::ffff:203.0.113.7",), is_taken=True),
    Claim("by X-Real-IP", ("X-Real-IP: 203.0.113.7",), is_taken=True),
    Claim("another client", ("X-Forwarded-For: 198.51.100.7",), is_taken=False),
    Claim("another client that forges", ("X-Forwarded-For: 203.0.113.7, 198.51.100.7",), is_taken=False),
    Claim(
        "forged in a header before",
        ("X-Forwarded-For: 203.0.113.7", "X-Forwarded-For: 198.51.100.7"),
        is_taken=False,
    ),
    Claim(
        "X-Real-IP next to X-Forwarded-For",
        ("X-Real-IP: 203.0.113.7", "X-Forwarded-For: 198.51.100.7"),
        is_taken=False,
    ),
    Claim("X-Real-IP twice", ("X-Real-IP: 203.0.113.7", "X-Real-IP: 203.0.113.7"), is_taken=False),
    Claim("through two proxies", ("X-Forwarded-For: 203.0.113.7, 10.1.2.3",), is_taken=True),
    Claim("through an untrusted proxy", ("X-Forwarded-For: 203.0.113.7, 192.0.2.1",), is_taken=False),
    Claim("all proxies", ("X-Forwarded-For: 10.0.0.1, 10.0.0.2",), is_taken=False),
    Claim("empty", ("X-Forwarded-For:",), is_taken=False),
    Claim("no address", ("X-Forwarded-For: unknown",), is_taken=False),
    Claim("no address, at the end", ("X-Forwarded-For: 203.0.113.7, unknown",), is_taken=False),
    Claim("a comma at the end", ("X-Forwarded-For: 203.0.113.7,",), is_taken=False),
    Claim("with a port", ("X-Forwarded-For: 203.0.113.7:80",), is_taken=False),
    Claim("a network", ("X-Forwarded-For: 203.0.113.0/24",), is_taken=False),
    Claim("a number", ("X-Forwarded-For: 3405803783",), is_taken=False),
    Claim("octal", ("X-Forwarded-For: 0313.0.0161.07",), is_taken=False),
    Claim("beyond ASCII", ("X-Forwarded-For: \xb2\xb3.0.113.7",), is_taken=False),
    Claim("10 kB of it", ("X-Forwarded-For: " + "10.0.0.1, " * 1000 + "10.0.0.1",), is_taken=False),
    Claim("Forwarded, which webhookd ignores", ("Forwarded: for=203.0.113.7",), is_taken=False),
    Claim("underscores", ("X_Forwarded_For: 203.0.113.7",), is_taken=False),
    Claim(
        "an untrusted peer",
        ("X-Forwarded-For: 203.0.113.7",),
        is_taken=False,
        from_address="127.0.0.2",
    ),
    Claim(
        "an untrusted peer, by X-Real-IP",
        ("X-Real-IP: 203.0.113.7",),
        is_taken=False,
        from_address="127.0.0.2",
    ),
)


def attack_addresses(target: Target) -> Tally:
    """Send forged client addresses: only trusted proxies are believed."""
    tally = Tally("forged addresses")
    for claim in CLAIMS:
        data = request(message(1), *claim.lines)
        exchanged = exchange(target.port, data, from_address=claim.from_address)
        tally.count(claim.name, exchanged.answers)
        got = [outcome(answer) for answer in exchanged.answers]
        wanted = [(202, "queued")] if claim.is_taken else [(401, "wrong_network")]
        tally.expect(claim.name, "answer", got, wanted)
        target.client.flushall()
    tally.problems += target.problems()
    return tally


PROXIED: Sequence[tuple[str, bytes, bool]] = (
    ("an allowed client", b"PROXY TCP4 203.0.113.7 127.0.0.1 1 2\r\n", True),
    ("an allowed client with IPv6", b"PROXY TCP6 2001:db8::7 ::1 1 2\r\n", True),
    ("another client", b"PROXY TCP4 198.51.100.7 127.0.0.1 1 2\r\n", False),
    ("an unknown client", b"PROXY UNKNOWN x\r\n", False),
    (
        "an allowed client, in binary",
        b"\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c" + bytes([203, 0, 113, 7, 127, 0, 0, 1, 0, 1, 0, 2]),
        True,
    ),
    (
        "another client, in binary",
        b"\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c" + bytes([198, 51, 100, 7, 127, 0, 0, 1, 0, 1, 0, 2]),
        False,
    ),
)


def attack_proxy_protocol(target: Target) -> Tally:
    """Send PROXY protocol: the allow-list uses its address, not that of the headers."""
    tally = Tally("PROXY protocol")
    for name, preamble, is_taken in PROXIED:
        exchanged = exchange(target.port, preamble + request(message(1), "X-Forwarded-For: 203.0.113.9"))
        tally.count(name, exchanged.answers)
        tally.expect(name, "answer", exchanged.statuses, [202 if is_taken else 401])
        target.client.flushall()
    for name, preamble in (
        ("none", b""),
        ("no address", b"PROXY TCP4 x y 1 2\r\n"),
        ("too few words", b"PROXY TCP4\r\n"),
        ("without an end", b"PROXY " + b"x" * 4096),
        ("binary, of another version", b"\r\n\r\n\x00\r\nQUIT\n\x31\x11\x00\x0c" + bytes(12)),
    ):
        exchanged = exchange(target.port, preamble + request(message(1)), stays_open=True)
        tally.count(f"PROXY: {name}", exchanged.answers)
        tally.expect(f"PROXY: {name}", "jobs", target.job_ids(), [])
    return tally

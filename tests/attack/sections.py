"""All sections, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from tests.support.http import request_bytes
from tests.support.prometheus import ObservedDaemon
from tests.support.webhooks import outcome, webhook

from . import bodies, canary, connections, framing, fuzz, injection, oracles, schema, signatures
from .target import ProxiedDaemon, Tally, Target, TlsDaemon

_FEW = {"idle": 200, "slow head": 20}
_MANY = {"idle": 5000, "slow head": 200, "slow body": 200, "slow chunks": 100, "slow reader": 2}
_ARRIVING_BYTES = 64 << 20
_LOGS = ("text", "json")


def frame() -> list[Tally]:
    """Requests that could be framed in two ways."""
    with Target() as target:
        return [framing.attack_directly(target), framing.attack_through_nginx(target)]


def sign() -> list[Tally]:
    """Who is let in."""
    with Target(*signatures.OPTIONS) as target:
        return [signatures.attack_signatures(target), oracles.attack_with_oracles(200)]


def rotate() -> list[Tally]:
    """A secret is replaced under load."""
    return [signatures.attack_rotation()]


def read_bodies() -> list[Tally]:
    """What bodies may hold."""
    with Target() as target:
        return [bodies.attack_bodies(target), bodies.attack_workers(target)]


def connect_a_little() -> list[Tally]:
    """Connections that do nothing: some."""
    with Target() as target:
        return [connections.attack_connections(target, _FEW, p95_s=None)]


def connect() -> list[Tally]:
    """Connections that do nothing: 5,502."""
    with Target() as target:
        return [connections.attack_connections(target, _MANY, p95_s=connections.P95_S)]


def fill_memory() -> list[Tally]:
    """Bodies that never end."""
    with Target("--max-in-flight-bytes", str(_ARRIVING_BYTES)) as target:
        return [connections.attack_memory(target, _ARRIVING_BYTES)]


def fill_descriptors() -> list[Tally]:
    """More connections than there is room for."""
    with Target(kind=connections.CrampedDaemon) as target:
        return [connections.attack_limit(target, connections.CrampedDaemon.max_connections)]


def inject() -> list[Tally]:
    """What a request says of itself."""
    tallies = []
    for log_format in _LOGS:
        options = ("--log-level", "debug", "--access-log", "on", "--log-format", log_format)
        with Target(*options) as target:
            tallies.append(injection.attack_logs(target))
    with Target(*injection.ALLOW_LIST_OPTIONS, *injection.TRUST_OPTIONS) as target:
        tallies.append(injection.attack_addresses(target))
    with Target(*injection.ALLOW_LIST_OPTIONS, kind=ProxiedDaemon) as target:
        tallies.append(injection.attack_proxy_protocol(target))
    return tallies


def name_a_little() -> list[Tally]:
    """Names of events and sources: some."""
    with Target(kind=ObservedDaemon) as target:
        return [injection.attack_names(target, 5_000)]


def name() -> list[Tally]:
    """Names of events and sources: 100,000."""
    with Target(kind=ObservedDaemon) as target:
        return [injection.attack_names(target, 100_000)]


def speak_tls() -> list[Tally]:
    """Answers and refusals over TLS are encrypted."""
    tally = Tally("TLS")
    with Target(kind=TlsDaemon) as target:
        daemon = target.daemon
        assert isinstance(daemon, TlsDaemon)
        for data, wanted in (
            (webhook(1).request, (202, "queued")),
            (request_bytes("GET", "/nobody"), (404, "not_found")),
            (b"NONSENSE\r\n\r\n", (400, "bad_request")),
        ):
            answer = daemon.exchange(data)
            tally.count(repr(data[:20]), [answer])
            tally.expect(repr(data[:20]), "answer", outcome(answer), wanted)
        tally.problems += target.problems()
    return [tally]


def sing_a_little() -> list[Tally]:
    """Marked secrets go every way there is, but for some mistakes."""
    mistakes = canary.attack_configuration(canary.MISTAKES[::4])
    attacks = (canary.attack_secrets, canary.attack_with_a_defect)
    return [mistakes, *(attack(log_format) for attack in attacks for log_format in _LOGS)]


def sing() -> list[Tally]:
    """Marked secrets go every way there is."""
    return [canary.attack_configuration(canary.MISTAKES), *sing_a_little()[1:]]


def fuzz_a_little() -> list[Tally]:
    """Changed seeds: some."""
    return [fuzz.attack(target, 300) for target in fuzz.TARGETS]


def fuzz_much() -> list[Tally]:
    """Changed seeds, and what coverage leads to."""
    return [
        *(fuzz.attack(target, 5_000) for target in fuzz.TARGETS),
        *(fuzz.attack_by_coverage(target, 30) for target in fuzz.TARGETS),
    ]


def describe_a_little() -> list[Tally]:
    """The OpenAPI description: some examples."""
    with Target() as target:
        return [schema.attack_schema(target, 20)]


def describe() -> list[Tally]:
    """The OpenAPI description."""
    with Target() as target:
        return [schema.attack_schema(target, 500)]


Section = Callable[[], list[Tally]]

#: Those that `make test-all` runs, too.
SHORT: Mapping[str, Section] = {
    "framing": frame,
    "signatures": sign,
    "bodies": read_bodies,
    "connections": connect_a_little,
    "memory": fill_memory,
    "descriptors": fill_descriptors,
    "injection": inject,
    "names": name_a_little,
    "tls": speak_tls,
    "canary": sing_a_little,
    "fuzz": fuzz_a_little,
    "schema": describe_a_little,
}

#: All, the long ones in place of the short.
ALL: Mapping[str, Section] = {
    **SHORT,
    "connections": connect,
    "names": name,
    "canary": sing,
    "fuzz": fuzz_much,
    "schema": describe,
    "rotation": rotate,
}


def table(tallies: Sequence[Tally]) -> str:
    """What came of all cases, for people."""
    lines = [f"{'':44}{'tried':>9}{'refused':>9}{'accepted':>9}{'5xx':>6}{'broken':>8}"]
    for one in tallies:
        lines.append(
            f"{one.section:44}{one.tried:>9,}{one.refused:>9,}{one.accepted:>9,}"
            f"{one.answered_5xx:>6}{len(one.problems):>8}"
        )
        lines += [f"    {note}" for note in one.notes]
    return "\n".join(lines)

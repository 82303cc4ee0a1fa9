"""All sections of the attacks, in order."""

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
    """Attack with requests that two parsers could frame in two ways."""
    with Target() as target:
        return [framing.attack_directly(target), framing.attack_through_nginx(target)]


def sign() -> list[Tally]:
    """Attack the signature check."""
    with Target(*signatures.OPTIONS) as target:
        return [signatures.attack_signatures(target), oracles.attack_with_oracles(200)]


def rotate() -> list[Tally]:
    """Replace a secret under load."""
    return [signatures.attack_rotation()]


def read_bodies() -> list[Tally]:
    """Attack with bodies."""
    with Target() as target:
        return [bodies.attack_bodies(target), bodies.attack_workers(target)]


def connect_a_little() -> list[Tally]:
    """Attack with a few idle and slow connections."""
    with Target() as target:
        return [connections.attack_connections(target, _FEW, p95_s=None)]


def connect() -> list[Tally]:
    """Attack with 5,502 idle and slow connections."""
    with Target() as target:
        return [connections.attack_connections(target, _MANY, p95_s=connections.P95_S)]


def fill_memory() -> list[Tally]:
    """Attack with bodies that never end."""
    with Target("--max-in-flight-bytes", str(_ARRIVING_BYTES)) as target:
        return [connections.attack_memory(target, _ARRIVING_BYTES)]


def fill_descriptors() -> list[Tally]:
    """Attack with more connections than allowed."""
    with Target(kind=connections.CrampedDaemon) as target:
        return [connections.attack_limit(target, connections.CrampedDaemon.max_connections)]


def inject() -> list[Tally]:
    """Attack logs and the allow-list with forged values."""
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
    """Attack with 5,000 names of events and sources."""
    with Target(kind=ObservedDaemon) as target:
        return [injection.attack_names(target, 5_000)]


def name() -> list[Tally]:
    """Attack with 100,000 names of events and sources."""
    with Target(kind=ObservedDaemon) as target:
        return [injection.attack_names(target, 100_000)]


def speak_tls() -> list[Tally]:
    """Check that answers and refusals over TLS are encrypted."""
    tally = Tally("TLS")
    with Target(kind=TlsDaemon) as target:
        daemon = target.daemon
        assert isinstance(daemon, TlsDaemon)
        for data, wanted in (
            (webhook(1).request, (202, "queued")),
            (request_bytes("GET", "/unknown"), (404, "not_found")),
            (b"NONSENSE\r\n\r\n", (400, "bad_request")),
        ):
            answer = daemon.exchange(data)
            tally.count(repr(data[:20]), [answer])
            tally.expect(repr(data[:20]), "answer", outcome(answer), wanted)
        tally.problems += target.problems()
    return [tally]


def sing_a_little() -> list[Tally]:
    """Send marked secrets on every path, with some of the mistakes."""
    mistakes = canary.attack_configuration(canary.MISTAKES[::4])
    attacks = (canary.attack_secrets, canary.attack_with_a_defect)
    return [mistakes, *(attack(log_format) for attack in attacks for log_format in _LOGS)]


def sing() -> list[Tally]:
    """Send marked secrets on every path."""
    return [canary.attack_configuration(canary.MISTAKES), *sing_a_little()[1:]]


def fuzz_a_little() -> list[Tally]:
    """Fuzz with a few changed seeds."""
    return [fuzz.attack(target, 300) for target in fuzz.TARGETS]


def fuzz_much() -> list[Tally]:
    """Fuzz with many changed seeds, and by coverage."""
    return [
        *(fuzz.attack(target, 5_000) for target in fuzz.TARGETS),
        *(fuzz.attack_by_coverage(target, 30) for target in fuzz.TARGETS),
    ]


def describe_a_little() -> list[Tally]:
    """Compare the daemon with its OpenAPI description, with a few examples."""
    with Target() as target:
        return [schema.attack_schema(target, 20)]


def describe() -> list[Tally]:
    """Compare the daemon with its OpenAPI description."""
    with Target() as target:
        return [schema.attack_schema(target, 500)]


Section = Callable[[], list[Tally]]

#: The sections of tests/integration/test_attacks.py.
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

#: All sections; long ones replace the short ones.
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
    """Return the results of all cases as a table for people."""
    lines = [f"{'':44}{'tried':>9}{'refused':>9}{'accepted':>9}{'5xx':>6}{'broken':>8}"]
    for one in tallies:
        lines.append(
            f"{one.section:44}{one.tried:>9,}{one.refused:>9,}{one.accepted:>9,}"
            f"{one.answered_5xx:>6}{len(one.problems):>8}"
        )
        lines += [f"    {note}" for note in one.notes]
    return "\n".join(lines)

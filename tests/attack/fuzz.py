"""Fuzzing in one process: each target keeps its promise for any bytes.

The seeds are in tests/attack/corpus, one directory for each target. The bodies of the samples and the cases
of the framing section are seeds too.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred, succeed
from twisted.internet.task import Clock
from twisted.logger import ILogObserver, LogEvent, globalLogPublisher

from tests.support.web_client import MemoryClient
from webhookd import intake
from webhookd.bullmq.keys import check_job_id
from webhookd.chatwoot import payload as chatwoot
from webhookd.config import resolve
from webhookd.http import InFlight, Shortcut, WebhookSite
from webhookd.intake.auth import REASONS, Authenticator, Credentials
from webhookd.model import BadRequest, ConfigError, Delivery, Job, Outcome, Receipt, Unauthorized
from webhookd.samples import SAMPLES
from webhookd.web import HealthApp, WebhookApp

from .framing import CASES
from .target import Tally, why_not_ours

CORPUS = Path(__file__).with_name("corpus")
_MAX_SEED_BYTES = 4096
_READ_BYTES = 65_536
#: The statuses that depend on the number of bytes in one read.
_BY_READ = frozenset({429, 431})


class BrokenPromise(AssertionError):
    """An input breaks an invariant."""


def _require(holds: object, what: str) -> None:
    if not holds:
        raise BrokenPromise(what)


# -- targets ------------------------------------------------------------------------------------------------


def parse(data: bytes) -> None:
    """Require that a body is refused, or is JSON for a worker and has a job id that BullMQ accepts."""
    try:
        event = chatwoot.parse(Delivery("chatwoot", data, None, 0), chatwoot.hash_of_body)
    except BadRequest:
        return
    check_job_id(event.job_id)
    event.name.encode()
    value = json.loads(data.decode(), parse_constant=_no_constant, parse_int=len)
    _require(isinstance(value, dict), "not an object")


def _no_constant(name: str) -> object:
    raise BrokenPromise(f"{name} is not JSON")


def verify(data: bytes) -> None:
    """Require that credentials are refused with a known code: none are the secret."""
    signature, timestamp, authorization, token, forwarded_for, body = (*data.split(b"\n", 5), *[b""] * 6)[:6]
    shown = Credentials(signature, timestamp, authorization, token, "10.0.0.1", forwarded_for, token)
    for rule in (
        Authenticator(("a secret that is long enough",), ("a token that is long enough",), 300),
        Authenticator(
            ("s" * 24,), (), 300, resolve({"networks": "10.0.0.0/8"}, {}).sources["chatwoot"].networks
        ),
    ):
        try:
            rule.verify(shown, body, 1788264005.0)
        except Unauthorized as error:
            _require(error.code in REASONS, f"code {error.code}")
        else:
            raise BrokenPromise("accepted")


def configure(data: bytes) -> None:
    """Require that a configuration is accepted, or refused in one line."""
    with TemporaryDirectory() as directory:
        path = Path(directory) / "webhookd.toml"
        path.write_bytes(data)
        try:
            resolve({"config": str(path)}, {})
        except ConfigError as error:
            _require(len(str(error).splitlines()) == 1, f"more than one line: {error}")


def edge(data: bytes) -> None:
    """Require valid answers, one 202 for each job, no matter how the bytes are divided."""
    if b"HEAD" in data:
        return  # in a stream, answers without a body are ambiguous
    whole, jobs, statuses = _talk(data, _READ_BYTES)
    _require(statuses.count(202) == len(jobs), f"{statuses} for the jobs {jobs}")
    if len(whole) <= _MAX_SEED_BYTES:
        _, jobs_by_byte, by_byte = _talk(data, 1)
        if not _BY_READ & {*statuses, *by_byte}:
            _require(
                (by_byte, jobs_by_byte) == (statuses, jobs), f"{statuses} at once, {by_byte} byte by byte"
            )


def _talk(data: bytes, piece_bytes: int) -> tuple[bytes, list[str], list[int]]:
    jobs: list[str] = []
    clock = Clock()
    site = _site(clock, jobs)
    with _no_failures():
        client = MemoryClient(site, clock)
        client.send(data, piece_bytes)
        received = client.received
        statuses = []
        while client.received:
            answer = client.response()
            statuses.append(answer.status)
            problem = None if answer.status == 100 else why_not_ours(answer)
            _require(problem is None, f"{problem}")
        _require(500 not in statuses, "500 without a cause")
        client.hang_up()
    _require(site.state.arriving_bytes == 0, "bytes of a closed connection still count")
    _require(not site.state.channels, "a closed connection still counts")
    return received, jobs, [status for status in statuses if status != 100]


def _site(clock: Clock, jobs: list[str]) -> WebhookSite:
    def deliver(job: Job) -> Deferred[Receipt]:
        jobs.append(job.id)
        return succeed(Receipt(Outcome.QUEUED, job.id, job.name))

    async def report() -> Mapping[str, object]:
        return {"status": "ok"}

    defaults = resolve({}, {}).sources["chatwoot"]
    source = intake.SourcePolicy(Authenticator((), (), 300), None, "chatwoot", defaults.job_options)
    takes = intake.Intake({"chatwoot": source}, intake.payload, chatwoot.hash_of_body, deliver)
    health = HealthApp(report, lambda: True).app.resource()
    app = WebhookApp(takes.accept, "chatwoot", lambda: 0, InFlight(1000, 1 << 30), health)
    return WebhookSite(
        app.app.resource(),
        clock,
        max_body_bytes=1 << 20,
        access_log=True,
        shortcut=Shortcut(app.app, app.failed),
    )


@contextmanager
def _no_failures() -> Iterator[None]:
    """Require that the block logs no failure."""
    failures: list[LogEvent] = []
    observer = cast(ILogObserver, lambda event: failures.append(event) if "log_failure" in event else None)
    globalLogPublisher.addObserver(observer)
    try:
        yield
    finally:
        globalLogPublisher.removeObserver(observer)
    _require(not failures, f"logged: {failures!r:.500}")


Target = Callable[[bytes], None]
TARGETS: Mapping[str, Target] = {"parse": parse, "verify": verify, "configure": configure, "edge": edge}


# -- seeds and changes --------------------------------------------------------------------------------------


def seeds(name: str) -> list[bytes]:
    """Return the seeds of a target."""
    found = [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]
    if name == "parse":
        found += [sample.body for sample in SAMPLES.values()]
    if name == "edge":
        found += [case.data for case in CASES if len(case.data) <= _MAX_SEED_BYTES]
    return found


_PIECES = [
    *(bytes([byte]) for byte in b'\r\n\x00 \t:,;"0-{}[]\xff'),
    b"\r\n",
    b"\xc3\xa9",
    b"\\u0000",
    b"\\ud800",
    b"Transfer-Encoding: chunked\r\n",
    b"Content-Length: 5\r\n",
    b"0\r\n\r\n",
    b"Connection: close\r\n",
    b"Upgrade: h2c\r\nConnection: Upgrade\r\n",
    b"Expect: 100-continue\r\n",
    b"HTTP/1.0",
]


@st.composite
def changed(draw: st.DrawFn, found: Sequence[bytes]) -> bytes:
    """Draw a seed with some bytes replaced, removed or doubled, perhaps followed by another seed."""
    data = draw(st.sampled_from(found))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.integers(start, min(len(data), start + 40)))
        piece = draw(
            st.one_of(
                st.sampled_from(_PIECES), st.binary(max_size=8), st.just(b""), st.just(data[start:end] * 2)
            )
        )
        data = data[:start] + piece + data[end:]
    if draw(st.booleans()):
        data += draw(st.sampled_from(found))
    return data


def attack(name: str, examples: int) -> Tally:
    """Run a target with this number of changed seeds."""
    tally = Tally(f"fuzz {name}, {examples:,} changed seeds")
    target = TARGETS[name]

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
    )
    @given(changed(seeds(name)))
    def run(data: bytes) -> None:
        tally.tried += 1
        target(data)

    try:
        run()
    except Exception as error:  # noqa: BLE001  # any exception is a finding
        notes = "; ".join(getattr(error, "__notes__", ()))
        tally.problems.append(f"{type(error).__name__}: {error} {notes}"[:2000])
    return tally


# -- by coverage --------------------------------------------------------------------------------------------


def attack_by_coverage(name: str, seconds: int) -> Tally:
    """Let atheris look for inputs that reach new code, in a separate process."""
    tally = Tally(f"fuzz {name}, {seconds} s by coverage")
    with TemporaryDirectory() as directory:
        found, given_seeds = Path(directory, "found"), Path(directory, "seeds")
        found.mkdir()
        given_seeds.mkdir()
        for number, seed in enumerate(seeds(name)):
            (given_seeds / str(number)).write_bytes(seed)
        command = [sys.executable, "-m", "tests.attack.coverage", name, str(found), str(given_seeds)]
        limits = [
            f"-max_total_time={seconds}",
            "-max_len=8192",
            "-rss_limit_mb=4096",
            f"-artifact_prefix={directory}/",
        ]
        ended = subprocess.run(
            [*command, *limits],
            capture_output=True,
            text=True,
            check=False,
            cwd=CORPUS.parents[2],
        )
        report = ended.stderr.splitlines()
        for line in report:
            if line.startswith("Done "):
                tally.tried = int(line.split()[1])
        if ended.returncode:
            tally.problems.append("\n".join([*ended.stdout.splitlines()[-20:], *report[-20:]]))
    return tally

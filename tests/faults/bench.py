"""The bench for one row: servers, replicas and load, from the start to the verdict.

A scenario uses the methods of the bench from top to bottom. All that it starts ends with the bench.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from enum import Flag, auto
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self, TypeVar

from attrs import field, frozen

from tests.support.daemon import Daemon
from tests.support.http import Response, exchange, request_bytes
from tests.support.process import ChildProcess, Resource, find_tool
from tests.support.proxy import Proxy
from tests.support.servers import RedisServer
from tests.support.webhooks import Webhook, outcome, post
from webhookd.bullmq.keys import QueueKeys

from .builds import Build
from .ledger import Attempt, Ledger, event, read_ledger, unanswered
from .oracle import KEEP_ALL_EVENTS, Verdict, judge, look_at_queue, spooled_ids

RATE = 500.0
"""Requests a second, including duplicates."""

GENTLE_RATE = 150.0
"""Requests a second that a busy machine can carry, too."""

OWN = 900_000_000
"""The number of the first event that scenarios send. The load sends those before it."""

P95_S = 0.050
DRAINED_WITHIN_S = 30.0
HANGS_AFTER_S = 90.0
"""Seconds after which an event that a scenario waits for will never come."""
LOCK_TTL_MS = 3_600_000

SAFE = ("appendonly yes", "appendfsync always")
EVERYSEC = ("appendonly yes", "appendfsync everysec")
INSTALLED = Build("as installed")

_POLL_INTERVAL_S = 0.1  # so seldom that it costs the daemon nothing
_REPOSITORY = Path(__file__).parents[2]
_T = TypeVar("_T", bound=ChildProcess)


class Load(ChildProcess):
    """The sender (`tests.faults.load`), with its ledger in its own directory."""

    name = "load"

    def __init__(self, *arguments: str, ports: Sequence[int], rate: float) -> None:
        super().__init__()
        self.ledger_path = self.directory / "ledger"
        self.ports = ports
        self._arguments = [*arguments, str(self.ledger_path), str(rate), *map(str, ports)]

    def argv(self) -> Sequence[str]:
        return [sys.executable, "-m", "tests.faults.load", *self._arguments]

    def environ(self) -> Mapping[str, str]:
        return {**super().environ(), "PYTHONPATH": str(_REPOSITORY)}

    def is_ready(self) -> bool:
        """Return true if it has sent something, or had nothing to send."""
        return self.ledger_path.exists() and (self.ledger_path.stat().st_size > 0 or self._has_ended())

    def _has_ended(self) -> bool:
        return self.process is not None and self.process.poll() == 0


class Replica(Daemon):
    """A webhookd of the bench.

    ``extra`` is added to its environment at the next start. ``wrapper`` is a command that runs it.
    """

    patience: Mapping[str, str] = {}

    def __init__(self, *options: str, directory: Path | None = None, wrapper: Sequence[str] = ()) -> None:
        super().__init__(*options, directory=directory)
        self.extra: dict[str, str] = {}
        self.wrapper = wrapper

    def argv(self) -> Sequence[str]:
        return [*self.wrapper, *super().argv()]

    def environ(self) -> Mapping[str, str]:
        return {**super().environ(), **self.extra}

    @property
    def spool_root(self) -> Path:
        """The root directory of its spool, which other replicas may share."""
        given = self.options[self.options.index("--spool") + 1] if "--spool" in self.options else "var/spool"
        return self.directory / given

    @property
    def health(self) -> Mapping[str, Any]:
        """The content of ``/health``."""
        content: Mapping[str, Any] = json.loads(self.get("/health").body)
        return content

    def is_degraded(self) -> bool:
        """Return true if ``/health`` says so."""
        return bool(self.health["status"] == "degraded")

    @property
    def is_drained(self) -> bool:
        """True if Redis is up, and the spool is empty."""
        response = self.get("/health")
        if response.status != 200:
            return False  # it is shutting down, or has too many connections
        health = json.loads(response.body)
        return bool(health["redis"].get("status") == "up" and health["spool"].get("records") == 0)

    def come_back(self) -> None:
        """Wait until a crash point ends the replica, and start it again without one."""
        self.wait()
        self.extra.pop("WEBHOOKD_CRASH_AT", None)
        self.start()


class Bench(Resource):
    """Everything that one scenario needs.

    At the end, the oracle looks for the jobs in `redis` and `queue`. The scenario itself has removed or
    broken the jobs in `deleted`. Those in `strangers` are in no ledger. `problems` are what is wrong, and
    `too_late` is what came, but too late.
    """

    def __init__(self, build: Build = INSTALLED, rate: float = RATE) -> None:
        self.rate = rate
        self.queue = QueueKeys("bull", "chatwoot")
        self.max_lock_ttl_ms = LOCK_TTL_MS
        self.redis: RedisServer | None = None
        self.replicas: list[Replica] = []
        self.proxies: list[Proxy] = []
        self.problems: list[str] = []
        self.too_late: list[str] = []
        self.notes: list[str] = []
        self.deleted: frozenset[str] = frozenset()
        self.strangers: frozenset[str] = frozenset()
        self.expected_corrupt = 0
        self.orphans_within_s = 1.0
        self._resources = ExitStack()
        self.directory = Path(self._resources.enter_context(TemporaryDirectory(prefix="webhookd-bench-")))
        self._build = build
        self._build_environ: Mapping[str, str] = {}
        self._loads: list[Load] = []
        self._ledgers: list[Path] = []

    # -- servers and load

    def start_redis(self, *config: str) -> RedisServer:
        """Start the Redis that the oracle will read."""
        self.redis = self.open(RedisServer(config=config))
        self.keep_all_events()
        return self.redis

    def keep_all_events(self) -> None:
        """Make the event stream of the queue keep the events that the oracle counts."""
        assert self.redis is not None
        with self.redis.client() as client:
            client.hset(self.queue.meta, "opts.maxLenEvents", str(KEEP_ALL_EVENTS))

    def start_proxy(self, port: int) -> Proxy:
        """Start a proxy in front of a port."""
        proxy = self._resources.enter_context(Proxy(port))
        self.proxies.append(proxy)
        return proxy

    def new_replica(self, redis: RedisServer | Proxy | str, *options: str, **settings: Any) -> Replica:
        """Return a webhookd with a Redis, a proxy or a URL. It is not started."""
        url = redis if isinstance(redis, str) else f"redis://127.0.0.1:{redis.port}/0"
        replica = Replica("--redis", url, *options, **settings)
        replica.extra.update(self._build_environ)
        self.replicas.append(replica)
        self._resources.callback(replica.close)
        return replica

    def start_replica(self, redis: RedisServer | Proxy | str, *options: str, **settings: Any) -> Replica:
        """Return a webhookd like `new_replica`, and start it."""
        return self.new_replica(redis, *options, **settings).start()

    def start_pair(self, *config: str) -> tuple[RedisServer, Replica]:
        """Start a Redis and its only webhookd."""
        redis = self.start_redis(*config)
        return redis, self.start_replica(redis)

    def open(self, child: _T) -> _T:
        """Start any child process."""
        self._resources.callback(child.close)
        return child.start()

    def defer(self, callback: Callable[[], object]) -> None:
        """Call a function at the end."""
        self._resources.callback(callback)

    # -- actions and checks

    @contextmanager
    def load(self, *targets: Any, rate: float | None = None) -> Iterator[Load]:
        """Send constant load to replicas, proxies or nginx while the block runs, until the last answer."""
        first = 1 + 10_000_000 * len(self._loads)
        ports = [target.port for target in targets]
        load = Load("--first", str(first), ports=ports, rate=rate or self.rate)
        self._loads.append(self.open(load))
        self._ledgers.append(load.ledger_path)
        yield load
        load.stop()

    @contextmanager
    def fault(self, *targets: Any) -> Iterator[None]:
        """Cause a fault under load while the block runs, and wait until the spools are drained."""
        with self.load(*targets):
            self.pause(1)
            yield
            self.wait_drained()
            self.pause(1)

    @contextmanager
    def ledger(self) -> Iterator[Ledger]:
        """Open a ledger for the events that the scenario sends itself."""
        path = self.directory / f"ledger-{len(self._ledgers)}"
        self._ledgers.append(path)
        with Ledger(path) as ledger:
            yield ledger

    def pause(self, seconds: float) -> None:
        """Let the load run."""
        time.sleep(seconds)

    def check(self, holds: object, what: str) -> None:
        """Check what the row demands in addition to the invariants."""
        if not holds:
            self.problems.append(what)

    def note(self, text: str) -> None:
        """Add a remark to the row of the table."""
        self.notes.append(text)

    def wait(self, condition: Callable[[], bool], what: str, within_s: float = 20.0) -> None:
        """Wait for a condition. It may be too late. If it never holds, that is a problem."""
        began_s = time.monotonic()
        while not condition():
            if time.monotonic() > began_s + HANGS_AFTER_S:
                self.problems.append(f"never: {what}")
                return
            time.sleep(_POLL_INTERVAL_S)
        took_s = time.monotonic() - began_s
        if took_s > within_s:
            self.too_late.append(f"after {took_s:.1f} s instead of {within_s:g} s: {what}")

    def wait_for_log(self, replica: Replica, text: str) -> None:
        """Wait until a replica logs a text."""
        self.wait(lambda: text in replica.log, f"the log says {text}")

    def send(self, replica: Replica, number: int) -> Response:
        """Send one event, and record it in a ledger."""
        with self.ledger() as ledger:
            serial = ledger.sends(number, replica.port)
            response = post(replica.port, event(number))
            ledger.answered(serial, *outcome(response))
        return response

    def warm_up(self) -> None:
        """Return when each replica has queued an event, so Redis is up, and the spool is open."""
        for place, replica in enumerate(self.replicas):
            numbers = count(2 * OWN + 1_000_000 * place)
            while b'"queued"' not in self.send(replica, next(numbers)).body:
                self.pause(0.1)

    def post_to(self, replica: Replica, path: str, webhook: Webhook) -> Response:
        """Send a webhook without recording it in a ledger."""
        return exchange(replica.port, request_bytes("POST", path, webhook.headers, webhook.body))

    def wait_drained(self, *replicas: Replica) -> float:
        """Wait until the spools of replicas, by default of all, are empty. Return the seconds."""
        began_s = time.monotonic()
        wanted = replicas or self.replicas
        self.wait(lambda: all(map(_is_drained, wanted)), "the spools are empty", DRAINED_WITHIN_S)
        return time.monotonic() - began_s

    def attempts(self) -> list[Attempt]:
        """Return all attempts so far."""
        return [attempt for path in self._ledgers for attempt in read_ledger(path)]

    # -- the end

    def settle(self) -> None:
        """Send again what was not acknowledged, wait until all spools are drained, and stop the replicas."""
        self._repeat_unanswered()
        self.wait_drained()
        self.wait(self._are_orphans_drained, "the orphans are drained", self.orphans_within_s)
        corrupt = sum(replica.health["spool"]["corruptRecords"] for replica in self.replicas)
        self.check(corrupt == self.expected_corrupt, f"{corrupt} records are counted as corrupt")
        for replica in self.replicas:
            self.check(replica.stop() == 0, "a replica does not end with exit code 0")

    def _are_orphans_drained(self) -> bool:
        directories = [path for root in self._spool_roots() for path in root.glob("replica-*")]
        return len(directories) <= len(self.replicas)

    def _repeat_unanswered(self) -> None:
        ports = [replica.port for replica in self.replicas if _is_up(replica)]
        for path in tuple(self._ledgers):
            if not unanswered(read_ledger(path)):
                continue
            load = Load("--repeat", str(path), ports=ports, rate=self.rate)
            self._ledgers.append(load.ledger_path)
            self.open(load)
            self.check(load.wait() == 0, "the repetition failed")

    def verdict(self, *, ordered: bool, truthful: bool) -> Verdict:
        """Return the verdict of the oracle."""
        assert self.redis is not None
        with self.redis.client() as client:
            held = look_at_queue(client, self.queue)
        return judge(
            self.attempts(),
            held,
            spooled_ids(self._spool_roots()),
            deleted=self.deleted,
            strangers=self.strangers,
            max_lock_ttl_ms=self.max_lock_ttl_ms,
            ordered=ordered,
            truthful=truthful,
        )

    def _spool_roots(self) -> set[Path]:
        return {replica.spool_root for replica in self.replicas}

    def logs(self) -> str:
        """Return the logs of the replicas, to find the cause of a problem."""
        return "\n".join(f"--- {replica.port}\n{_end_of(replica.log)}" for replica in self.replicas)

    def start(self) -> Self:
        self._build_environ = self._build.make(self.directory / "build")
        return self

    def close(self) -> None:
        self._resources.close()


def _end_of(log: str) -> str:
    lines = [line for line in log.splitlines() if "Scheduling retry" not in line]
    return "\n".join(lines[-30:])


def _is_drained(replica: Replica) -> bool:
    try:
        return replica.is_drained
    except OSError:
        return False


def _is_up(replica: Replica) -> bool:
    return replica.process is not None and replica.process.poll() is None and replica.is_ready()


Scenario = Callable[[Bench], None]


class Demand(Flag):
    """The demands of a row in addition to the invariants.

    P95: the 95th percentile of accepted requests is under 50 ms. ALL_TAKEN: each request is acknowledged.
    ORDERED and TRUTHFUL are described in `judge`.
    """

    P95 = auto()
    ALL_TAKEN = auto()
    ORDERED = auto()
    TRUTHFUL = auto()


P95, ALL_TAKEN, ORDERED, TRUTHFUL = Demand
NOTHING = Demand(0)


@frozen
class Row:
    """One fault of the table.

    Up to ``may_lose`` events may be lost. ``short`` rows run in `make test`, too. ``root`` rows need the
    rights to mount and to filter packets.
    """

    name: str
    fault: str
    expected: str
    scenario: Scenario = field(repr=False)
    build: Build = field(default=INSTALLED, repr=False)
    demands: Demand = NOTHING
    may_lose: int = 0
    short: bool = False
    root: bool = False


@frozen
class Result:
    """The result of a row: its verdict, and what is wrong.

    ``too_late`` is what came too late, as a busy machine can cause. ``is_late`` is true if only the 95th
    percentile was too high.
    """

    row: Row
    verdict: Verdict | None
    problems: Sequence[str]
    too_late: Sequence[str] = ()
    is_late: bool = False
    notes: Sequence[str] = ()
    took_s: float = 0.0
    not_run: str = ""
    logs: str = field(default="", repr=False)

    @property
    def holds(self) -> bool:
        """True if the row holds. The 95th percentile does not count."""
        return not self.problems and not self.too_late


def run(row: Row, *, build: Build | None = None, rate: float = RATE) -> Result:
    """Run one row, with its own build or another one."""
    if row.root and not _is_root():
        return Result(row, None, (), not_run="needs the right to mount and to filter packets")
    began_s = time.monotonic()
    with Bench(build or row.build, rate) as bench:
        try:
            row.scenario(bench)
            bench.settle()
            verdict = bench.verdict(ordered=ORDERED in row.demands, truthful=TRUTHFUL in row.demands)
        except Exception:  # noqa: BLE001 - the other rows run in any case
            return Result(row, None, [traceback.format_exc()], logs=bench.logs())
        problems = [*bench.problems, *verdict.violations, *_problems_of(row, verdict)]
        return Result(
            row,
            verdict,
            problems,
            too_late=[*bench.too_late, *verdict.too_late],
            is_late=P95 in row.demands and verdict.p95_s >= P95_S,
            notes=bench.notes,
            took_s=time.monotonic() - began_s,
            logs=bench.logs() if problems else "",
        )


def run_gently(row: Row, *, build: Build | None = None) -> Result:
    """Run one row with less load. The caller judges `problems` only, and no times."""
    return run(row, build=build, rate=GENTLE_RATE)


def _is_root() -> bool:
    """Return true if this process may mount, which root in a container often may not."""
    unshare = find_tool("unshare", "it is in Debian's package util-linux")
    return subprocess.run([unshare, "--mount", "true"], check=False, capture_output=True).returncode == 0


def _problems_of(row: Row, verdict: Verdict) -> Iterator[str]:
    lost = verdict.lost
    if len(lost) > row.may_lose:
        yield f"I1: lost {len(lost)}, such as {', '.join(sorted(lost)[:3])}"
    refused = verdict.refused - verdict.given_up
    if ALL_TAKEN in row.demands and refused:
        yield f"{refused} requests were not taken"

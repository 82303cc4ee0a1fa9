"""The cost of a request as something grows: bodies, the queue, connections, duplicates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from tests.support.webhooks import PATH
from webhookd.samples import SECRET

from .bodies import body_of, sample_body
from .comparison import COLUMNS, alone_us, medians, pooled, problems_of, rounds
from .figures import Figure, Section, number, ratios, share
from .load import ALWAYS_THE_SAME, Run, Shape, Wrk, close_loop, jobs_waiting
from .machine import Cores
from .servers import QUEUE, BenchRedis, Server, Webhookd

_ROUNDS = 3
_DURATION_S = 2
_WARM = Shape(2, signed=True)


class _World:
    """A Redis, a warm webhookd, and a load generator."""

    def __init__(self, cores: Cores, stack: ExitStack, *options: str) -> None:
        self.wrk = Wrk(cores.load)
        self.redis = stack.enter_context(BenchRedis(cores.redis))
        self.server = self.start(stack, cores.server, *options)

    def start(self, stack: ExitStack, core: int, *options: str) -> Server:
        """Start one more webhookd, and warm it up."""
        server: Server = stack.enter_context(Webhookd(core, self.redis, *options))
        close_loop(self.wrk, self.redis, [server], _WARM)
        return server

    def run(self, shape: Shape, *servers: Server) -> Run:
        """Run the load into an empty queue."""
        self.redis.empty()
        return close_loop(self.wrk, self.redis, servers or [self.server], shape)


def _section(title: str, note: str, runs: Mapping[str, Sequence[Run]], **more: Any) -> Section:
    """Return a table with a row for each step of growth; the ratio of CPU is against the first row."""
    first, *_ = runs.values()
    cpu_of_first = [run.cpu_us_per_request for run in first]
    rows = []
    for name, each in runs.items():
        ratio = ratios([run.cpu_us_per_request for run in each], cpu_of_first)
        rows.append([*medians(name, each, COLUMNS), ratio.text(2)])
    return Section(
        title=title,
        note=f"{note} {len(first)} rounds.",
        header=["", *(column.name for column in COLUMNS), "CPU against the first row"],
        rows=rows,
        problems=problems_of(runs),
        **more,
    )


def bodies(cores: Cores) -> Section:
    """Measure larger and larger messages."""
    shapes = {
        "3 kB": Shape(_DURATION_S, body=sample_body()),
        "1 kB": Shape(_DURATION_S, body=body_of(1_000)),
        "22 kB": Shape(_DURATION_S, body=body_of(22_000)),
        "300 kB": Shape(_DURATION_S, body=body_of(300_000)),
        "5 MB": Shape(_DURATION_S, body=body_of(5_000_000), connections=8),
    }
    with ExitStack() as stack:
        world = _World(cores, stack)
        runs = rounds(_ROUNDS, list(shapes), lambda name: world.run(shapes[name]))
    return _section("Growth: the body", "32 connections, and 8 for 5 MB.", runs)


def connections(cores: Cores) -> Section:
    """Measure more and more senders at once."""
    counts = {f"{count:,} connections": count for count in (8, 64, 512, 4000)}
    with ExitStack() as stack:
        world = _World(cores, stack)
        runs = rounds(
            _ROUNDS, list(counts), lambda name: world.run(Shape(_DURATION_S, connections=counts[name]))
        )
    note = "A closed loop: with more connections each waits longer, and the batches are larger."
    return _section("Growth: connections", note, runs)


def duplicates(cores: Cores) -> Section:
    """Measure repeated events."""
    repeats = {"none": 1, "50 %": 2, "100 %": ALWAYS_THE_SAME}
    with ExitStack() as stack:
        world = _World(cores, stack)
        runs = rounds(
            _ROUNDS, list(repeats), lambda name: world.run(Shape(_DURATION_S, repeat=repeats[name]))
        )
    note = "Each event is sent once, twice in a row, or always the same."
    return _section("Growth: duplicates", note, runs)


def replicas(cores: Cores) -> Section:
    """Measure two processes, each with its own load generator."""
    with ExitStack() as stack:
        world = _World(cores, stack)
        second = world.start(stack, cores.second_server)
        servers = {"1 replica": [world.server], "2 replicas": [world.server, second]}
        runs = rounds(_ROUNDS, list(servers), lambda name: world.run(Shape(_DURATION_S), *servers[name]))
    note = "Each replica has its own load generator. Processes on the same core (see below) share its speed."
    return _section("Growth: replicas", note, runs)


_TWO_SOURCES = f"""
[sources.checked]
secret = ["{SECRET}"]

[sources.trusted]
"""


def signature(cores: Cores, *, servers: int, count: int) -> Section:
    """Send the same signed requests to a source that checks them, and to one that has no secret.

    Both sources are in one process: two processes of the same program differ by about the cost of a
    signature, because of their memory layout. The runs are short, so both of a round see the same machine.
    """
    runs = pooled([_signature_runs(cores, count) for _ in range(servers)])
    of_cpu = share(
        [run.cpu_us_per_request for run in runs["checked"]],
        [run.cpu_us_per_request for run in runs["not checked"]],
    )
    checked_us = median(run.cpu_us_per_request for run in runs["checked"])
    body = sample_body()
    digest_us = alone_us(lambda: sha256(body).digest())
    note = (
        "The same requests with valid signatures, to two sources of one server: one has the secret, the "
        f"other has none. Checking is {of_cpu.text(1)} % of the CPU. {servers} servers. Each check needs "
        f"a SHA-256 of the body, which takes {number(digest_us, 1)} µs in a separate loop, "
        f"{number(100 * digest_us / checked_us, 1)} %."
    )
    return _section("Signature", note, runs, measured={Figure.SIGNATURE: of_cpu.median})


def _signature_runs(cores: Cores, count: int) -> Mapping[str, Sequence[Run]]:
    paths = {"not checked": f"{PATH}/trusted", "checked": f"{PATH}/checked"}
    with ExitStack() as stack:
        config = Path(stack.enter_context(TemporaryDirectory(prefix="webhookd-bench-"))) / "webhookd.toml"
        config.write_text(_TWO_SOURCES)
        world = _World(cores, stack, "--config", str(config))
        return rounds(count, list(paths), lambda name: world.run(Shape(1, signed=True, path=paths[name])))


# -- waiting jobs -------------------------------------------------------------------------------------------

_FILL_AT_ONCE = 10_000
_FILL = """
for i = ARGV[1], ARGV[2] do
  local id = 'chatwoot.message_created.6.' .. string.format('%.0f', i)
  redis.call('HSET', KEYS[1] .. id, 'name', 'message_created', 'data', '{"id":1}', 'opts', '{"attempts":3}',
    'timestamp', '1788264000000', 'delay', '0', 'priority', '0')
  redis.call('LPUSH', KEYS[2], id)
end
"""


def _fill(client: Any, count: int) -> None:
    """Add ``count`` small waiting jobs: list entries and hashes."""
    fill = client.register_script(_FILL)
    key = f"bull:{QUEUE}:"
    for first in range(0, count, _FILL_AT_ONCE):
        fill(keys=[key, f"{key}wait"], args=[first, min(first + _FILL_AT_ONCE, count) - 1])


def _take_back(client: Any, left: int) -> None:
    """Remove the newest jobs until ``left`` remain."""
    wait = f"bull:{QUEUE}:wait"
    newest = client.lrange(wait, 0, jobs_waiting(client) - left - 1)
    client.ltrim(wait, len(newest), -1)
    for first in range(0, len(newest), _FILL_AT_ONCE):
        ids = [job_id.decode() for job_id in newest[first : first + _FILL_AT_ONCE]]
        client.unlink(
            *(f"bull:{QUEUE}:{prefix}{job_id}" for job_id in ids for prefix in ("", "create-lock:"))
        )


def waiting_jobs(cores: Cores, *, count: int, duration_s: int) -> Section:
    """Measure queues of waiting jobs without workers, each in a separate Redis."""
    depths = {"0 waiting": 0, "10^4 waiting": 10**4, "10^6 waiting": 10**6}
    with ExitStack() as stack:
        worlds = {name: _World(cores, stack) for name in depths}
        clients = {
            name: stack.enter_context(world.redis.client(socket_timeout=60.0))
            for name, world in worlds.items()
        }
        for name, depth in depths.items():
            worlds[name].redis.empty()
            _fill(clients[name], depth)

        def measure(name: str) -> Run:
            world = worlds[name]
            run = close_loop(world.wrk, world.redis, [world.server], Shape(duration_s))
            _take_back(clients[name], depths[name])
            return run

        runs = rounds(count, list(depths), measure)
    cpu = {name: [run.cpu_us_per_request for run in each] for name, each in runs.items()}
    growth = ratios(cpu["10^6 waiting"], cpu["0 waiting"])
    note = "Each depth has its own Redis and webhookd. After each run, the jobs that it added are removed."
    return _section("Growth: waiting jobs", note, runs, measured={Figure.CPU_DEPTH: growth.median})


#: The sections that need only a few short runs.
SHORT: Sequence[Callable[[Cores], Section]] = (bodies, connections, replicas, duplicates)

"""The script and the real BullMQ of both lines: the same operations leave the same keys and values.

Each list of operations runs twice: in one database only with BullMQ, and in another with our script for the
adds and BullMQ for the rest. One Node process for each line (tests/node/differential.js) runs all lists.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import pytest
import redis
from attrs import frozen
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.bullmq import T0_MS, Queue, dump
from tests.support.process import Resource, node
from tests.support.servers import FLAVOURS, RedisServer
from webhookd.bullmq.script import AddResult, Wire
from webhookd.model import Job

LINES = {"bullmq5": Wire.V5, "bullmq6": Wire.V6}
REFERENCE_DB, OURS_DB = 0, 1
NODE_DIRECTORY = Path(__file__).parents[1] / "node"

Operation = dict[str, Any]


class BullMQ(Resource):
    """The real BullMQ of one line, in a Node process that runs operations."""

    def __init__(self, line: str) -> None:
        self.wire = LINES[line]
        self._process = subprocess.Popen(
            [node(), str(NODE_DIRECTORY / "differential.js"), line],
            env=dict(os.environ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, client: redis.Redis, operations: Sequence[Operation]) -> list[Any]:
        """Run operations on the database of a client, and return their results."""
        assert self._process.stdin
        assert self._process.stdout
        where = client.connection_pool.connection_kwargs
        request = {"port": where["port"], "db": where["db"], "operations": operations}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = json.loads(self._process.stdout.readline())
        assert isinstance(answer, list), answer["error"]
        return answer

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@frozen
class Bench:
    """The databases of the two runs, and the BullMQ of one line."""

    bullmq: BullMQ
    reference: redis.Redis
    ours: redis.Redis

    @classmethod
    @contextmanager
    def on(cls, server: RedisServer, bullmq: BullMQ) -> Iterator[Self]:
        with server.client(db=REFERENCE_DB) as reference, server.client(db=OURS_DB) as ours:
            yield cls(bullmq, reference, ours)

    def compare(
        self,
        operations: Sequence[Operation],
        *,
        defaults: Mapping[str, object] | None = None,
        writes_meta: bool = True,
        locks_live: bool = True,
    ) -> None:
        """Run a list both ways, and compare the results and the databases.

        ``defaults`` are the default job options of the team. Without ``writes_meta`` there is no
        ``meta.version``, and the wire is configured. Without ``locks_live`` each lock has expired when the
        next job comes.
        """
        self.reference.flushdb()
        self.ours.flushdb()
        opening = {"name": "open", "now_ms": T0_MS, "writes_meta": writes_meta, "defaults": defaults or {}}
        jobs = [job for operation in operations for job in operation.get("jobs", ())]
        ids = sorted({job["options"]["jobId"] for job in jobs})
        looking = {"name": "look", "now_ms": T0_MS, "ids": ids}
        whole = [opening, *operations, looking]
        wire = Wire.AUTO if writes_meta else self.bullmq.wire

        expected_results = self.bullmq.run(self.reference, whole)
        results: list[Any] = []
        for operation in whole:
            if operation["name"] in ("add", "addBulk"):
                self._add(operation["jobs"], operation["now_ms"], defaults or {}, wire, locks_live=locks_live)
                results.append(None)
            else:
                results += self.bullmq.run(self.ours, [operation])

        assert results == expected_results
        left = {key: value for key, value in dump(self.ours).items() if ":create-lock:" not in key}
        assert left == dump(self.reference)

    def _add(
        self,
        jobs: Sequence[Mapping[str, Any]],
        now_ms: int,
        defaults: Mapping[str, object],
        wire: Wire,
        *,
        locks_live: bool,
    ) -> None:
        queue = Queue(self.ours)
        for job in jobs:
            # BullMQ forgets an id with its job, but our lock does not. All other effects are compared.
            job_id = job["options"]["jobId"]
            if not locks_live or not self.ours.exists(queue.keys.job(job_id)):
                self.ours.delete(queue.keys.create_lock(job_id))
        is_known = {job["options"]["jobId"]: self._is_known(queue, job) for job in jobs}
        answers = queue.add(*(_encoded(queue, job, now_ms, defaults) for job in jobs), wire=wire)
        for job, answer in zip(jobs, answers, strict=True):
            job_id = job["options"]["jobId"]
            assert answer is (is_known[job_id] or AddResult.ADDED)
            if answer is AddResult.ADDED:
                assert self.ours.get(queue.keys.create_lock(job_id)) == queue.set_by.encode()
                is_known[job_id] = AddResult.LOCK_HELD

    def _is_known(self, queue: Queue, job: Mapping[str, Any]) -> AddResult | None:
        job_id = job["options"]["jobId"]
        if self.ours.exists(queue.keys.create_lock(job_id)):
            return AddResult.LOCK_HELD
        return AddResult.JOB_EXISTS if self.ours.exists(queue.keys.job(job_id)) else None


def _encoded(queue: Queue, job: Mapping[str, Any], now_ms: int, defaults: Mapping[str, object]) -> Job:
    options = {**defaults, **job["options"]}
    job_id = options.pop("jobId")
    return queue.job(job_id, name=job["name"], data=job["data"], at_ms=now_ms, **options)


@pytest.fixture(scope="module")
def fleet() -> Iterator[Mapping[str, BullMQ]]:
    with ExitStack() as stack:
        yield {line: stack.enter_context(BullMQ(line)) for line in LINES}


@pytest.fixture(scope="module", params=FLAVOURS)
def any_server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    with RedisServer(request.param) as server:
        yield server


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture(params=LINES)
def bench(
    request: pytest.FixtureRequest, fleet: Mapping[str, BullMQ], server: RedisServer
) -> Iterator[Bench]:
    with Bench.on(server, fleet[request.param]) as bench:
        yield bench


# Operations


def op(name: str, *, at_ms: int = T0_MS, **details: object) -> Operation:
    return {"name": name, "now_ms": at_ms, **details}


def job(job_id: str, *, name: str = "created", data: str = "{}", **options: object) -> dict[str, object]:
    return {"name": name, "data": data, "options": {"jobId": job_id, **options}}


def add(
    job_id: str, *, at_ms: int = T0_MS, name: str = "created", data: str = "{}", **options: object
) -> Operation:
    return op("add", at_ms=at_ms, jobs=[job(job_id, name=name, data=data, **options)])


def bulk(*jobs: dict[str, object]) -> Operation:
    return op("addBulk", jobs=list(jobs))


PAUSE, RESUME, TAKE, COMPLETE, FAIL = op("pause"), op("resume"), op("take"), op("complete"), op("fail")

ODD_DATA = (
    '{"text":"naïve \\"quotes\\" / \\\\ \\n\\t\\u0001 \U0001f600 \u2028","a/b":"</script>"}',
    '{"int":9007199254740991,"negative":-1,"float":0.1,"large":1e+21,"small":1e-7,"third":0.3333333333333333}',
    '{"empty":{},"list":[],"null":null,"nested":[[1,[2,{"a":[]}]]],"flags":[true,false]}',
    "null",
    '"a text"',
    "[1,2,3]",
    "0",
)

LISTS: dict[str, list[Operation]] = {
    "plain": [add("a.1"), add("a.2", data='{"x":1}'), add("a.3", name="updated")],
    "attempts, backoff, remove": [
        add("a.1", attempts=5, backoff={"type": "exponential", "delay": 1000, "jitter": 0.5}),
        add("a.2", backoff=2000, removeOnComplete=True, removeOnFail=50, attempts=3),
        add("a.3", removeOnComplete={"age": 3600, "count": 1000}, removeOnFail={"age": 86400, "limit": 10}),
        add(
            "a.4", keepLogs=10, stackTraceLimit=5, sizeLimit=100_000, removeOnComplete=False, removeOnFail=-1
        ),
        *[TAKE, COMPLETE, TAKE, FAIL, TAKE, COMPLETE, TAKE, FAIL],
    ],
    "delay": [add("a.1", delay=5000), add("a.2", delay=1000), add("a.3", delay=0), add("a.4", delay=10**12)],
    "delays in one millisecond": [
        add("a.1", delay=1000),
        add("a.2", delay=1000),
        add("a.3", delay=999, at_ms=T0_MS + 1),
        add("a.4", delay=1001),
        op("take", at_ms=T0_MS + 1000),
        add("a.5", delay=500, at_ms=T0_MS + 500),
        op("promote", id="a.3"),
    ],
    "a delay marker with a fraction": [
        add("a.1", delay=1000),
        add("a.2", delay=1000),
        op("promote", id="a.1"),
        add("a.3", delay=2000),
    ],
    "delay wins over priority and lifo": [
        add("a.1", delay=10, priority=3, lifo=True),
        op("take", at_ms=T0_MS + 10),
        op("look", ids=["a.1"]),
    ],
    "priority": [
        add("a.1", priority=5),
        add("a.2", priority=1),
        add("a.3", priority=5),
        add("a.4"),
        add("a.5", priority=2_097_151),
        add("a.6", priority=0),
        TAKE,
        TAKE,
    ],
    "priority wins over lifo": [
        add("a.1", priority=2),
        add("a.2", priority=2, lifo=True),
        add("a.3", lifo=True),
    ],
    "lifo": [add("a.1"), add("a.2", lifo=True), add("a.3", lifo=False), TAKE],
    "paused": [
        add("a.1"),
        PAUSE,
        add("a.2"),
        add("a.3", lifo=True),
        add("a.4", priority=1),
        add("a.5", delay=50),
        TAKE,
    ],
    "paused while empty": [PAUSE, add("a.1"), bulk(job("a.2"), job("a.3", lifo=True), job("a.1"))],
    "paused, then resumed": [add("a.1"), PAUSE, add("a.2"), RESUME, add("a.3"), TAKE, TAKE, TAKE],
    "a known id, waiting": [
        add("a.1"),
        add("a.1", name="other", data="[1]", attempts=9, priority=4, delay=5),
    ],
    "a known id, active": [add("a.1"), TAKE, add("a.1"), COMPLETE],
    "a known id, completed": [add("a.1"), TAKE, COMPLETE, add("a.1", priority=1)],
    "a known id, failed": [add("a.1"), TAKE, FAIL, add("a.1", delay=1)],
    "a known id, delayed or prioritized": [
        add("a.1", delay=9),
        add("a.1"),
        add("a.2", priority=9),
        add("a.2"),
    ],
    "a known id, removed": [add("a.1"), op("remove", id="a.1"), add("a.1")],
    "bulk": [
        bulk(job("a.1"), job("a.2", priority=1), job("a.3", delay=7), job("a.4", lifo=True), job("a.1")),
        bulk(job("a.5"), job("a.2")),
    ],
    "global concurrency": [
        op("setConcurrency", concurrency=1),
        add("a.1"),
        TAKE,
        add("a.2"),
        add("a.3", priority=1),
        add("a.4", delay=3),
        TAKE,
        COMPLETE,
        add("a.5"),
    ],
    "global concurrency at its limit, no marker": [
        op("setConcurrency", concurrency=1),
        add("a.1"),
        TAKE,
        PAUSE,
        RESUME,
        add("a.2"),
    ],
    "few events": [op("setMaxEvents", max_events=3), *(add(f"a.{i}") for i in range(150)), add("a.1")],
    "no events": [op("setMaxEvents", max_events=0), add("a.1"), add("a.1"), add("a.2", delay=1)],
    "odd data": [add(f"a.{i}", data=data) for i, data in enumerate(ODD_DATA)],
    "odd names": [add("a.1", name=""), add("a.2", name="naïve \U0001f600\n"), add("a.3", name="a:b {c} *")],
    "odd ids": [add("A-1_2.x"), add("1e3"), add("-"), add("x" * 255)],
}


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("name", LISTS)
def test_named_lists(fleet: Mapping[str, BullMQ], any_server: RedisServer, line: str, name: str) -> None:
    with Bench.on(any_server, fleet[line]) as bench:
        bench.compare(LISTS[name])


@pytest.mark.parametrize("name", LISTS)
def test_with_a_configured_wire(bench: Bench, name: str) -> None:
    bench.compare(LISTS[name], writes_meta=False)


@pytest.mark.parametrize("name", LISTS)
def test_after_the_locks_expired(bench: Bench, name: str) -> None:
    bench.compare(LISTS[name], locks_live=False)


def test_default_options(bench: Bench) -> None:
    defaults = {"attempts": 3, "backoff": {"type": "exponential", "delay": 9}, "removeOnComplete": {"age": 1}}
    bench.compare([add("a.1"), add("a.2", attempts=1, lifo=True)], defaults=defaults)


def test_the_comparison_bites(bench: Bench) -> None:
    """One different byte in one job is found."""
    bench.compare([add("a.1")])
    bench.ours.hset("bull:q:a.1", "data", "{ }")
    assert dump(bench.ours)["bull:q:a.1"] != dump(bench.reference)["bull:q:a.1"]


# Random lists

IDS = ("a.1", "a.2", "a.3", "a.4")

_keep = st.one_of(
    st.booleans(),
    st.integers(-1, 3),
    st.fixed_dictionaries({}, optional={"age": st.integers(0, 100), "count": st.integers(0, 3)}),
)
_backoff = st.one_of(
    st.integers(0, 10_000),
    st.fixed_dictionaries(
        {"type": st.sampled_from(("fixed", "exponential")), "delay": st.integers(0, 10_000)},
        optional={"jitter": st.sampled_from((0, 0.1, 0.25, 1))},
    ),
)
_options = st.fixed_dictionaries(
    {},
    optional={
        "attempts": st.integers(0, 3),
        "backoff": _backoff,
        "removeOnComplete": _keep,
        "removeOnFail": _keep,
        "priority": st.sampled_from((0, 1, 2, 2_097_151)),
        "delay": st.sampled_from((0, 1, 2, 1000)),
        "lifo": st.booleans(),
        "keepLogs": st.integers(0, 100),
        "stackTraceLimit": st.integers(0, 10),
    },
)
_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
# JSON.stringify writes digits as keys before all others.
_member = _text.filter(lambda text: not text.isdigit())
_value = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**53) + 1, 2**53 - 1), _text),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(_member, inner, max_size=3)),
    max_leaves=6,
)
_data = _value.map(lambda value: json.dumps(value, ensure_ascii=False, separators=(",", ":")))
_job = st.builds(
    lambda job_id, name, data, options: job(job_id, name=name, data=data, **options),
    st.sampled_from(IDS),
    st.sampled_from(("created", "", "naïve")),
    _data,
    _options,
)
_operation = st.one_of(
    st.builds(lambda one: op("add", jobs=[one]), _job),
    st.builds(lambda many: bulk(*many), st.lists(_job, min_size=1, max_size=5)),
    st.sampled_from((PAUSE, RESUME, TAKE, TAKE, COMPLETE, FAIL)),
    st.sampled_from(IDS).map(lambda job_id: op("remove", id=job_id)),
    st.sampled_from(IDS).map(lambda job_id: op("promote", id=job_id)),
    st.integers(1, 2).map(lambda concurrency: op("setConcurrency", concurrency=concurrency)),
    st.sampled_from((0, 1, 100)).map(lambda max_events: op("setMaxEvents", max_events=max_events)),
)


@st.composite
def _lists(draw: st.DrawFn) -> list[Operation]:
    now_ms = T0_MS
    operations = []
    for operation in draw(st.lists(_operation, min_size=1, max_size=12)):
        now_ms += draw(st.sampled_from((0, 0, 1, 1000)))
        operations.append({**operation, "now_ms": now_ms})
    return operations


def test_random_lists(bench: Bench) -> None:
    # An inner function, because pytest-twisted wraps a test of Hypothesis again for each parameter.
    @settings(max_examples=200, derandomize=True, database=None, deadline=None)
    @given(operations=_lists(), writes_meta=st.booleans(), locks_live=st.booleans())
    def check(*, operations: list[Operation], writes_meta: bool, locks_live: bool) -> None:
        bench.compare(operations, writes_meta=writes_meta, locks_live=locks_live)

    check()


# A fleet of both lines: no job is lost, if one line pauses the queue and the other resumes it


@pytest.mark.parametrize("version", ["bullmq:5.81.5", "bullmq:6.7.0", "bullmq-pro:7.0.0", None])
@pytest.mark.parametrize("resumed_by", LINES)
@pytest.mark.parametrize("paused_by", LINES)
@pytest.mark.parametrize("before", [0, 2])
def test_pause_in_a_mixed_fleet(
    fleet: Mapping[str, BullMQ],
    server: RedisServer,
    paused_by: str,
    resumed_by: str,
    version: str | None,
    before: int,
) -> None:
    with server.client() as client:
        client.flushdb()
        queue = Queue(client)
        opening = op("open", writes_meta=False, defaults={})
        fleet[paused_by].run(client, [opening, *(add(f"a.{i}") for i in range(before)), PAUSE])
        if version:
            client.hset(queue.keys.meta, "version", version)

        assert queue.add(queue.job("b.1"), queue.job("b.2")) == [AddResult.ADDED] * 2
        fleet[resumed_by].run(client, [opening, RESUME])

        expected = [*(f"a.{i}" for i in range(before)), "b.1", "b.2"]
        taken = fleet[resumed_by].run(client, [TAKE] * (len(expected) + 1))
        assert [answer and answer["id"] for answer in taken] == [*expected, None]

"""The lower limit for any change: Redis with only our script, and Twisted with only llhttp."""

from __future__ import annotations

import subprocess
from typing import Any

from tests.support.process import find_tool
from webhookd.bullmq.keys import QueueKeys
from webhookd.bullmq.options import JobOptions
from webhookd.bullmq.script import ADD_JOBS, Wire, add_jobs_arguments
from webhookd.config import DEFAULT_JOB_OPTIONS
from webhookd.model import Job

from .bodies import ID_MARK, sample_body
from .figures import Section, number
from .load import RedisUsage, Shape, Wrk, cpu_s
from .machine import Cores, pinned
from .outputs import read_redis_benchmark
from .servers import QUEUE, BenchRedis, Echo

_JOBS = 100_000
_RANDOM = "__rand_int__"  # redis-benchmark replaces each with 12 random digits
_CLIENTS = 8


def floor(cores: Cores, *, duration_s: int) -> Section:
    """Measure the script with three batch sizes, and the bare protocol."""
    with BenchRedis(cores.redis) as redis, redis.client() as client:
        rows = [_script(cores, redis, client, batch) for batch in (1, 32, 128)]
    rows.append(_echo(cores, duration_s))
    return Section(
        title="The floor",
        note="webhookd's script, called by redis-benchmark with 3 kB per job, without HTTP; and llhttp in a "
        "bare Twisted protocol that reads each 3 kB, answers, and queues nothing.",
        header=["", "jobs or requests/s", "CPU µs, Redis", "CPU µs, server"],
        rows=rows,
    )


def _script(cores: Cores, redis: BenchRedis, client: Any, batch: int) -> list[str]:
    """Call the script with ``batch`` jobs. The ids of list, hash and lock differ: Redis has the same work."""
    redis.empty()
    keys, arguments = add_jobs_arguments(
        QueueKeys("bull", QUEUE), [_job()] * batch, lock_ttl_ms=3_600_000, wire=Wire.AUTO, set_by="bench:3001"
    )
    sha1 = client.script_load(ADD_JOBS.text)
    command = [
        find_tool("redis-benchmark", "it is in Debian's package redis-tools"),
        *("-p", str(redis.port), "-n", str(_JOBS // batch), "-c", str(_CLIENTS), "-r", "1000000000000"),
        *("--csv", "evalsha", sha1, str(len(keys)), *keys, *arguments),
    ]
    before = RedisUsage.of(client)
    done = subprocess.run(pinned(cores.load, command), capture_output=True, text=True, check=True)
    used = RedisUsage.of(client)
    jobs = (used.calls - before.calls) * batch
    rate = read_redis_benchmark(done.stdout) * batch
    cpu_us = (used.cpu_us - before.cpu_us) / jobs
    return [
        f"script, {batch} {'job' if batch == 1 else 'jobs'} per call",
        number(rate, 0),
        number(cpu_us, 1),
        "",
    ]


def _job() -> Job:
    return Job(
        queue=QUEUE,
        id=f"chatwoot.message_created.7.{_RANDOM}",
        name="message_created",
        data=sample_body().replace(ID_MARK, _RANDOM.encode()),
        options=JobOptions.from_mapping(DEFAULT_JOB_OPTIONS).encode("chatwoot.message_created.7.0"),
        timestamp_ms=1_788_264_000_000,
    )


def _echo(cores: Cores, duration_s: int) -> list[str]:
    wrk = Wrk(cores.load)
    with Echo(cores.server) as server:
        wrk.run(server.port, Shape(1))
        before = cpu_s(server.pid)
        answers = wrk.run(server.port, Shape(duration_s))
        cpu_us = 1e6 * (cpu_s(server.pid) - before) / answers.ok
    return ["llhttp on Twisted, no Redis", number(answers.per_second, 0), "", number(cpu_us, 1)]

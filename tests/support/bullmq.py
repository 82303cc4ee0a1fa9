"""BullMQ queues for the tests: our script on a synchronous client, and the content of a server."""

from __future__ import annotations

import json
from typing import Any

from attrs import field, frozen

from webhookd.bullmq.keys import QueueKeys
from webhookd.bullmq.options import JobOptions
from webhookd.bullmq.script import ADD_JOBS, AddError, AddResult, Wire, add_jobs_arguments, read_reply
from webhookd.model import Job

T0_MS = 1_700_000_000_000
"""The time at which the jobs of the tests are received."""


@frozen
class Queue:
    """One queue, to which the script adds jobs."""

    client: Any  # a `redis.Redis`: its types leave open whether replies are bytes
    keys: QueueKeys = field(default=QueueKeys("bull", "q"))
    lock_ttl_ms: int = 60_000
    set_by: str = "the tests"

    def job(
        self, job_id: str, *, name: str = "created", data: str = "{}", at_ms: int = T0_MS, **options: object
    ) -> Job:
        """Return a job of this queue, encoded as by the daemon. ``options`` are BullMQ's."""
        job_options = JobOptions.from_mapping(options)
        return Job(
            queue=self.keys.queue,
            id=job_id,
            name=name,
            data=data.encode(),
            options=job_options.encode(job_id),
            timestamp_ms=at_ms,
            delay_ms=job_options.delay_ms,
            priority=job_options.priority,
            lifo=job_options.lifo,
        )

    def add(self, *jobs: Job, wire: Wire = Wire.AUTO) -> list[AddResult | AddError]:
        """Call the script once."""
        keys, argv = add_jobs_arguments(
            self.keys, jobs, lock_ttl_ms=self.lock_ttl_ms, wire=wire, set_by=self.set_by
        )
        return read_reply(self.client.eval(ADD_JOBS.text.decode(), len(keys), *keys, *argv), len(jobs))

    def events(self, name: str | None = None) -> list[dict[bytes, bytes]]:
        """Return the events of one name, or all, in order."""
        entries = [fields for _, fields in self.client.xrange(self.keys.events)]
        return [fields for fields in entries if name is None or fields[b"event"] == name.encode()]

    def held_ids(self) -> list[str]:
        """Return the id of each entry of the lists and sets that hold jobs, with repetitions."""
        held: list[bytes] = []
        for key in self.keys.wait, self.keys.paused, self.keys.active:
            if self.client.type(key) == b"list":
                held += self.client.lrange(key, 0, -1)
        finished = self.keys.job("completed"), self.keys.job("failed")
        for key in self.keys.prioritized, self.keys.delayed, *finished:
            if self.client.type(key) == b"zset":
                held += self.client.zrange(key, 0, -1)
        return [job_id.decode() for job_id in held]

    def faults(self) -> list[str]:
        """Return what must not exist right after an add. Later, a lock can outlive its job.

        That is a lock without its job, a job in no list, an entry without its job, or a double entry.
        """
        head = self.keys.job("")
        names = {key.decode().removeprefix(head) for key in self.client.keys(f"{_literal(head)}*")}
        locked = {name.removeprefix("create-lock:") for name in names if name.startswith("create-lock:")}
        jobs = {name for name in names if self._is_job(name)}
        held = self.held_ids()
        return [
            *(f"a lock without its job: {job_id}" for job_id in sorted(locked - jobs)),
            *(f"a job that nothing holds: {job_id}" for job_id in sorted(jobs - set(held))),
            *(f"an entry without its job: {job_id}" for job_id in sorted(set(held) - jobs)),
            *(f"held twice: {job_id}" for job_id in sorted(set(held)) if held.count(job_id) > 1),
        ]

    def _is_job(self, name: str) -> bool:
        key = self.keys.job(name)
        return key != self.keys.meta and ":" not in name and self.client.type(key) == b"hash"


def _literal(pattern: str) -> str:
    """Escape a text for KEYS."""
    return "".join(f"\\{char}" if char in r"*?[]\^" else char for char in pattern)


def dump(client: Any) -> dict[str, object]:
    """Return the content of a database: the type, time to live in tens of seconds and value of each key.

    The options of a job are parsed, because BullMQ writes them in any order. The ids of streams are left out.
    """
    return {key.decode(): _dump_key(client, key) for key in sorted(client.keys())}


def _dump_key(client: Any, key: bytes) -> object:
    kind = client.type(key).decode()
    ttl_ms = client.pttl(key)
    return kind, -1 if ttl_ms < 0 else round(ttl_ms / 10_000), _contents(client, key, kind)


def _contents(client: Any, key: bytes, kind: str) -> Any:
    match kind:
        case "string":
            return client.get(key)
        case "list":
            return client.lrange(key, 0, -1)
        case "set":
            return client.smembers(key)
        case "zset":
            return client.zrange(key, 0, -1, withscores=True)
        case "stream":
            return [list(fields.items()) for _, fields in client.xrange(key)]
        case "hash":
            fields = client.hgetall(key)
            return {**fields, b"opts": json.loads(fields[b"opts"])} if b"opts" in fields else fields
    raise AssertionError(f"{key!r} is a {kind}")

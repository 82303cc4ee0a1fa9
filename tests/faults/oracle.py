"""The oracle, which compares the answers to the sender with the jobs in Redis and the spools."""

from __future__ import annotations

import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from attrs import frozen

from tests.support.bullmq import Queue
from webhookd.bullmq.keys import QueueKeys
from webhookd.spool.directory import DATABASE_NAME

from .ledger import Attempt

SLOWEST_S = 4.0
"""Chatwoot cuts at 5 s."""

KEEP_ALL_EVENTS = 10_000_000
"""The ``opts.maxLenEvents`` of a queue that must keep all events for the oracle."""

_LOCK = "create-lock:"


@frozen
class Held:
    """The content of a queue.

    ``entries`` counts each job in the lists and sets. ``hashes`` are the jobs with a hash. ``added`` are the
    added jobs, in order. ``locks`` is the remaining time of each lock in milliseconds, or -1 without an end.
    """

    entries: Mapping[str, int]
    hashes: frozenset[str]
    added: Sequence[str]
    locks: Mapping[str, int]


def look_at_queue(client: Any, keys: QueueKeys) -> Held:
    """Read a whole queue. No program may write to it at the same time."""
    queue = Queue(client, keys)
    head = keys.job("")
    names = [name.decode().removeprefix(head) for name in client.scan_iter(_literal(head) + "*", count=5000)]
    locked = [name.removeprefix(_LOCK) for name in names if name.startswith(_LOCK)]
    return Held(
        entries=Counter(queue.held_ids()),
        # The ids of our jobs have dots, and the queue's own keys have none.
        hashes=frozenset(name for name in names if "." in name and ":" not in name),
        added=[fields[b"jobId"].decode() for fields in queue.events("added")],
        locks=dict(zip(locked, _ttls_ms(client, [keys.create_lock(name) for name in locked]), strict=True)),
    )


def _literal(text: str) -> str:
    return text.replace("[", "\\[")


def _ttls_ms(client: Any, keys: Sequence[str]) -> list[int]:
    pipeline = client.pipeline(transaction=False)
    for key in keys:
        pipeline.pttl(key)
    return list(pipeline.execute())


def spooled_ids(roots: Iterable[Path]) -> list[str]:
    """Return the job ids of all live records below spool roots. Their daemons must have ended."""
    found: list[str] = []
    for root in roots:
        for path in root.glob(f"replica-*/{DATABASE_NAME}"):
            with closing(sqlite3.connect(path)) as connection:
                found += [job_id for (job_id,) in connection.execute("SELECT job_id FROM live")]
    return found


@frozen
class Verdict:
    """The result of one run: counts and times for the table, and the violations.

    ``refused`` requests were not acknowledged. The sender gave up ``given_up`` of them. ``lost`` are the keys
    that were acknowledged, and are neither a job nor in a spool. ``too_late`` are the violations that a busy
    machine can cause.
    """

    requests: int
    refused: int
    given_up: int
    acknowledged: int
    lost: frozenset[str]
    doubled: frozenset[str]
    p95_s: float
    slowest_s: float
    violations: Sequence[str]
    too_late: Sequence[str]


def judge(
    attempts: Sequence[Attempt],
    held: Held,
    spooled: Sequence[str],
    *,
    deleted: frozenset[str],
    strangers: frozenset[str],
    max_lock_ttl_ms: int,
    ordered: bool,
    truthful: bool,
) -> Verdict:
    """Apply the invariants.

    The jobs in ``deleted`` may be missing, because the scenario deleted or broke them. Those in ``strangers``
    were sent without a ledger. ``ordered`` demands that the jobs of a replica are in the queue in the order
    in which it accepted them. ``truthful`` demands that no first request for an event is called a duplicate.
    """
    sent = {attempt.key for attempt in attempts}
    acknowledged = {attempt.key for attempt in attempts if attempt.is_acknowledged}
    added = Counter(held.added)
    safe = (held.hashes & held.entries.keys()) | set(spooled)
    doubled = {key for counts in (added, held.entries) for key, times in counts.items() if times > 1}
    answered = sorted(attempt.latency_s for attempt in attempts if attempt.status)
    return Verdict(
        requests=len(attempts),
        refused=sum(not attempt.is_acknowledged for attempt in attempts),
        given_up=sum(attempt.was_given_up for attempt in attempts),
        acknowledged=len(acknowledged),
        lost=frozenset(acknowledged - safe - deleted),
        doubled=frozenset(doubled),
        p95_s=percentile([each.latency_s for each in attempts if each.is_acknowledged], 0.95),
        slowest_s=max(answered, default=0.0),
        violations=[
            *_about("I2: added twice", doubled),
            *_about("I3: sent again, and still not taken", sent - acknowledged),
            *_about("I6: a lock without its job", held.locks.keys() - added.keys() - deleted),
            *_about(
                "I6: a lock without an end, or one that is too late",
                {key for key, ttl_ms in held.locks.items() if ttl_ms == -1 or ttl_ms > max_lock_ttl_ms},
            ),
            *_about("a job that was not sent", held.entries.keys() - sent - strangers),
            *_about("a job that no list holds", held.hashes - held.entries.keys()),
            *_about("out of order", _overtaken(attempts, held.added) if ordered else ()),
            *_about("called a duplicate, and is none", _misnamed(attempts) if truthful else ()),
        ],
        too_late=_too_late(attempts),
    )


def percentile(values: Iterable[float], share: float) -> float:
    """Return the value that a share of the values does not exceed, or 0 without values."""
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)] if ordered else 0.0


def _about(what: str, keys: Iterable[str]) -> list[str]:
    found = sorted(keys)
    return [f"{what}: {len(found)}, such as {', '.join(found[:3])}"] if found else []


def _too_late(attempts: Sequence[Attempt]) -> list[str]:
    """Return the answers that are too late, and the requests that the sender gave up."""
    late = [
        attempt
        for attempt in attempts
        if attempt.latency_s > SLOWEST_S and (attempt.status or attempt.was_given_up)
    ]
    return _about(f"I4: no answer within {SLOWEST_S:g} s", {attempt.key for attempt in late})


def _misnamed(attempts: Sequence[Attempt]) -> set[str]:
    first: dict[str, Attempt] = {}
    for attempt in sorted(attempts, key=lambda each: each.sent_s):
        first.setdefault(attempt.key, attempt)
    second_s: dict[str, float] = defaultdict(lambda: float("inf"))
    for attempt in attempts:
        if attempt is not first[attempt.key]:
            second_s[attempt.key] = min(second_s[attempt.key], attempt.sent_s)
    return {
        key
        for key, attempt in first.items()
        if attempt.outcome == "already_queued" and second_s[key] > (attempt.answered_s or 0.0)
    }


def _overtaken(attempts: Sequence[Attempt], added: Sequence[str]) -> set[str]:
    """Return the events that overtook another one, which the same replica had acknowledged before.

    Requests that were under way at the same time have no order. Events that were sent twice, or not answered,
    are left out, because it is unknown which of the requests counted.
    """
    times = Counter(attempt.key for attempt in attempts)
    taken = {each.key: each for each in attempts if times[each.key] == 1 and each.is_acknowledged}
    overtaken: set[str] = set()
    earliest_answer_s: dict[int, float] = {}
    for key in reversed(added):
        attempt = taken.get(key)
        if attempt is None or attempt.answered_s is None:
            continue
        later_s = earliest_answer_s.get(attempt.port, float("inf"))
        if later_s < attempt.sent_s:
            overtaken.add(key)
        earliest_answer_s[attempt.port] = min(later_s, attempt.answered_s)
    return overtaken

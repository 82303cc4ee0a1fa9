"""``webhookd jobs``: the jobs in the queues, and why an event became a job or did not.

The daemon's Redis user may only count jobs. All other commands need the user for operators. Both are in
``conf/redis-acl.conf``.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import click
from attrs import frozen

from webhookd.bullmq.keys import QueueKeys, check_job_id
from webhookd.chatwoot import payload as chatwoot
from webhookd.cli.redis import RedisSession, ask_redis
from webhookd.cli.settings import configured, find_source, source_option
from webhookd.cli.terminal import Negative, Progress, WrongUse, duration, json_option, print_json, print_table
from webhookd.clock import wall_clock_ms
from webhookd.config import Config
from webhookd.model import Delivery
from webhookd.text import printable

# BullMQ's states, in the order in which a job passes through them. Each is a key of the queue: a sorted set
# with that name, or one of these lists.
_LISTS = {"waiting": "wait", "paused": "paused", "active": "active"}
_STATES = ("waiting", "paused", "delayed", "prioritized", "waiting-children", "active", "completed", "failed")
_FIELDS = ("name", "opts", "timestamp", "processedOn", "finishedOn", "atm", "ats", "failedReason")
_CONTENT = ("data", "returnvalue")
# Limits of the load on Redis: entries of a list from each end, keys for each SCAN, and keys in total.
_LIST_DEPTH = 10_000
_SCAN_STEP = 1_000
_SCAN_LIMIT = 5_000_000

_redis_options = configured("redis", "queue", "prefix")


@click.group()
def command() -> None:
    """Inspect the queues, and why an event became a job or did not."""


# -- counts -------------------------------------------------------------------------------------------------


@command.command()
@_redis_options
@json_option
def counts(settings: Config, *, as_json: bool) -> None:
    """Count the jobs of each queue, by state."""
    counted = ask_redis(settings, lambda redis: _count(redis, settings.queues))
    if as_json:
        print_json(counted)
        return
    states = {queue: {state: str(count) for state, count in of.items()} for queue, of in counted.items()}
    rows = [[state, *(of[state] for of in states.values())] for state in _STATES]
    print_table(["state", *states], rows, numbers=range(1, len(states) + 1))
    for queue, of in counted.items():
        if of["isPaused"]:
            click.echo(f"{queue} is paused: its workers take no jobs until it is resumed")


async def _count(redis: RedisSession, queues: Sequence[QueueKeys]) -> Mapping[str, Mapping[str, int]]:
    counted = {}
    for keys in queues:
        counted[keys.queue] = {
            state: int(await redis.ask("LLEN" if state in _LISTS else "ZCARD", _key(keys, state)))
            for state in _STATES
        }
        [paused] = await redis.ask("HMGET", keys.meta, "paused")
        counted[keys.queue]["isPaused"] = paused is not None
    return counted


def _key(keys: QueueKeys, state: str) -> str:
    """Return the key that holds the jobs in this state."""
    return keys.job(_LISTS.get(state, state))


# -- one job ------------------------------------------------------------------------------------------------


@frozen
class Lock:
    """A creation lock: the replica that set it, the time if the lock has one, and the time that is left."""

    set_by: str
    set_at_ms: int | None
    expires_in_ms: int


@frozen
class Found:
    """The content of Redis for one job id.

    ``fields`` are those of the job's hash; None if there is no job. ``state`` is BullMQ's word, or
    ``unknown`` if the job was in none of the lists.
    """

    keys: QueueKeys
    id: str
    fields: Mapping[str, str] | None
    state: str | None
    lock: Lock | None

    @property
    def is_known(self) -> bool:
        """True if Redis has a job or a lock of this id."""
        return self.fields is not None or self.lock is not None

    @property
    def verdict(self) -> str:
        """The outcome if the event were sent again now, and the reason."""
        if self.fields is not None:
            kept = "and its lock is held" if self.lock else "although its lock has expired"
            return f"a duplicate: the job is in Redis, {kept}"
        if self.lock is not None:
            return "a duplicate: the job is done and removed, and its lock is still held"
        return "a job: Redis has neither a job nor a lock of this id"

    def as_json(self) -> Mapping[str, Any]:
        """Return a form for programs: BullMQ's names, and times in ms."""
        fields = self.fields or {}
        lock = self.lock
        return {
            "id": self.id,
            "queue": self.keys.queue,
            "exists": self.fields is not None,
            "state": self.state,
            "name": fields.get("name"),
            "opts": _parsed(fields.get("opts")),
            "timestamp": _number(fields.get("timestamp")),
            "processedOn": _number(fields.get("processedOn")),
            "finishedOn": _number(fields.get("finishedOn")),
            "attemptsMade": _number(fields.get("atm")),
            "attemptsStarted": _number(fields.get("ats")),
            "failedReason": fields.get("failedReason"),
            **{name: _parsed(fields[name]) for name in _CONTENT if name in fields},
            "lock": lock
            and {"setBy": lock.set_by, "setAt": lock.set_at_ms, "expiresInMs": lock.expires_in_ms},
            "again": self.verdict,
        }


@command.command()
@click.argument("job_id", metavar="ID")
@click.option("--data", is_flag=True, help="Also show the job's data and result, which contain messages.")
@_redis_options
@json_option
def show(settings: Config, job_id: str, *, data: bool, as_json: bool) -> None:
    """Show the job with this id, and its creation lock."""
    _check_id(job_id)
    found = ask_redis(settings, lambda redis: _look_in_all(redis, settings.queues, job_id, with_data=data))
    if as_json:
        print_json(found.as_json())
    else:
        _print_found(found)
    if found.fields is None:
        raise click.exceptions.Exit(Negative.exit_code)


async def _look_in_all(
    redis: RedisSession, queues: Sequence[QueueKeys], job_id: str, *, with_data: bool = False
) -> Found:
    """Return the content of the first queue that knows the id."""
    found = [await _look(redis, keys, job_id, with_data=with_data) for keys in queues]
    return next((one for one in found if one.is_known), found[0])


async def _look(redis: RedisSession, keys: QueueKeys, job_id: str, *, with_data: bool = False) -> Found:
    names = (*_FIELDS, *_CONTENT) if with_data else _FIELDS
    lock = await _look_at_lock(redis, keys, job_id)
    values = await redis.ask("HMGET", keys.job(job_id), *names)
    fields = {name: _text(value) for name, value in zip(names, values, strict=True) if value is not None}
    if not fields:
        return Found(keys, job_id, None, None, lock)
    # Between two looks, a worker may have moved the job back to a list already searched.
    state = await _state(redis, keys, job_id) or await _state(redis, keys, job_id) or "unknown"
    return Found(keys, job_id, fields, state, lock)


async def _look_at_lock(redis: RedisSession, keys: QueueKeys, job_id: str) -> Lock | None:
    value = await redis.ask("GET", keys.create_lock(job_id))
    expires_in_ms = await redis.ask("PTTL", keys.create_lock(job_id))
    if value is None or expires_in_ms < 0:
        return None
    set_at_ms, _, set_by = _text(value).partition(" ")
    return Lock(set_by, _number(set_at_ms), expires_in_ms)


async def _state(redis: RedisSession, keys: QueueKeys, job_id: str) -> str | None:
    for state in _STATES:
        if state in _LISTS:
            holds = await _is_in_list(redis, _key(keys, state), job_id)
        else:
            holds = await redis.ask("ZSCORE", _key(keys, state), job_id) is not None
        if holds:
            return state
    return None


async def _is_in_list(redis: RedisSession, key: str, job_id: str) -> bool:
    """Search both ends only: a list can hold millions of jobs, and the search blocks Redis."""
    for rank in (-1, 1):
        if await redis.ask("LPOS", key, job_id, "RANK", rank, "MAXLEN", _LIST_DEPTH) is not None:
            return True
    return False


# -- by Chatwoot's ids --------------------------------------------------------------------------------------


@command.command()
@click.option("--inbox", type=click.IntRange(1), required=True, help="Chatwoot's id of the inbox.")
@click.option("--message", type=click.IntRange(1), required=True, help="Chatwoot's id of the message.")
@click.option("--event", default="message_created", help="Name of the event.")
@click.option(
    "--delivery",
    metavar="UUID",
    help="X-Chatwoot-Delivery of an update. Without it, all updates are searched for.",
)
@source_option
@_redis_options
@json_option
def find(
    settings: Config,
    inbox: int,
    message: int,
    event: str,
    delivery: str | None,
    source: str,
    *,
    as_json: bool,
) -> None:
    """Find the jobs and locks of a message.

    Its creation has one id. There can be many updates: Redis is searched for them, in small steps.
    """
    keys = QueueKeys(settings.prefix, find_source(settings, source).queue)
    job_id = _job_id(source, event, inbox, message, delivery)
    found = ask_redis(settings, lambda redis: _find(redis, keys, job_id))
    known = [one for one in found if one.is_known]
    if as_json:
        print_json([one.as_json() for one in known])
    else:
        for number, one in enumerate(known):
            if number:
                click.echo()
            _print_found(one)
    if not known:
        raise Negative(f"Redis has no job and no lock of {job_id}{'*' if job_id.endswith('.') else ''}")


def _job_id(source: str, event: str, inbox: int, message: int, delivery: str | None) -> str:
    """Return the id of the message's job; for updates, the common beginning of their ids, up to a dot."""
    payload = {"event": event, "id": message, "inbox": {"id": inbox}, "conversation": {"id": message}}
    request = Delivery(source, json.dumps(payload).encode(), delivery, 0)
    job_id = chatwoot.parse(request, lambda _body: "").job_id
    if job_id.split(".")[2] != str(inbox):
        raise WrongUse(f"the ids of {event} contain no inbox: use `webhookd jobs show`")
    if delivery and job_id.endswith("."):
        raise WrongUse(f"{delivery!r} is not a delivery id")
    return job_id


async def _find(redis: RedisSession, keys: QueueKeys, job_id: str) -> Sequence[Found]:
    job_ids = await _scan(redis, keys, job_id) if job_id.endswith(".") else [job_id]
    return [await _look(redis, keys, one) for one in job_ids]


async def _scan(redis: RedisSession, keys: QueueKeys, beginning: str) -> Sequence[str]:
    """Return the ids with this beginning, of jobs and locks; may miss what changes during the search."""
    total = await redis.ask("DBSIZE")
    progress = Progress("Searching", total, time.monotonic)
    pattern = f"{_literal(keys.job(''))}*{_literal(beginning)}*"
    # A job has further keys in BullMQ, with a colon after its id.
    name_of_one = re.compile(
        f"(?:{re.escape(keys.job(''))}|{re.escape(keys.create_lock(''))})({re.escape(beginning)}[^:]*)"
    )
    found: set[str] = set()
    cursor, looked_at = b"0", 0
    while looked_at < _SCAN_LIMIT:
        cursor, names = await redis.ask("SCAN", cursor, "MATCH", pattern, "COUNT", _SCAN_STEP)
        found.update(match[1] for match in map(name_of_one.fullmatch, map(_text, names)) if match)
        looked_at += _SCAN_STEP
        progress.show(min(looked_at, total))
        if cursor == b"0":
            break
    else:
        click.echo(f"stopped after {_SCAN_LIMIT} of {total} keys: there may be more matches", err=True)
    progress.end(total)
    return sorted(found)


def _literal(text: str) -> str:
    """Escape a text for Redis' patterns."""
    return "".join(f"\\{character}" if character in "*?[]^\\" else character for character in text)


# -- forget -------------------------------------------------------------------------------------------------


@command.command()
@click.argument("job_id", metavar="ID")
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@_redis_options
@json_option
def forget(settings: Config, job_id: str, *, yes: bool, as_json: bool) -> None:
    """Remove a job's creation lock, so that its event can be sent again."""
    _check_id(job_id)
    if not yes:
        if not sys.stdin.isatty():
            raise WrongUse("standard input is not a terminal: use --yes")
        click.confirm(f"Let the event of {job_id} become a job again?", abort=True)
    found = ask_redis(settings, lambda redis: _forget(redis, settings.queues, job_id))
    if as_json:
        print_json({"id": job_id, "queue": found.keys.queue})
    else:
        click.echo(f"Forgotten: the event of {job_id} becomes a job if it is sent again.")


async def _forget(redis: RedisSession, queues: Sequence[QueueKeys], job_id: str) -> Found:
    found = await _look_in_all(redis, queues, job_id)
    if found.fields is not None:
        raise Negative(
            f"the job is still in {found.keys.queue} ({found.state}), and BullMQ adds no second one with its "
            "id: remove it first, with job.remove() in BullMQ"
        )
    if found.lock is None:
        raise Negative(f"{job_id} has no lock: its event would become a job")
    # While the lock is held, no replica adds the job: what was seen is still true.
    await redis.ask("DEL", found.keys.create_lock(job_id))
    return found


# -- what is printed ----------------------------------------------------------------------------------------


def _print_found(found: Found) -> None:
    fields, lock = found.fields or {}, found.lock
    options = _parsed(fields.get("opts"))
    attempts = options.get("attempts") if isinstance(options, dict) else None
    lines: dict[str, str | None] = {
        "queue": found.keys.queue,
        "state": found.state or "not in Redis",
        "name": fields.get("name"),
        "received": _moment(fields.get("timestamp")),
        "started": _moment(fields.get("processedOn")),
        "finished": _moment(fields.get("finishedOn")),
        "attempts": f"{fields.get('atm', '0')} of {attempts or 1}" if fields else None,
        "failed": fields.get("failedReason"),
        "options": json.dumps(options) if options else None,  # with spaces, at which a line can be wrapped
        **{name: fields.get(name) for name in _CONTENT},
        "lock": f"expires in {_duration(lock.expires_in_ms)}" if lock else "none",
        "set by": lock.set_by if lock else None,
        "set": _moment(lock.set_at_ms) if lock else None,
        "sent again": found.verdict,
    }
    rows = [(name, printable(value)) for name, value in lines.items() if value]
    print_table(("job", found.id), rows)


def _moment(ms: str | int | None) -> str | None:
    number = _number(ms)
    if number is None:
        return None
    try:
        moment = datetime.fromtimestamp(number / 1000, UTC)
    except (ValueError, OverflowError, OSError):
        return f"{number} ms"
    ago_ms = wall_clock_ms() - number
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC" + (f", {_duration(ago_ms)} ago" if ago_ms > 0 else "")


def _duration(ms: int) -> str:
    return duration(ms // 1000) if ms >= 1000 else "less than 1 s"


def _parsed(text: str | None) -> Any:
    """Return the value of JSON; a text that is not JSON stays as it is."""
    try:
        return None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        return text


def _number(text: str | int | None) -> int | None:
    return int(text) if text is not None and str(text).isascii() and str(text).isdigit() else None


def _text(value: bytes) -> str:
    return value.decode("utf-8", "replace")


def _check_id(job_id: str) -> None:
    try:
        check_job_id(job_id)
    except ValueError as error:
        raise WrongUse(f"{error}: the ids of webhookd look like chatwoot.message_created.7.98765") from None

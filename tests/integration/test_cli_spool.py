"""`webhookd spool` with running daemons, dead ones, and damaged or inaccessible spools."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from attrs import frozen

from tests.integration.conftest import StartDaemon
from tests.support.bullmq import Queue
from tests.support.daemon import Daemon, installed_twistd
from tests.support.process import find_tool, wait_until
from tests.support.servers import RedisServer
from tests.support.spools import as_after_a_crash, inline, make_job, now
from tests.support.webhooks import Webhook, connected, outcome, post, webhook
from webhookd.bullmq.keys import QueueKeys
from webhookd.spool.database import SpoolLimits
from webhookd.spool.directory import SpoolRoot
from webhookd.spool.queue import Spool, Spools

NO_REDIS = "redis://127.0.0.1:1/0"
KEYS = QueueKeys("bull", "chatwoot")
# The mode of a directory must count for root, too.
UNPRIVILEGED = ("--bounding-set", "-dac_override,-dac_read_search")


@frozen
class Ended:
    """The output and the exit code of a command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.code == 0, self
        return json.loads(self.out)


def spool(root: Path, *arguments: str, redis: str = NO_REDIS) -> Ended:
    """Run `webhookd spool`, without the privilege to read what file modes forbid."""
    argv = [find_tool("setpriv", "it is in Debian's package util-linux")]
    if os.geteuid() == 0:
        argv += UNPRIVILEGED
    argv += [str(installed_twistd().with_name("webhookd")), "spool", *arguments]
    ended = subprocess.run(
        argv,
        env={"PATH": os.defpath, "WEBHOOK_SPOOL": str(root), "REDIS_URL": redis, "LANG": "C.UTF-8"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "Traceback" not in ended.stderr, ended.stderr
    return Ended(ended.returncode, ended.stdout, ended.stderr)


def exported(ended: Ended) -> list[str]:
    """Return the ids of the jobs in an export."""
    assert ended.code == 0, ended
    return sorted(json.loads(line)["id"] for line in ended.out.splitlines())


def ids(events: Sequence[Webhook]) -> list[str]:
    return sorted(event.job_id for event in events)


def send(daemon: Daemon, events: Sequence[Webhook], expected: tuple[int, str] = (202, "spooled")) -> None:
    assert {outcome(post(daemon.port, event)) for event in events} == {expected}


def short_name(directory: Path) -> str:
    return directory.name.removeprefix("replica-")


def contents(directory: Path) -> Mapping[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def test_two_replicas_one_killed_and_redis_away(tmp_path: Path, start_daemon: StartDaemon) -> None:
    root = tmp_path / ("a path that is longer than an address can be " * 3)
    root.mkdir(mode=0o700)
    with RedisServer() as redis:
        redis.stop()
        events = [webhook(number) for number in range(1, 41)]
        daemons = [start_daemon("--redis", redis.url, "--spool", str(root)) for _ in range(2)]
        send(daemons[0], events[:20])
        send(daemons[1], events[20:])

        def run(*arguments: str) -> Ended:
            return spool(root, *arguments, redis=redis.url)

        listed = run("list", "--json").json
        assert {one["pid"] for one in listed} == {daemon.pid for daemon in daemons}
        assert [(one["state"], one["records"], one["foreign"]) for one in listed] == [
            ("running", 20, False)
        ] * 2
        killed = next(one for one in listed if one["pid"] == daemons[0].pid)
        name, directory = killed["replica"], Path(killed["path"])
        rows = run("list", name, "--limit", "3", "--after", "5", "--json").json
        assert [row["sequence"] for row in rows] == [6, 7, 8]

        file = tmp_path / "events.jsonl"
        assert run("export", "--output", str(file)).err == "40 events exported\n"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        data = {line["id"]: (line["queue"], line["name"], line["data"]) for line in lines}
        assert data == {event.job_id: ("chatwoot", event.event, json.loads(event.body)) for event in events}
        assert file.stat().st_mode & 0o777 == 0o600
        assert run("export", "--output", str(file)).code == 2
        assert spool(tmp_path / "none", "export", "--output", f"{file}.new").code == 3
        assert not Path(f"{file}.new").exists()

        daemons[0].kill()
        before = contents(directory)
        assert sorted(one["state"] for one in run("list", "--json").json) == ["running", "stopped"]
        assert exported(run("export")) == ids(events)
        assert {tuple(one["problems"]) for one in run("verify", "--json").json} == {()}
        job = run("show", "1", "--replica", name, "--data").out.rstrip("\n")
        assert job.encode() == next(event for event in events[:20] if event.job_id == rows_id(run, name)).body
        assert contents(directory) == before, "a stopped one is only read"
        waiting = run("drain", "--patience", "0.3")
        assert (waiting.code, "refused" in waiting.err) == (3, True), waiting

        redis.start()
        with redis.client() as client:
            queue = Queue(client, KEYS)
            client.set(KEYS.job(events[3].job_id), "in the way")
            moved = run("drain", "--json").json
            assert sum(moved.values()) >= 20, "what the running one has not moved by itself"
            assert sorted(queue.held_ids()) == ids(events[:3] + events[4:])
            (letter,) = run("list", name, "--dead", "--json").json
            assert (letter["job_id"], letter["reason"].split()[0]) == (events[3].job_id, "WRONGTYPE")
            client.delete(KEYS.job(events[3].job_id))
            assert run("requeue-dead", str(letter["sequence"]), "--replica", name, "--json").json == {
                "requeued": 1
            }
            assert run("drain", "--replica", name, "--json").json == {name: 1}
            assert sorted(queue.held_ids()) == ids(events)
            assert queue.faults() == []
        assert not directory.exists(), "it is empty, and no replica holds it"


def rows_id(run: Any, name: str) -> str:
    (first, *_) = run("list", name, "--limit", "1", "--json").json
    return str(first["job_id"])


def test_looking_and_requeuing_under_load_loses_and_doubles_nothing(
    tmp_path: Path, redis: RedisServer, start_daemon: StartDaemon
) -> None:
    root = tmp_path / "spool"
    daemon = connected(start_daemon("--redis", redis.url, "--spool", str(root)))
    refused = [webhook(number) for number in range(1, 4)]
    events = [webhook(number) for number in range(100, 300)]
    with redis.client() as client:
        for event in refused:
            client.set(KEYS.job(event.job_id), "in the way")
        send(daemon, refused)

        def run(*arguments: str) -> Ended:
            return spool(root, *arguments, redis=redis.url)

        wait_until(lambda: b'"deadRecords":3' in daemon.get("/health").body, "all are dead letters")
        redis.suspend()
        with ThreadPoolExecutor(2) as pool:
            load = [
                pool.submit(lambda part: [outcome(post(daemon.port, one)) for one in part], part)
                for part in (events[:150], events[150:])
            ]
            assert run("requeue-dead", "--all", "--json").json == {"requeued": 3}
            rounds = 0
            while rounds == 0 or not all(part.done() for part in load):
                assert run("list", "--json").json[0]["state"] == "running"
                assert run("verify", "--json").json[0]["problems"] == []
                assert set(exported(run("export"))) <= set(ids(refused + events))
                rounds += 1
            answers = [answer for part in load for answer in part.result()]
        assert {status for status, _ in answers} == {202}
        daemon.kill()
        daemon.start()
        assert run("list", "--json").json[0]["pid"] == daemon.pid, "it listens where a dead one did"
        redis.resume()
        for event in refused:
            client.delete(KEYS.job(event.job_id))
        run("drain")
        run("requeue-dead", "--all")  # those that were sent again before their keys were free
        assert run("drain").code == 0
        queue = Queue(client, KEYS)
        assert sorted(queue.held_ids()) == ids(refused + events)
        assert queue.faults() == []
        added = [fields[b"jobId"].decode() for fields in queue.events("added")]
        assert sorted(added) == ids(refused + events)


# -- what fails -------------------------------------------------------------------------------------------


def opened(root: Path, redis: str = NO_REDIS) -> Spool:
    return now(
        Spools(
            SpoolRoot(root, f"{redis} bull chatwoot"), inline, lambda: 0, SpoolLimits(min_free_bytes=0)
        ).open_own()
    )


def stopped(root: Path, redis: str = NO_REDIS) -> Path:
    """Return the directory of a stopped replica, with three events and a dead letter."""
    made = opened(root, redis)
    for number in range(4):
        now(made.append(make_job(number)))
    (first, *_) = now(made.first(1, 1))
    now(made.bury(first.sequence, "WRONGTYPE"))
    now(made.close())
    return made.directory.path


def test_a_purge_deletes_and_needs_a_yes(tmp_path: Path) -> None:
    root = tmp_path / "spool"
    directory = stopped(root)
    refused = spool(root, "purge", "--live")
    assert (refused.code, "--yes" in refused.err) == (2, True), refused
    assert spool(root, "purge", "--live", "--yes", "--json").json == {"purged": 3}
    assert spool(root, "list", "--json").json[0]["dead"] == 1
    assert spool(root, "purge", "--dead", "--yes", "--json").json == {"purged": 1}
    assert not directory.exists()


@contextmanager
def missing(root: Path) -> Iterator[None]:
    yield


@contextmanager
def garbage(root: Path) -> Iterator[None]:
    (stopped(root) / "spool.sqlite").write_bytes(b"no database" * 1000)
    yield


@contextmanager
def cut_off(root: Path) -> Iterator[None]:
    """A replica was killed, and a bit of its WAL flipped."""
    dying = opened(root.with_name("dying"))
    for number in range(8):
        now(dying.append(make_job(number)))
    as_after_a_crash(root.with_name("dying"), root)
    wal = root / dying.directory.path.name / "spool.sqlite-wal"
    content = bytearray(wal.read_bytes())
    content[32 + 24 + 100] ^= 1
    wal.write_bytes(content)
    yield


@contextmanager
def read_only(root: Path) -> Iterator[None]:
    directory = stopped(root)
    directory.chmod(0o500)
    for path in directory.iterdir():
        path.chmod(0o400)
    yield
    directory.chmod(0o700)


@contextmanager
def another_users(root: Path) -> Iterator[None]:
    directory = stopped(root)
    directory.chmod(0)
    yield
    directory.chmod(0o700)


@contextmanager
def another_users_root(root: Path) -> Iterator[None]:
    stopped(root)
    root.chmod(0)
    yield
    root.chmod(0o700)


@contextmanager
def foreign(root: Path) -> Iterator[None]:
    stopped(root, redis="redis://elsewhere:6379/0")
    yield


@contextmanager
def silent(root: Path) -> Iterator[None]:
    """A daemon that cannot open its control socket, and works otherwise."""
    (stopped(root) / "control").mkdir()
    with Daemon("--redis", NO_REDIS, "--spool", str(root)) as daemon:
        wait_until(lambda: "`webhookd spool` cannot ask" in daemon.log, "it warns")
        send(daemon, [webhook(99)])
        yield


@contextmanager
def hanging(root: Path) -> Iterator[None]:
    with Daemon("--redis", NO_REDIS, "--spool", str(root)) as daemon:
        wait_until(lambda: any(root.glob("*/control")), "it listens")
        daemon.suspend()
        yield
        daemon.resume()


@contextmanager
def no_redis(root: Path) -> Iterator[None]:
    stopped(root)
    yield


COMMANDS: Mapping[str, Sequence[str]] = {
    "list": ("list",),
    "rows": ("list", "replica-"),
    "show": ("show", "2"),
    "export": ("export",),
    "verify": ("verify",),
    "drain": ("drain", "--patience", "0.3"),
    "requeue": ("requeue-dead", "--all"),
    "purge": ("purge", "--dead", "--yes"),
}
ALL_FAIL = dict.fromkeys(COMMANDS, 3)
SOME_FAIL = dict.fromkeys(("list", "export", "purge"), 3)
CHANGING = ("drain", "requeue", "purge")


@pytest.mark.parametrize(
    ("condition", "codes", "reason"),
    [
        (missing, SOME_FAIL, "No such file or directory"),
        (garbage, ALL_FAIL | {"verify": 1}, "file is not a database"),
        (cut_off, {"verify": 1}, "hides records until a daemon takes this spool"),
        (read_only, {"show": 0, "verify": 0, "drain": 3, "purge": 3}, "cannot be written to"),
        (another_users, SOME_FAIL | {"verify": 3}, "Permission denied"),
        (another_users_root, SOME_FAIL, "Permission denied"),
        (foreign, {"list": 0, "export": 0} | dict.fromkeys(CHANGING, 2), "for another Redis"),
        (silent, SOME_FAIL, "does not answer"),
        (hanging, SOME_FAIL, "its disk may hang"),
        (no_redis, {"drain": 3}, "refused"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_failure_is_one_line(tmp_path: Path, condition: Any, codes: Mapping[str, int], reason: str) -> None:
    root = tmp_path / "spool"
    with condition(root), ThreadPoolExecutor(4) as pool:
        ended = dict(zip(codes, pool.map(lambda name: spool(root, *COMMANDS[name]), codes), strict=True))
    assert {name: one.code for name, one in ended.items()} == codes, ended
    for name, one in ended.items():
        if one.code:
            *above, last = (one.out if one.code == 1 else one.err).strip().splitlines()
            assert reason in last, one
            # A verdict has a line for the replica, and a drain warns that Redis is away while it waits.
            assert len(above) == (one.code == 1 or (name == "drain" and condition is no_redis)), one

"""``webhookd jobs``: the jobs in the queues, and why an event became a job or did not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.bullmq import T0_MS, Queue
from tests.support.command import run_command, start_command
from tests.support.process import ReservedPort
from tests.support.servers import RedisServer, Sentinels, TlsRedis
from webhookd.bullmq.keys import QueueKeys

ACL_FILE = Path(__file__).parents[2] / "conf" / "redis-acl.conf"
KEYS = QueueKeys("bull", "chatwoot")
CREATED, GONE, NEVER = (f"chatwoot.message_created.7.{number}" for number in (1, 2, 3))
UPDATES = [f"chatwoot.message_updated.7.1.{number:032x}" for number in range(3)]
SECRET = "a private message"


@pytest.fixture
def queue(redis: RedisServer) -> Iterator[Queue]:
    """A queue with one created message and three updates. The job of another message is done and removed."""
    with redis.client() as client:
        queue = Queue(client, KEYS, set_by=f"{T0_MS} host-a:3001")
        jobs = [queue.job(job_id, name="message_created", data=f'{{"content":"{SECRET}"}}', attempts=3)
                for job_id in (CREATED, GONE, *UPDATES)]  # fmt: skip
        queue.add(*jobs)
        client.lrem(KEYS.wait, 1, GONE)
        client.delete(KEYS.job(GONE))
        client.set(KEYS.job(f"{UPDATES[0]}:lock"), "a worker's")
        yield queue


def test_counts_of_every_state(redis: RedisServer, queue: Queue) -> None:
    queue.client.zadd(KEYS.job("failed"), {"x": 1, "y": 2})
    queue.client.hset(KEYS.meta, "paused", 1)

    found = run_command("jobs", "counts", "--json", "--redis", redis.url)
    shown = run_command("jobs", "counts", "--redis", redis.url)

    counts = json.loads(found.stdout)["chatwoot"]
    assert {state: count for state, count in counts.items() if count} == {
        "waiting": 4,
        "failed": 2,
        "isPaused": True,
    }
    assert len(counts) == 9
    assert "chatwoot is paused" in shown.stdout
    assert [line.split() for line in shown.stdout.splitlines()[:2]] == [
        ["state", "chatwoot"],
        ["waiting", "4"],
    ]


def test_a_job_is_shown_and_its_content_only_where_it_is_asked_for(redis: RedisServer, queue: Queue) -> None:
    show = "jobs", "show", CREATED, "--redis", redis.url
    started = [start_command(*show, *more) for more in ((), ("--json",), ("--data",), ("--data", "--json"))]
    plain, as_json, with_data, with_data_as_json = (one.end() for one in started)

    assert {one.returncode for one in (plain, as_json, with_data, with_data_as_json)} == {0}
    assert "waiting" in plain.stdout
    assert "host-a:3001" in plain.stdout
    assert "a duplicate: the job is in Redis, and its lock is held" in plain.stdout
    assert SECRET not in plain.stdout + as_json.stdout
    assert SECRET in with_data.stdout
    assert json.loads(with_data_as_json.stdout)["data"] == {"content": SECRET}
    found = json.loads(as_json.stdout)
    assert found["lock"].pop("expiresInMs") > 0
    assert found == {
        "id": CREATED,
        "queue": "chatwoot",
        "exists": True,
        "state": "waiting",
        "name": "message_created",
        "opts": {"attempts": 3, "jobId": CREATED},
        "timestamp": T0_MS,
        "processedOn": None,
        "finishedOn": None,
        "attemptsMade": None,
        "attemptsStarted": None,
        "failedReason": None,
        "lock": {"setBy": "host-a:3001", "setAt": T0_MS},
        "again": "a duplicate: the job is in Redis, and its lock is held",
    }


def test_why_a_job_that_is_gone_is_refused_as_a_duplicate_and_how_it_is_forgotten(
    redis: RedisServer, queue: Queue
) -> None:
    options = "--redis", redis.url
    found = run_command("jobs", "find", "--inbox", "7", "--message", "2", *options)
    assert (found.returncode, "not in Redis" in found.stdout) == (0, True)
    assert "the job is done and removed, and its lock is still held" in found.stdout

    started = [
        start_command("jobs", "forget", GONE, *options),
        start_command("jobs", "forget", CREATED, "--yes", *options),
        start_command("jobs", "forget", NEVER, "--yes", *options),
        start_command("jobs", "show", GONE, *options),
    ]
    unconfirmed, still_there, never, shown = (one.end() for one in started)
    assert (unconfirmed.returncode, "use --yes" in unconfirmed.stderr) == (2, True)
    assert (still_there.returncode, "still in chatwoot (waiting)" in still_there.stderr) == (1, True)
    assert (never.returncode, "has no lock" in never.stderr) == (1, True)
    assert (shown.returncode, "not in Redis" in shown.stdout) == (1, True)
    assert queue.client.exists(KEYS.create_lock(GONE), KEYS.create_lock(CREATED)) == 2

    assert run_command("jobs", "forget", GONE, "--yes", *options).returncode == 0
    assert not queue.client.exists(KEYS.create_lock(GONE))
    assert [answer.value for answer in queue.add(queue.job(GONE))] == [1]  # type: ignore[union-attr]


def test_updates_are_found_among_other_keys(redis: RedisServer, queue: Queue) -> None:
    queue.client.mset({f"other:{number}": "x" for number in range(5_000)})
    queue.client.set(KEYS.create_lock(UPDATES[0].replace(".7.1.", ".7.11.")), "x", px=60_000)
    find = "jobs", "find", "--inbox", "7", "--message", "1", "--event", "message_updated", "--json"

    found = run_command(*find, "--redis", redis.url)

    assert [one["id"] for one in json.loads(found.stdout)] == UPDATES
    assert found.returncode == 0


def test_what_cannot_be_found(redis: RedisServer) -> None:
    find = "jobs", "find", "--redis", redis.url, "--inbox", "7", "--message", "1"
    started = {
        "has no job and no lock of chatwoot.message_created.7.1\n": start_command(*find),
        "message_updated.7.1.*": start_command(*find, "--event", "message_updated"),
        "contain no inbox": start_command(*find, "--event", "contact_created"),
        "the ids of contact_updated": start_command(*find[:-1], "7", "--event", "contact_updated"),
        "is not a delivery id": start_command(*find, "--event", "message_updated", "--delivery", "x"),
        "there is no source 'other'": start_command(*find, "--source", "other"),
        "'meta' cannot be a job id": start_command("jobs", "show", "meta", "--redis", redis.url),
    }
    ended = {words: one.end() for words, one in started.items()}

    assert {words: words in one.stderr for words, one in ended.items()} == dict.fromkeys(ended, True)
    assert [one.returncode for one in ended.values()] == [1, 1, 2, 2, 2, 2, 2]


def test_the_user_of_an_operator_and_that_of_the_daemon() -> None:
    """Each user has exactly the rights that the comment in the file describes."""
    lines = ACL_FILE.read_text().splitlines()
    (daemons,) = (line for line in lines if line.startswith("user webhookd"))
    (operators,) = (line.lstrip("# ") for line in lines if line.startswith("#") and "user operator" in line)
    with RedisServer(config=[daemons, operators]) as server, server.client() as client:
        queue = Queue(client, KEYS)
        queue.add(queue.job(CREATED))
        queue.client.set(KEYS.create_lock(GONE), "1 x", px=60_000)
        operator, daemon = (
            f"redis://{name}:change-me@127.0.0.1:{server.port}" for name in ("operator", "webhookd")
        )
        find = "jobs", "find", "--inbox", "7", "--message", "1"
        started = {
            "counts": start_command("jobs", "counts", "--redis", operator),
            "show": start_command("jobs", "show", CREATED, "--redis", operator),
            "find": start_command(*find, "--redis", operator),
            "search": start_command(*find, "--event", "message_updated", "--redis", operator),
            "forget": start_command("jobs", "forget", GONE, "--yes", "--redis", operator),
            "the daemon counts": start_command("jobs", "counts", "--redis", daemon),
            "the daemon shows": start_command("jobs", "show", CREATED, "--redis", daemon),
        }
        ended = {name: one.end() for name, one in started.items()}

    codes = {name: one.returncode for name, one in ended.items()}
    assert codes == {**dict.fromkeys(started, 0), "search": 1, "the daemon shows": 3}, ended
    assert "conf/redis-acl.conf has what it needs" in ended["the daemon shows"].stderr


def test_tls_and_sentinel() -> None:
    with TlsRedis() as tls, Sentinels() as sentinels:
        started = [
            start_command("jobs", "counts", "--redis", f"{tls.url}?ca_file={tls.ca_file}"),
            start_command("jobs", "counts", "--redis", sentinels.url),
        ]
        assert [one.end().returncode for one in started] == [0, 0]


PARTS = {
    "counts": (),
    "show": (CREATED,),
    "find": ("--inbox", "7", "--message", "1"),
    "forget": (CREATED, "--yes"),
}


def test_no_redis_is_one_clear_line(tmp_path: Path) -> None:
    port = ReservedPort()
    with RedisServer(config=["requirepass right"]) as locked:
        urls = {
            "http://127.0.0.1": (2, "not a Redis URL"),
            f"redis://127.0.0.1:{port.number}": (3, "refused"),
            f"redis://:wrong@127.0.0.1:{locked.port}": (3, "WRONGPASS"),
            "rediss://127.0.0.1?ca_file=/nowhere": (2, "ca_file cannot be read"),
            "embedded:": (3, "no embedded Redis runs"),
        }
        started = {
            (part, url): start_command("jobs", part, *arguments, "--redis", url, cwd=tmp_path)
            for part, arguments in PARTS.items()
            for url in (urls if part == "counts" else list(urls)[:2])
        }
        ended = {key: one.end() for key, one in started.items()}
    port.close()

    for (_, url), one in ended.items():
        code, words = urls[url]
        assert (one.returncode, one.stdout, len(one.stderr.splitlines())) == (code, "", 1), one
        assert words in one.stderr
        assert "wrong" not in one.stderr.replace("WRONGPASS", "")

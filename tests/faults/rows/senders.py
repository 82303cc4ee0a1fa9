"""K1 to K3 and C1: faults of senders and clocks."""

from __future__ import annotations

import hmac
import time
from collections.abc import Sequence

from tests.faults.bench import ALL_TAKEN, ORDERED, OWN, TRUTHFUL, Bench, Row
from tests.faults.ledger import event
from tests.faults.preloads import FaultyClock
from tests.support.http import connect
from tests.support.webhooks import Webhook, outcome, post, post_at_once
from webhookd.samples import SAMPLES

_STORM = 500
_SECRET = "secret of the bench"
_SOURCES = f"""
[sources.signed]
secret = ["{_SECRET}"]
"""


def _check_one_is_queued(bench: Bench, words: Sequence[str]) -> None:
    """Check the answers to copies of one event. The spool takes some if Redis misses its deadline."""
    bench.check(words.count("queued") <= 1, f"{words.count('queued')} were queued, not 1")
    bench.check(set(words) <= {"queued", "already_queued", "spooled"}, f"copies are {sorted(set(words))}")
    if "spooled" in words:
        bench.too_late.append(f"{words.count('spooled')} copies were spooled: Redis missed its deadline")


def behaves_badly(bench: Bench) -> None:
    """Hang up, repeat events, send to two replicas at once, and send an update before its creation."""
    redis = bench.start_redis()
    first, second = replicas = [bench.start_replica(redis) for _ in range(2)]
    with bench.load(*replicas), bench.ledger() as ledger:
        for number in range(OWN, OWN + 200):  # hangs up before the answer
            serial = ledger.sends(number, first.port)
            with connect(first.port) as connection:
                connection.sendall(event(number).request)
            ledger.answered(serial, 0, "hung-up")
        for number in range(OWN, OWN + 100):  # some of them again, three times
            for replica in (second, first, second):
                bench.send(replica, number)
        for number in range(OWN + 200, OWN + 300):  # to two at once
            serials = [ledger.sends(number, replica.port) for replica in replicas]
            answers = post_at_once([replica.port for replica in replicas], [event(number)] * 2)
            for serial, answer in zip(serials, answers, strict=True):
                ledger.answered(serial, *outcome(answer))
            _check_one_is_queued(bench, [outcome(answer)[1] for answer in answers])
        update, creation = (
            Webhook.from_sample(SAMPLES[name]) for name in ("message_updated", "message_created")
        )
        for webhook in (update, creation):
            bench.check(post(first.port, webhook).status == 202, "an early update is not taken")
    bench.strangers = frozenset({update.job_id, creation.job_id})
    with redis.client() as client:
        queued = client.lrange(bench.queue.wait, 0, -1)[::-1]
    at = [queued.index(webhook.job_id.encode()) for webhook in (update, creation)]
    bench.check(at == sorted(at), "the first event is not first")


def storm(bench: Bench) -> None:
    """Send one event five hundred times at once."""
    redis = bench.start_redis()
    replicas = [bench.start_replica(redis) for _ in range(3)]
    bench.warm_up()
    ports = [replica.port for replica in replicas]
    for number in (OWN, OWN + 1):
        with bench.ledger() as ledger:
            serials = [ledger.sends(number, ports[place % 3]) for place in range(_STORM)]
            answers = post_at_once(ports, [event(number)] * _STORM)
            for serial, answer in zip(serials, answers, strict=True):
                ledger.answered(serial, *outcome(answer))
        _check_one_is_queued(bench, [outcome(answer)[1] for answer in answers])


def removed_by_its_worker(bench: Bench) -> None:
    """Let the worker finish and remove the job before the event is repeated."""
    redis = bench.start_redis()
    replica = bench.start_replica(redis, "--lock-ttl", "1000", "--dedup-ttl", "3000")
    bench.max_lock_ttl_ms = 3000
    bench.warm_up()
    webhook = event(OWN)
    with redis.client() as client:

        def work() -> None:
            client.lrem(bench.queue.wait, 0, webhook.job_id)
            client.delete(bench.queue.job(webhook.job_id))

        began_s = time.monotonic()
        bench.check(outcome(post(replica.port, webhook)) == (202, "queued"), "not queued")
        work()
        while time.monotonic() < began_s + 2.5:
            bench.check(outcome(post(replica.port, webhook)) == (200, "already_queued"), "not a duplicate")
            time.sleep(0.1)
        bench.check(not client.exists(bench.queue.job(webhook.job_id)), "the job is back")
        time.sleep(max(0.0, began_s + 3.2 - time.monotonic()))
        bench.check(outcome(post(replica.port, webhook)) == (202, "queued"), "not queued after the window")
        work()
        client.xtrim(bench.queue.events, maxlen=0, approximate=False)
    bench.deleted = frozenset({webhook.job_id})
    with bench.load(replica):
        bench.pause(1)


def _signed(webhook: Webhook, at_s: float) -> Webhook:
    timestamp = str(int(at_s)).encode()
    digest = hmac.digest(_SECRET.encode(), timestamp + b"." + webhook.body, "sha256").hex()
    headers = {
        "Content-Type": "application/json",
        "X-Chatwoot-Timestamp": timestamp.decode(),
        "X-Chatwoot-Signature": f"sha256={digest}",
    }
    return Webhook(webhook.body, headers, webhook.job_id, webhook.event)


def clock_jumps(bench: Bench) -> None:
    """Set the clock 10 min ahead, and 10 min behind, while Redis does not answer and a deadline runs."""
    redis = bench.start_redis()
    clock = FaultyClock(bench)
    configuration = bench.directory / "webhookd.toml"
    configuration.write_text(_SOURCES)
    replica = bench.new_replica(redis, "--config", str(configuration))
    replica.extra.update(clock.environ)
    replica.start()

    def answer(at_s: float) -> int:
        return bench.post_to(replica, "/webhook/chatwoot/signed", _signed(event(OWN), at_s)).status

    with bench.load(replica):
        bench.pause(1)
        bench.check(answer(time.time()) != 401, "a good signature is refused")
        for minutes in (10, -10):
            redis.suspend()
            bench.pause(0.2)
            clock.set(60 * minutes)
            bench.pause(2)
            redis.resume()
            bench.wait_drained()
            bench.check(answer(time.time()) == 401, f"at {minutes:+d} min a stale signature is taken")
            bench.check(
                answer(time.time() + 60 * minutes) != 401, f"at {minutes:+d} min a fresh one is refused"
            )
            bench.pause(1)
        bench.check(answer(time.time() - 3600) == 401, "an old signature is taken")
    bench.strangers = frozenset({event(OWN).job_id.replace("chatwoot.", "signed.", 1)})


ROWS = (
    Row(
        "C1",
        "the wall clock jumps to 10 min ahead, then to 10 min behind",
        "deadlines are not affected; signatures depend on the wall clock",
        clock_jumps,
        demands=ALL_TAKEN | ORDERED | TRUTHFUL,
    ),
    Row(
        "K1",
        "hanging up early; 3 repetitions; 2 replicas at once; an update before its creation",
        "I1 I2 I3; order of arrival",
        behaves_badly,
        short=True,
    ),
    Row(
        "K2",
        f"one event {_STORM} times at once over 3 replicas",
        f"1 queued, {_STORM - 1} duplicates",
        storm,
        demands=ALL_TAKEN,
    ),
    Row(
        "K3",
        "a job is removed before its event is repeated, within the dedup window and after it",
        "a duplicate within the window, a new job after it",
        removed_by_its_worker,
        demands=ALL_TAKEN,
    ),
)

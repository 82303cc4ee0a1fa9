"""The metrics of the installed daemon: linted, cheap for Redis, and available in each failure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families as parse

from tests.support.process import wait_until
from tests.support.prometheus import ObservedDaemon, promtool
from tests.support.servers import RedisServer
from tests.support.webhooks import connected, post, webhook, webhooks


@pytest.fixture
def daemon(redis: RedisServer) -> Iterator[ObservedDaemon]:
    with ObservedDaemon("--redis", redis.url) as daemon:
        yield daemon


def value(daemon: ObservedDaemon, name: str, **labels: str) -> float | None:
    """Return one sample of a new scrape, or None."""
    samples = [sample for family in parse(daemon.scrape()) for sample in family.samples]
    return next((one.value for one in samples if one.name == name and one.labels == labels), None)


def test_promtool_finds_nothing_but_bullmqs_own_name(daemon: ObservedDaemon) -> None:
    post(connected(daemon).port, webhook())
    wait_until(lambda: "bullmq_job_count{" in daemon.scrape(), "the queues are known")
    checked = promtool("check", "metrics", stdin=daemon.scrape())
    # BullMQ's exporter has this name, and so dashboards for BullMQ use it.
    assert (checked.stdout + checked.stderr).splitlines() == [
        'bullmq_job_count non-histogram and non-summary metrics should not have "_count" suffix'
    ]


def test_figures_of_a_day(daemon: ObservedDaemon) -> None:
    events = webhooks(20)
    for event in events:
        post(connected(daemon).port, event)
    wait_until(lambda: value(daemon, "webhookd_lock_total", outcome="acquired") == 20, "all are jobs")
    for event in events[:5]:
        post(daemon.port, event)
    assert value(daemon, "webhookd_lock_total", outcome="held") == 5
    durations = "webhookd_http_request_duration_seconds_count"
    assert value(daemon, durations, route="/webhook/chatwoot") == 25  # no probe
    wait_until(
        lambda: value(daemon, "bullmq_job_count", queue="chatwoot", state="waiting") == 20, "a new look"
    )
    assert (value(daemon, "webhookd_queue_oldest_wait_age_seconds", queue="chatwoot") or 0) > 0
    assert (value(daemon, "process_resident_memory_bytes") or 0) > 1e6


def test_a_look_costs_redis_the_same_however_many_jobs_wait(
    redis: RedisServer, daemon: ObservedDaemon
) -> None:
    waiting = {"queue": "chatwoot", "state": "waiting"}
    wait_until(lambda: value(daemon, "bullmq_job_count", **waiting) == 0, "its connections are ready")
    with redis.client() as client:
        client.rpush("bull:chatwoot:wait", *range(10_000))
        client.config_resetstat()
        wait_until(lambda: value(daemon, "bullmq_job_count", **waiting) == 10_000, "a new look")
        commands = {name.removeprefix("cmdstat_") for name in client.info("commandstats")}
    # LINDEX walks from the nearer end of the list, and -1 is its end.
    assert commands - {"config|resetstat", "info"} == {"llen", "zcard", "lindex", "hmget"}


def test_with_redis_away(redis: RedisServer, daemon: ObservedDaemon) -> None:
    waiting = {"queue": "chatwoot", "state": "waiting"}
    connected(daemon)
    wait_until(lambda: value(daemon, "bullmq_job_count", **waiting) == 0, "the queue is counted")
    redis.kill()
    wait_until(lambda: value(daemon, "webhookd_redis_up") == 0, "the daemon has noticed")
    wait_until(lambda: value(daemon, "bullmq_job_count", **waiting) is None, "nothing old is shown")
    assert post(daemon.port, webhook()).status == 202
    assert value(daemon, "webhookd_spool_records") == 1
    assert (
        value(daemon, "webhookd_events_total", source="chatwoot", event="message_created", outcome="spooled")
        == 1
    )


def test_with_a_redis_that_hangs(redis: RedisServer, daemon: ObservedDaemon) -> None:
    connected(daemon)
    redis.suspend()
    assert value(daemon, "webhookd_build_info", version="0.1.0") is not None
    redis.resume()


def test_with_a_spool_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "spool").write_text("not a directory")
    with ObservedDaemon("--redis", "redis://127.0.0.1:1/0", "--spool", str(tmp_path / "spool")) as daemon:
        wait_until(lambda: value(daemon, "webhookd_spool_up") == 0, "the spool is known to be broken")
        assert post(daemon.port, webhook()).status == 500
        lost = {"route": "/webhook/chatwoot", "method": "POST", "code": "500"}
        assert value(daemon, "webhookd_http_requests_total", **lost) == 1
        assert (
            value(daemon, "webhookd_events_total", source="chatwoot", event="unknown", outcome="failed") == 1
        )


def test_without_a_spool(redis: RedisServer) -> None:
    with ObservedDaemon("--redis", redis.url, "--spool", "off") as daemon:
        assert value(daemon, "webhookd_spool_records") is None

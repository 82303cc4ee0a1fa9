"""One trace from the sender to the worker, with real spans of the daemon and of bullmq-otel."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from tests.integration.conftest import StartDaemon
from tests.support.daemon import Daemon
from tests.support.http import exchange, request_bytes
from tests.support.otlp import Collector, tracing
from tests.support.process import ChildProcess, node, wait_until
from tests.support.servers import RedisServer
from tests.support.webhooks import DIRECT, PATH, Webhook, connected, outcome, post, webhook

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SENDER = "00f067aa0ba902b7"
SAMPLED = {"traceparent": f"00-{TRACE}-{SENDER}-01", "tracestate": "vendor=x"}
NOT_SAMPLED = {"traceparent": f"00-{TRACE}-{SENDER}-00"}


class TracedWorker(ChildProcess):
    """A BullMQ worker with bullmq-otel."""

    name = "traced worker"

    def __init__(self, redis_port: int) -> None:
        super().__init__()
        self._redis_port = redis_port

    def argv(self) -> Sequence[str]:
        script = Path(__file__).parents[1] / "node" / "traced_worker.js"
        return [
            node(),
            str(script),
            str(self._redis_port),
            "bull",
            "chatwoot",
        ]

    def is_ready(self) -> bool:
        return "ready\n" in self.log

    @property
    def processed(self) -> dict[str, dict[str, Any]]:
        """The spans of the processed jobs, by trace."""
        lines = [json.loads(line) for line in self.log.splitlines() if line != "ready"]
        return {line["traceId"]: line for line in lines if line["name"] == "process chatwoot"}


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        yield server


def send(daemon: Daemon, event: Webhook, headers: Mapping[str, str]) -> tuple[int, str]:
    request = request_bytes("POST", PATH, {**event.headers, **headers}, event.body)
    return outcome(exchange(daemon.port, request))


def finished(redis: RedisServer) -> list[Any]:
    """Return the ids of the completed jobs."""
    with Redis(port=redis.port) as client:
        ids: Any = client.zrange("bull:chatwoot:completed", 0, -1)
        return list(ids)


def telemetry(redis: RedisServer, job_id: str) -> dict[str, str]:
    """Return the trace context that a job carries for its worker."""
    with Redis(port=redis.port) as client:
        opts: Any = client.hget(f"bull:chatwoot:{job_id}", "opts")
        carried: dict[str, str] = json.loads(json.loads(opts)["tm"])
        return carried


def test_one_trace_from_the_sender_to_the_worker(
    redis: RedisServer, start_daemon: StartDaemon, collector: Collector
) -> None:
    daemon = connected(start_daemon("--redis", redis.url, *DIRECT, environ=collector.environ))
    with TracedWorker(redis.port) as worker:
        assert send(daemon, webhook(1), SAMPLED) == (202, "queued")
        assert send(daemon, webhook(2), {}) == (202, "queued")
        assert send(daemon, webhook(3), NOT_SAMPLED) == (202, "queued")
        wait_until(lambda: len(finished(redis)) == 3, "all jobs are processed")
        wait_until(lambda: len(worker.processed) == 2, "two of them are sampled")
        processed = worker.processed

    assert daemon.stop() == 0  # and with it the last export
    assert len(collector.spans) == 4
    for event, is_from_sender in ((webhook(1), True), (webhook(2), False)):
        [added] = [
            span for span in collector.spans if span.attributes.get("messaging.message.id") == event.job_id
        ]
        [received] = [span for span in collector.spans if span.span_id == added.parent_id]
        assert (received.name, received.kind) == ("POST /webhook/chatwoot", "server")
        assert (added.name, added.kind) == ("add chatwoot", "producer")
        assert (received.trace_id == TRACE) is is_from_sender
        assert received.parent_id == (SENDER if is_from_sender else "")
        assert received.attributes["http.response.status_code"] == 202
        assert added.attributes["webhookd.outcome"] == "queued"
        assert received.resource["service.name"] == "webhookd"
        assert processed[added.trace_id]["parentId"] == added.span_id
    assert telemetry(redis, webhook(1).job_id)["tracestate"] == "vendor=x"
    version, trace_id, parent_id, flags = telemetry(redis, webhook(3).job_id)["traceparent"].split("-")
    assert (version, trace_id, flags) == ("00", TRACE, "00")
    assert parent_id != SENDER
    assert not any(webhook(1).body[start : start + 40] in collector.raw for start in range(0, 400, 40))


def test_a_spooled_event_keeps_its_trace(
    redis: RedisServer, start_daemon: StartDaemon, collector: Collector
) -> None:
    daemon = connected(start_daemon("--redis", redis.url, environ=collector.environ))
    redis.kill()
    assert send(daemon, webhook(1), SAMPLED) == (202, "spooled")
    redis.start()
    wait_until(
        lambda: b"opts" in Redis(port=redis.port).hgetall(f"bull:chatwoot:{webhook(1).job_id}"), "it is a job"
    )
    assert daemon.stop() == 0

    [added] = [span for span in collector.spans if span.kind == "producer"]
    assert added.attributes["webhookd.outcome"] == "spooled"
    assert telemetry(redis, webhook(1).job_id)["traceparent"] == f"00-{TRACE}-{added.span_id}-01"


def test_a_missing_collector_does_no_harm(
    redis: RedisServer, start_daemon: StartDaemon, dead_port: int
) -> None:
    environ = tracing(f"http://127.0.0.1:{dead_port}") | {
        "OTEL_BSP_MAX_QUEUE_SIZE": "16",
        "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "8",
    }
    daemon = connected(start_daemon("--redis", redis.url, *DIRECT, environ=environ))
    for number in range(30):
        assert outcome(post(daemon.port, webhook(number))) == (202, "queued")
    wait_until(lambda: "tracing: " in daemon.log, "the log says so")
    assert daemon.stop() == 0

    assert daemon.log.count("tracing: ") < 5
    assert "Traceback" not in daemon.log


# -- mistakes at the start ----------------------------------------------------------------------------------


def without_sdk(directory: Path) -> dict[str, str]:
    """Return an environment in which OpenTelemetry cannot be imported."""
    error = "raise ModuleNotFoundError('not here', name='opentelemetry')\n"
    (directory / "opentelemetry.py").write_text(error, encoding="utf-8")
    return {"PYTHONPATH": str(directory)}


def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    for environ, words in (
        (without_sdk(tmp_path), "pip install 'webhookd[otel]'"),
        ({"OTEL_BSP_MAX_QUEUE_SIZE": "1"}, "max_export_batch_size"),
    ):
        daemon = Daemon("--redis", "redis://127.0.0.1:1/0", environ={"WEBHOOK_TRACING": "otlp", **environ})
        daemon.launch()
        try:
            assert daemon.wait() == 1
            [line] = daemon.log.splitlines()
        finally:
            daemon.close()
        assert line.startswith("webhookd: tracing: ")
        assert words in line


def test_without_tracing_opentelemetry_is_not_needed(tmp_path: Path, start_daemon: StartDaemon) -> None:
    daemon = start_daemon("--redis", "redis://127.0.0.1:1/0", *DIRECT, environ=without_sdk(tmp_path))

    assert daemon.get("/health/live").status == 200

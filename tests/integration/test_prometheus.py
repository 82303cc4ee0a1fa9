"""The shipped files for Prometheus and Grafana: checked, tested, and run with real replicas.

The tests of the rules are in conf/prometheus/tests. This module runs them, and checks that none is missing.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families as parse

from tests.support.bullmq import Queue
from tests.support.nginx import Load, assert_each_is_one_job
from tests.support.process import find_tool, wait_until
from tests.support.prometheus import RULES, SHIPPED, ObservedDaemon, Prometheus, load_rules, promtool
from tests.support.servers import RedisServer
from tests.support.webhooks import Webhook, connected, post, webhook
from webhookd.bullmq.keys import QueueKeys
from webhookd.samples import SECRET

REPOSITORY = Path(__file__).parents[2]
DOCKER = REPOSITORY / "docker"
GRAFANA = REPOSITORY / "conf" / "grafana"
RUNBOOK = (REPOSITORY / "docs" / "runbook.md").read_text(encoding="utf-8")
DASHBOARD: Mapping[str, Any] = json.loads(
    (GRAFANA / "dashboards" / "webhookd.json").read_text(encoding="utf-8")
)
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
ROWS = ["Requests", "Events and locks", "Redis, breaker and spool", "Queue", "Process"]

_METRIC = re.compile(r"\b(?:webhookd|bullmq|process)_\w+")
_RECORDED = re.compile(r"\b\w+:\w+:\w+\b")


# -- rules --------------------------------------------------------------------------------------------------


def alerts() -> list[Mapping[str, Any]]:
    return [rule for rule in load_rules() if "alert" in rule]


def assert_valid(checked: subprocess.CompletedProcess[str]) -> None:
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_rules_are_valid() -> None:
    assert_valid(promtool("check", "rules", *RULES))


@pytest.mark.slow
def test_the_rules_do_what_they_should() -> None:
    assert_valid(promtool("test", "rules", *sorted((SHIPPED / "tests").glob("*.yml"))))


def test_each_alert_is_tested_to_fire_and_to_be_silent() -> None:
    firing, silent = set(), set()
    for path in (SHIPPED / "tests").glob("*.yml"):
        for test in yaml.safe_load(path.read_text())["tests"]:
            for case in test["alert_rule_test"]:
                found = [_with_severity(case["alertname"], one["exp_labels"]) for one in case["exp_alerts"]]
                (firing.update(found) if found else silent.add(case["alertname"]))
    assert firing == {_with_severity(alert["alert"], alert["labels"]) for alert in alerts()}
    assert silent == {alert["alert"] for alert in alerts()}


def _with_severity(name: str, labels: Mapping[str, str]) -> tuple[str, str]:
    return name, labels["severity"]


def test_each_alert_says_how_bad_it_is_and_what_to_do() -> None:
    sections = {heading.lower() for heading in re.findall(r"^## (Webhookd\w+)$", RUNBOOK, re.MULTILINE)}
    for alert in alerts():
        assert alert["labels"]["severity"] in ("critical", "warning"), alert
        assert "$value" in alert["annotations"]["summary"], alert
        assert alert["annotations"]["runbook_url"] == f"docs/runbook.md#{alert['alert'].lower()}"
    assert sections == {alert["alert"].lower() for alert in alerts()}


def test_each_section_of_the_runbook_is_whole() -> None:
    for section in re.split(r"^## ", RUNBOOK, flags=re.MULTILINE)[2:]:
        name, _, text = section.partition("\n")
        severities = [f"**{alert['labels']['severity']}" for alert in alerts() if alert["alert"] == name]
        assert severities, name
        assert all(severity in text for severity in severities), name
        for part in (r"^Look\b", r"^(Look and do|Do)\b", r"^Over: "):
            assert re.search(part, text, re.MULTILINE), (name, part)


def test_the_scrape_configurations_are_valid(tmp_path: Path) -> None:
    assert_valid(promtool("check", "config", SHIPPED / "prometheus.yml"))
    # Debian builds Prometheus without Kubernetes, so the discovery of pods is not checked.
    config = yaml.safe_load((SHIPPED / "kubernetes.yml").read_text())
    config["rule_files"] = [str(path) for path in RULES]
    (job,) = config["scrape_configs"]
    assert job.pop("kubernetes_sd_configs") == [{"role": "pod"}]
    rendered = tmp_path / "kubernetes.yml"
    rendered.write_text(yaml.safe_dump(config))
    assert_valid(promtool("check", "config", rendered))


def test_the_configuration_of_the_alertmanager_is_valid() -> None:
    amtool = find_tool("amtool", "it is in Debian's package prometheus-alertmanager")
    command = [amtool, "check-config", str(SHIPPED / "alertmanager.yml")]
    assert_valid(subprocess.run(command, capture_output=True, text=True, check=False))
    config = yaml.safe_load((SHIPPED / "alertmanager.yml").read_text())
    named = re.findall(r"Webhookd\w+", json.dumps(config))
    assert set(named) <= {alert["alert"] for alert in alerts()}


# -- the compose profile ------------------------------------------------------------------------------------


def test_the_profile_brings_what_the_configurations_name() -> None:
    compose = yaml.safe_load((DOCKER / "docker-compose.yml").read_text())
    profile = {name for name, one in compose["services"].items() if one.get("profiles") == ["monitoring"]}
    assert profile == {"prometheus", "alertmanager", "grafana"}
    config = yaml.safe_load((SHIPPED / "prometheus.yml").read_text())
    discovery = config["scrape_configs"][0]["dns_sd_configs"][0]
    assert set(discovery["names"]) <= compose["services"].keys()
    assert f"WEBHOOK_OPS_ENDPOINT=tcp:{discovery['port']} " in (DOCKER / "Dockerfile").read_text()
    assert config["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] == ["alertmanager:9093"]
    networks = {tuple(compose["services"][name]["networks"]) for name in profile}
    assert networks <= {("back",)}
    assert "back" in compose["services"]["webhook-api"]["networks"]


def test_the_profile_mounts_what_is_there() -> None:
    services = yaml.safe_load((DOCKER / "docker-compose.yml").read_text())["services"]
    mounts = [
        mount for name in ("prometheus", "alertmanager", "grafana") for mount in services[name]["volumes"]
    ]
    paths = {mount.split(":")[0]: mount.split(":")[1] for mount in mounts if mount.startswith("..")}
    assert all((DOCKER / path).exists() for path in paths)
    dashboards = yaml.safe_load((GRAFANA / "provisioning" / "dashboards" / "webhookd.yml").read_text())
    assert dashboards["providers"][0]["options"]["path"] == paths["../conf/grafana/dashboards"]
    # Ports are published on loopback: neither Prometheus nor Alertmanager has a login.
    ports = [port for name in ("prometheus", "alertmanager", "grafana") for port in services[name]["ports"]]
    assert all(port.startswith("127.0.0.1:") for port in ports)


# -- the dashboard, by the rules of Grafana's dashboard-linter ----------------------------------------------


def test_it_can_be_provisioned_anywhere() -> None:
    assert DASHBOARD["uid"] == "webhookd"
    assert DASHBOARD["editable"] is False
    assert DASHBOARD["schemaVersion"] >= 36
    assert [row["title"] for row in DASHBOARD["panels"] if row["type"] == "row"] == ROWS
    assert "id" not in DASHBOARD
    provisioning = GRAFANA / "provisioning"
    dashboards = yaml.safe_load((provisioning / "dashboards" / "webhookd.yml").read_text())
    assert dashboards["providers"][0]["allowUiUpdates"] is False
    sources = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())
    assert [source["type"] for source in sources["datasources"]] == ["prometheus"]


def test_its_variables() -> None:
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert list(variables) == ["datasource", "job", "instance", "source"]
    assert variables.pop("datasource")["type"] == "datasource"
    for name, variable in variables.items():
        assert variable["query"]["query"].endswith(f", {name})")
        assert (variable["multi"], variable["includeAll"], variable["allValue"]) == (True, True, ".+")


def test_no_data_source_is_named() -> None:
    holders = [*PANELS, *DASHBOARD["annotations"]["list"], *DASHBOARD["templating"]["list"][1:]]
    holders += [target for panel in PANELS for target in panel["targets"]]
    for holder in holders:
        assert holder["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, holder


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: str(panel["title"]))
def test_a_panel_says_what_it_shows(panel: Mapping[str, Any]) -> None:
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert all(target["legendFormat"] for target in panel["targets"])


def test_each_panel_has_its_own_title_id_and_place() -> None:
    assert len({panel["title"] for panel in PANELS}) == len(PANELS)
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    for one, other in combinations([panel["gridPos"] for panel in DASHBOARD["panels"]], 2):
        columns_differ = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        rows_differ = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert columns_differ or rows_differ, (one, other)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in PANELS)


def queries() -> list[str]:
    """Return all queries of the dashboard."""
    annotations = [annotation["expr"] for annotation in DASHBOARD["annotations"]["list"]]
    return [target["expr"] for panel in PANELS for target in panel["targets"]] + annotations


@pytest.mark.parametrize("query", queries())
def test_a_query_uses_the_variables(query: str) -> None:
    selectors = re.findall(r"\{(.*?)\}", query)
    assert selectors
    for selector in selectors:
        assert 'job=~"$job"' in selector
        assert 'instance=~"$instance"' in selector or "alertname" in selector
        assert ('source=~"$source"' in selector) == bool(
            re.search(r"webhookd_(?:events|signature_\w+)_total\{" + re.escape(selector), query)
        )
    # Grafana derives the interval of a rate from the scrape interval.
    assert set(re.findall(r"\b(?:rate|increase)\(.*?\[(.*?)\]", query)) <= {"$__rate_interval", "1m"}


# -- queries and real metrics -------------------------------------------------------------------------------


def runbook_queries() -> list[str]:
    blocks = re.findall(r"```promql\n(.*?)```", RUNBOOK, re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def test_each_query_is_valid(tmp_path: Path) -> None:
    asked = [re.sub(r"\$__\w+", "1m", query) for query in [*queries(), *runbook_queries()]]
    rules = [{"record": f"query:{number}", "expr": query} for number, query in enumerate(asked)]
    path = tmp_path / "queries.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    assert_valid(promtool("check", "rules", path))


def test_each_metric_is_in_a_real_scrape(redis: RedisServer) -> None:
    with ObservedDaemon("--redis", redis.url, "--secret", SECRET) as daemon:
        connected(daemon)
        # The daemon reads the queues on a separate connection, which can take a moment longer.
        wait_until(
            lambda: "webhookd_queue_oldest_wait_age_seconds{" in daemon.scrape(), "the queues are seen"
        )
        samples = {sample.name for family in parse(daemon.scrape()) for sample in family.samples}
    recorded = {rule["record"] for rule in load_rules() if "record" in rule}
    asked = [*queries(), *runbook_queries(), *(rule["expr"] for rule in load_rules())]
    variables = [variable["definition"] for variable in DASHBOARD["templating"]["list"][1:]]
    texts = [_RECORDED.sub("", text) for text in [*asked, *variables]] + [
        RUNBOOK.replace("job_queue_state:", "")
    ]
    assert {name for text in texts for name in _METRIC.findall(text)} - samples == set()
    assert {name for text in asked for name in _RECORDED.findall(text)} - recorded == set()


# -- Prometheus, replicas, load, and a Redis that dies ------------------------------------------------------

_PER_SECOND = 50
_SECONDS = 8
_NEW = 2 * _PER_SECOND * _SECONDS
_WINDOW_S = 5
_TOLERANCE = 0.1
_OF_A_BUSY_MACHINE = {"WebhookdLatencyBudgetBurn", "WebhookdReactorLag"}
"""The alerts that fire if the machine of the tests is busy. They are right to."""


class TimedLoad(Load):
    """A load that records the wall-clock time of each answer."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.answered_at_s: list[float] = []

    async def _exchange(self, request: bytes) -> int:
        status = await super()._exchange(request)
        self.answered_at_s.append(time.time())
        return status


@pytest.fixture
def safe_redis() -> Iterator[RedisServer]:
    with RedisServer(config=["appendonly yes"]) as redis:
        yield redis


@pytest.mark.slow
def test_figures_agree_and_a_killed_redis_is_seen(safe_redis: RedisServer) -> None:
    redis = safe_redis
    with ExitStack() as stack:
        daemons = [ObservedDaemon("--redis", redis.url) for _ in range(3)]
        for daemon in daemons:
            stack.callback(daemon.close)
            daemon.launch()
        prometheus = stack.enter_context(Prometheus(daemons))
        for daemon in daemons:
            daemon.wait_ready()
        first = _first_events(daemons, prometheus)
        loads = [*_load(daemons, prometheus), _outage(redis, daemons[0], prometheus)]
        events = {event.job_id: event for load in loads for event in load.accepted}
        with redis.client() as client:
            queue = Queue(client, QueueKeys("bull", "chatwoot"))
            assert_each_is_one_job(queue, [*first, *events.values()])


def _first_events(daemons: list[ObservedDaemon], prometheus: Prometheus) -> list[Webhook]:
    """Send one event to each daemon, and wait until it is a job: a spool may still be opening."""
    events = [webhook(number) for number, _ in enumerate(daemons, start=1)]
    for daemon, event in zip(daemons, events, strict=True):
        assert post(connected(daemon).port, event).status == 202
    acquired = "webhookd_lock_total{outcome='acquired'}"
    wait_until(
        lambda: list(prometheus.query(acquired).values()) == [1, 1, 1], "each is a job, and is recorded"
    )
    return events


def _load(daemons: list[ObservedDaemon], prometheus: Prometheus) -> list[TimedLoad]:
    """Send an even load to all daemons. The third gets the events of the first, half as fast."""
    count = _PER_SECOND * _SECONDS
    loads = [
        TimedLoad(daemons[0].port, _PER_SECOND, first=1_000_000, limit=count),
        TimedLoad(daemons[1].port, _PER_SECOND, first=2_000_000, limit=count),
        TimedLoad(daemons[2].port, _PER_SECOND / 2, first=1_000_000, limit=count // 2),
    ]
    for load in loads:
        load.start()
    for load in loads:
        load.finish()
    end_s = time.time()
    statuses = Counter(sent.status for load in loads for sent in load.sent)
    assert statuses == {202: _NEW, 200: count // 2}

    new = statuses[202] + len(daemons)
    deliveries = 'sum by (code) (webhookd_http_requests_total{route="/webhook/chatwoot"} > 0)'
    wait_until(
        lambda: prometheus.query(deliveries) == {("200",): statuses[200], ("202",): new},
        "each answer is recorded",
    )
    assert prometheus.value("sum(webhookd_events_total{outcome=~'queued|spooled'})") == new
    assert prometheus.value("sum(webhookd_events_total{outcome='already_queued'})") == statuses[200]
    wait_until(
        lambda: prometheus.value("sum(webhookd_lock_total{outcome='acquired'})") == new, "each event is a job"
    )
    wait_until(lambda: prometheus.firing() <= _OF_A_BUSY_MACHINE, "nothing is wrong")
    assert _error_of_rate(prometheus, loads, end_s - 0.5) < _TOLERANCE
    return loads


def _error_of_rate(prometheus: Prometheus, loads: list[TimedLoad], end_s: float) -> float:
    """Return the relative error of the recorded rate, the median of five windows.

    In a single window, the machine may pause between the last scrape and the end.
    """
    rate = f'sum(rate(webhookd_http_requests_total{{route="/webhook/chatwoot"}}[{_WINDOW_S}s]))'
    answered_at_s = [at_s for load in loads for at_s in load.answered_at_s]
    errors = []
    for step in range(5):
        until_s = end_s - step / 2
        sent = sum(until_s - _WINDOW_S < at_s <= until_s for at_s in answered_at_s)
        errors.append(abs(prometheus.value(rate, until_s) * _WINDOW_S / sent - 1))
    return median(errors)


def _outage(redis: RedisServer, daemon: ObservedDaemon, prometheus: Prometheus) -> Load:
    """Kill Redis under load, and start it again."""
    expected = {"WebhookdRedisDown", "WebhookdSpooling"}
    with Load(daemon.port, 20, first=3_000_000) as load:
        redis.kill()
        wait_until(lambda: expected <= prometheus.firing(), "the alerts fire")
        assert "WebhookdEventsLost" not in prometheus.firing()
        redis.start()
        wait_until(lambda: prometheus.firing() <= _OF_A_BUSY_MACHINE, "the alerts resolve")
    assert load.failed == []
    answers = "sum(webhookd_http_requests_total{code='202'})"
    before = _NEW + prometheus.healthy_targets()
    wait_until(lambda: prometheus.value(answers) == before + len(load.accepted), "each answer is recorded")
    spooled = prometheus.value("sum(webhookd_events_total{outcome='spooled'})")
    assert 0 < spooled <= prometheus.value("sum(webhookd_spool_replayed_total{outcome='queued'})")
    return load

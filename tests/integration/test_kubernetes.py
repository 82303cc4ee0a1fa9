"""The Kubernetes files, checked with their schemas and with each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from cloudcoil.models.keda.v1alpha1 import ScaledObject
from cloudcoil.models.prometheus_operator.v1 import PodMonitor, PrometheusRule

from tests.integration.test_compose import configuration
from tests.support.prometheus import RULES, SHIPPED, load_rules, promtool

BASE = Path(__file__).parents[2] / "conf" / "kubernetes"
MONITORING = BASE / "monitoring"
VERSIONS = ("1.30", "1.35")


def documents(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text()))


def resources(kustomization: Path) -> list[Path]:
    (content,) = documents(kustomization / "kustomization.yaml")
    return [kustomization / name for name in content["resources"]]


def named(kind: str) -> Any:
    """Return the only resource of a kind in the base."""
    (found,) = (
        resource for path in resources(BASE) for resource in documents(path) if resource["kind"] == kind
    )
    return found


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("path", resources(BASE), ids=lambda path: path.name)
def test_kubernetes_would_take_it(path: Path, version: str) -> None:
    for resource in documents(path):
        kubernetes_validate.validate(resource, version, strict=True)


def test_a_typo_would_be_found() -> None:
    resource = named("StatefulSet")
    resource["spec"]["template"]["spec"]["enableServiceLink"] = False

    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(resource, VERSIONS[0], strict=True)


def closed(schema: Any) -> Any:
    """Return a JSON schema that allows only the properties that it names."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    parts = {name: closed(part) for name, part in schema.items()}
    return {**parts, "additionalProperties": False} if "properties" in schema else parts


@pytest.mark.parametrize("path", resources(BASE / "keda"), ids=lambda path: path.name)
def test_keda_would_take_it(path: Path) -> None:
    schema = closed(ScaledObject.model_json_schema())
    (resource,) = documents(path)
    jsonschema.validate(resource, schema)

    resource["spec"]["minReplicas"] = 1
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(resource, schema)


@pytest.mark.parametrize("path", resources(MONITORING), ids=lambda path: path.name)
def test_the_prometheus_operator_would_take_it(path: Path) -> None:
    (resource,) = documents(path)
    schemas = {model.__name__: model.model_json_schema() for model in (PodMonitor, PrometheusRule)}
    # Without a look at the schema itself: its regular expressions are Go's.
    validator = jsonschema.Draft202012Validator(closed(schemas[resource["kind"]]))
    validator.validate(resource)

    resource["spec"]["jobLabels"] = "job"
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(resource)


def test_each_file_belongs_to_a_kustomization() -> None:
    listed = {path for folder in (BASE, BASE / "keda", MONITORING) for path in resources(folder)}

    assert listed == {path for path in BASE.rglob("*.yaml") if path.name != "kustomization.yaml"}


def test_no_lost_metric_scales_to_zero() -> None:
    autoscaler = named("HorizontalPodAutoscaler")["spec"]
    scaled = [documents(path)[0]["spec"] for path in resources(BASE / "keda")]

    assert autoscaler["minReplicas"] >= 2
    assert all(spec["minReplicaCount"] >= 1 and spec["fallback"]["replicas"] >= 1 for spec in scaled)
    assert all("idleReplicaCount" not in spec for spec in scaled)
    triggers = [trigger for spec in scaled for trigger in spec["triggers"] if trigger["type"] == "prometheus"]
    assert [trigger["metadata"]["ignoreNullValues"] for trigger in triggers] == ["false"]


def test_receivers_scale_on_load_and_workers_on_what_waits() -> None:
    triggers = {
        documents(path)[0]["metadata"]["name"]: documents(path)[0]["spec"]["triggers"][0]["metadata"]
        for path in resources(BASE / "keda")
    }

    (deliveries,) = (
        rule["expr"] for rule in load_rules() if rule.get("record") == "job:webhookd_deliveries:rate1m"
    )
    assert triggers["webhookd"]["query"] == deliveries.replace("sum by (job) ", "sum")
    queue = configuration()["services"]["webhook-api"]["environment"]["WEBHOOK_QUEUE"]
    assert triggers["chatwoot-workers"]["listName"] == f"bull:{queue}:wait"


def test_a_pod_has_time_to_end() -> None:
    pod = named("StatefulSet")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    _, pause = container["lifecycle"]["preStop"]["exec"]["command"]

    assert pod["terminationGracePeriodSeconds"] > int(pause) + 10 + 10  # answering, draining
    assert container["readinessProbe"]["httpGet"]["path"] == "/health/ready"
    assert container["livenessProbe"]["httpGet"]["path"] == "/health/live"


def test_the_spool_outlives_its_pod() -> None:
    spec = named("StatefulSet")["spec"]

    assert spec["persistentVolumeClaimRetentionPolicy"]["whenScaled"] == "Retain"
    (claim,) = spec["volumeClaimTemplates"]
    mounts = spec["template"]["spec"]["containers"][0]["volumeMounts"]
    assert {mount["name"]: mount["mountPath"] for mount in mounts}[
        claim["metadata"]["name"]
    ] == "/var/lib/webhookd"


def test_services_leave_no_variables() -> None:
    assert named("StatefulSet")["spec"]["template"]["spec"]["enableServiceLinks"] is False


# -- the Prometheus operator --------------------------------------------------------------------------------


@pytest.mark.parametrize("rules", RULES, ids=lambda path: path.name)
def test_the_operator_has_the_rules_that_prometheus_has(rules: Path) -> None:
    (resource,) = documents(MONITORING / f"{rules.stem}.yaml")

    assert resource["spec"] == yaml.safe_load(rules.read_text()), "run `make rules`"


def test_the_rules_find_the_pods_of_the_operator() -> None:
    (monitor,) = documents(MONITORING / "podmonitor.yaml")
    (kustomization,) = documents(BASE / "kustomization.yaml")
    prometheus = yaml.safe_load((SHIPPED / "prometheus.yml").read_text())

    labels = kustomization["labels"][0]["pairs"]
    assert monitor["spec"]["selector"]["matchLabels"] == labels
    assert labels[monitor["spec"]["jobLabel"]] == prometheus["scrape_configs"][0]["job_name"]
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    (container,) = named("StatefulSet")["spec"]["template"]["spec"]["containers"]
    assert endpoint["port"] in [port["name"] for port in container["ports"]]
    assert endpoint["interval"] == prometheus["global"]["scrape_interval"]


def test_a_spool_that_a_pod_left_behind_is_an_alert_until_the_pod_is_back(tmp_path: Path) -> None:
    (resource,) = documents(MONITORING / "retained-spool.yaml")
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(resource["spec"]))
    series = {"webhookd-0": "0x60", "webhookd-1": "5x10 _x30 5x20", "webhookd-2": "5x8 0x2 _x50"}
    fires = {
        "exp_labels": {"severity": "warning", "namespace": "webhooks", "pod": "webhookd-1"},
        "exp_annotations": {
            "summary": "webhookd-1 is gone, and 5 events wait in its spool",
            "description": "Scale the StatefulSet up until webhookd-1 is back: it drains its spool by itself."
            " Then scale down again.",
            "runbook": 'docs/deployment.md, "What a removed replica leaves behind"',
        },
    }
    test = {
        "interval": "1m",
        "input_series": [
            {"series": f'webhookd_spool_records{{namespace="webhooks",pod="{pod}"}}', "values": values}
            for pod, values in series.items()
        ],
        "alert_rule_test": [
            {"alertname": "WebhookdRetainedSpool", "eval_time": at, "exp_alerts": alerts}
            for at, alerts in (("10m", []), ("30m", [fires]), ("50m", []))
        ],
    }
    (tmp_path / "test.yml").write_text(yaml.safe_dump({"rule_files": ["rules.yml"], "tests": [test]}))

    checked = promtool("test", "rules", tmp_path / "test.yml")

    assert checked.returncode == 0, checked.stdout + checked.stderr

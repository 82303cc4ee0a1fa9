"""The Kubernetes files against their schemas, and what must be true of them together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from cloudcoil.models.keda.v1alpha1 import ScaledObject

from tests.integration.test_compose import configuration

BASE = Path(__file__).parents[2] / "conf" / "kubernetes"
VERSIONS = ("1.30", "1.35")


def documents(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text()))


def resources(kustomization: Path) -> list[Path]:
    (content,) = documents(kustomization / "kustomization.yaml")
    return [kustomization / name for name in content["resources"]]


def named(kind: str) -> Any:
    """The base's one resource of a kind."""
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
    """A JSON schema that allows no property that it does not name."""
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


def test_each_file_belongs_to_a_kustomization() -> None:
    listed = {path for folder in (BASE, BASE / "keda", BASE / "monitoring") for path in resources(folder)}

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

    assert "webhookd_http_requests_total" in triggers["webhookd"]["query"]
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

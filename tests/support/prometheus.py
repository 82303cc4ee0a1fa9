"""Debian's Prometheus with the shipped configuration and rules, which it evaluates faster, and promtool."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import yaml

from .daemon import Daemon
from .http import get
from .process import ChildProcess, find_tool

SHIPPED = Path(__file__).parents[2] / "conf" / "prometheus"
RULES = sorted((SHIPPED / "rules").glob("*.yml"))

_INTERVAL = "1s"
_INSTALLED_BY = "it is in Debian's package prometheus"


def promtool(*arguments: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run promtool to its end."""
    command = [find_tool("promtool", _INSTALLED_BY), *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)


def load_rules() -> list[Mapping[str, Any]]:
    """Return all shipped rules, in the order of their files."""
    groups = [group for path in RULES for group in yaml.safe_load(path.read_text())["groups"]]
    return [rule for group in groups for rule in group["rules"]]


class ObservedDaemon(Daemon):
    """A daemon with an ops endpoint, on `ops_port`."""

    def __init__(self, *options: str, **settings: Any) -> None:
        super().__init__(*options, **settings)
        self.ops_port = self.reserve_port()

    def argv(self) -> Sequence[str]:
        return [*super().argv(), "--ops-endpoint", f"tcp:{self.ops_port}:interface={self.host}"]

    def scrape(self) -> str:
        """Return the answer to ``/metrics``, in the classic text format."""
        response = get(self.ops_port, "/metrics")
        assert response.status == 200, response
        return response.body.decode()


class Prometheus(ChildProcess):
    """A Prometheus that scrapes some daemons each second, as the job ``webhookd``. Alerts fire after 1 s."""

    name = "prometheus"

    def __init__(self, daemons: Iterable[ObservedDaemon]) -> None:
        super().__init__()
        self.port = self.reserve_port()
        self._targets = [f"{daemon.host}:{daemon.ops_port}" for daemon in daemons]

    def argv(self) -> Sequence[str]:
        return [
            find_tool("prometheus", _INSTALLED_BY),
            f"--config.file={self._write_config()}",
            f"--storage.tsdb.path={self.directory / 'data'}",
            f"--web.listen-address=127.0.0.1:{self.port}",
            "--log.level=warn",
        ]

    def _write_config(self) -> Path:
        config = yaml.safe_load((SHIPPED / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": _INTERVAL, "evaluation_interval": _INTERVAL}
        (webhookd,) = (job for job in config["scrape_configs"] if job["job_name"] == "webhookd")
        del webhookd["dns_sd_configs"]
        webhookd["static_configs"] = [{"targets": self._targets}]
        config["scrape_configs"] = [webhookd]
        del config["alerting"]
        rules = self.directory / "rules"
        rules.mkdir(exist_ok=True)
        for path in RULES:
            (rules / path.name).write_text(re.sub(r"\bfor: \w+", "for: 1s", path.read_text()))
        path = self.directory / "prometheus.yml"
        path.write_text(yaml.safe_dump(config))
        return path

    def is_ready(self) -> bool:
        try:
            return get(self.port, "/-/ready").status == 200
        except OSError:
            return False

    def query(self, expression: str, at_s: float | None = None) -> dict[tuple[str, ...], float]:
        """Return the values of an instant query, by the values of their labels, in the order of the names."""
        parameters = {"query": expression} | ({} if at_s is None else {"time": str(at_s)})
        found = self._ask(f"query?{urlencode(parameters)}")["result"]
        return {
            tuple(value for _, value in sorted(one["metric"].items())): float(one["value"][1])
            for one in found
        }

    def value(self, expression: str, at_s: float | None = None) -> float:
        """Return the value of a query with one result, or 0 if it has none."""
        return next(iter(self.query(expression, at_s).values()), 0.0)

    def firing(self) -> set[str]:
        """Return the names of the alerts that fire now."""
        alerts = self._ask("alerts")["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}

    def healthy_targets(self) -> int:
        """Return the number of targets whose last scrape succeeded."""
        return sum(target["health"] == "up" for target in self._ask("targets")["activeTargets"])

    def _ask(self, path: str) -> Any:
        answer = json.loads(get(self.port, f"/api/v1/{path}").body)
        assert answer["status"] == "success", answer
        return answer["data"]

"""The compose file against its specification, and the start script with a ``docker`` that takes notes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose

from tests.support.process import find_tool
from webhookd.config import OPTIONS

DOCKER = Path(__file__).parents[2] / "docker"
COMPOSE = DOCKER / "docker-compose.yml"
EXAMPLE = DOCKER.parent / ".env.example"


def example() -> Mapping[str, str]:
    """Return the settings of .env.example."""
    lines = [line for line in EXAMPLE.read_text().splitlines() if re.match("[A-Z]", line)]
    return dict(line.split("=", 1) for line in lines)


def configuration(
    environ: Mapping[str, str] | None = None, path: Path = COMPOSE, profiles: Sequence[str] = ()
) -> Any:
    """Return the compose file with its variables filled in, checked against the specification."""
    program = str(Path(sys.executable).with_name("podman-compose"))
    with TemporaryDirectory() as directory:
        podman = Path(directory, "podman")  # podman-compose only asks for its version
        podman.write_text("#!/bin/sh\necho podman version 4.3.1\n")
        podman.chmod(0o755)
        chosen = [f"--profile={profile}" for profile in profiles]
        text = subprocess.run(
            [program, "--podman-path", str(podman), "--file", str(path), *chosen, "config"],
            env={"PATH": os.defpath, **(environ or {})},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    content = yaml.safe_load(text)
    for service in content["services"].values():
        if (
            "deploy" in service
        ):  # podman-compose leaves a variable's value a string; Compose makes it a number
            service["deploy"]["replicas"] = int(service["deploy"]["replicas"])
    PyCompose.from_yaml(yaml.safe_dump(content)).validate()
    return content


# -- the compose file ---------------------------------------------------------------------------------------


def test_the_compose_file_is_valid() -> None:
    assert configuration()["services"].keys() == {"webhook-api", "nginx", "redis"}


def test_the_image_is_the_published_one_and_can_be_built() -> None:
    replica = configuration()["services"]["webhook-api"]
    repository = re.search(
        r'^_URL = "https://github.com/(\S+)"$', (DOCKER.parent / "setup.py").read_text(), re.MULTILINE
    )

    assert repository
    assert replica["image"] == f"ghcr.io/{repository[1]}:latest"
    assert (DOCKER / replica["build"]["context"] / replica["build"]["dockerfile"]).exists()


def test_a_typo_would_be_found(tmp_path: Path) -> None:
    typo = tmp_path / "docker-compose.yml"
    typo.write_text(COMPOSE.read_text().replace("stop_grace_period:", "stop_grace_periods:"))

    with pytest.raises(ValueError, match="stop_grace_periods"):
        configuration(path=typo)


def test_the_example_shows_the_default_of_each_setting() -> None:
    assert configuration(example()) == configuration()
    names = set(re.findall(r"\$\{(\w+)", COMPOSE.read_text()))
    assert names <= example().keys() | {"REDIS_URL"}
    assert {
        "WEBHOOK_PORT",
        "WEBHOOK_API_REPLICAS",
        "WEBHOOK_JOB_CREATE_LOCK_TTL",
        "PORT",
        "API_UPSTREAM",
    } <= names


def test_settings_reach_their_services() -> None:
    services = configuration(
        {
            "WEBHOOK_VERSION": "1.2.3",
            "WEBHOOK_PORT": "4001",
            "WEBHOOK_API_REPLICAS": "5",
            "WEBHOOK_JOB_CREATE_LOCK_TTL": "7000",
            "PORT": "8080",
            "API_UPSTREAM": "http://api:80",
            "WEBHOOK_MAX_BODY": "1000000",
        }
    )["services"]
    replica, nginx = services["webhook-api"], services["nginx"]

    assert replica["image"] == "ghcr.io/webhookd/webhookd:1.2.3"
    assert replica["deploy"]["replicas"] == 5
    assert replica["environment"]["WEBHOOK_PORT"] == "4001"
    assert replica["environment"]["WEBHOOK_JOB_CREATE_LOCK_TTL"] == "7000"
    assert nginx["environment"]["WEBHOOK_UPSTREAM"] == "webhook-api:4001"
    assert nginx["environment"]["API_UPSTREAM"] == "http://api:80"
    assert nginx["ports"] == ["8080:3000"]
    assert nginx["environment"]["WEBHOOK_MAX_BODY"] == replica["environment"]["WEBHOOK_MAX_BODY"] == "1000000"


def test_the_daemon_knows_each_setting_that_it_gets() -> None:
    known = {name for option in OPTIONS for name in option.environment}
    known |= {f"{name}_FILE" for option in OPTIONS if option.secret for name in option.environment}

    assert configuration()["services"]["webhook-api"]["environment"].keys() <= known


def test_the_tools_do_not_start_by_default_and_are_only_for_this_machine() -> None:
    environ = {"WEBHOOK_QUEUE": "events", "BULL_BOARD_LOGIN": "operator:secret"}
    services = configuration(environ, profiles=["tools"])["services"]
    board = services["bull-board"]

    assert board["profiles"] == ["tools"]
    assert board["ports"] == ["127.0.0.1:3003:3003"]
    assert board["networks"] == ["back"]
    environment = board["environment"]
    assert (environment["QUEUES"], environment["LOGIN"]) == ("events", "operator:secret")
    assert environment["REDIS_URL"] == services["webhook-api"]["environment"]["REDIS_URL"]
    settings = set(re.findall(r"setting\('(\w+)'", (DOCKER / "bull-board" / "server.js").read_text()))
    assert environment.keys() < settings


def test_several_replicas_can_run_and_have_time_to_stop() -> None:
    replica = configuration()["services"]["webhook-api"]

    assert "container_name" not in replica
    assert "ports" not in replica
    grace_s = int(replica["stop_grace_period"].removesuffix("s"))
    assert grace_s > int(replica["environment"]["WEBHOOK_DRAIN_TIMEOUT"]) + 10  # to answer accepted requests


@pytest.mark.parametrize("name", ["webhook-api", "nginx", "redis", "bull-board"])
def test_every_container_has_little_to_lose(name: str) -> None:
    service = configuration(profiles=["tools"])["services"][name]

    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    if name != "webhook-api":  # its image sets the user
        assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", service["user"])


def test_each_service_waits_for_the_one_that_it_needs() -> None:
    services = configuration()["services"]

    assert services["nginx"]["depends_on"] == {"webhook-api": {"condition": "service_healthy"}}
    assert services["webhook-api"]["depends_on"] == {"redis": {"condition": "service_healthy"}}


def test_mounted_files_exist() -> None:
    content = configuration()
    mounted = [
        volume.partition(":")[0] for service in content["services"].values() for volume in service["volumes"]
    ]

    assert all((DOCKER / path).exists() or path in content["volumes"] for path in mounted)
    assert "/secrets/" in (DOCKER / ".gitignore").read_text()


# -- the start script ---------------------------------------------------------------------------------------

FAKE_DOCKER = """\
#!/bin/sh
echo "$@" >>"$NOTES"
case "$*" in
*" port nginx 3000") echo 0.0.0.0:3000 ;;
*" ps --quiet webhook-api") echo one; echo two; echo three ;;
*" up "*) exit "${UP_EXIT_CODE:-0}" ;;
esac
"""


class Shell:
    """The start script in a copy of its directory, with a docker that writes down its commands."""

    def __init__(self, directory: Path) -> None:
        self.docker = directory / "project" / "docker"
        shutil.copytree(DOCKER, self.docker, ignore=shutil.ignore_patterns("secrets", "node_modules"))
        self.path = directory / "bin"
        self.path.mkdir()
        docker = self.path / "docker"
        docker.write_text(FAKE_DOCKER)
        docker.chmod(0o755)
        self.notes = directory / "notes"

    def run(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        script = str(self.docker / "start-webhook-api.sh")
        path = f"{self.path}:{os.defpath}"
        return subprocess.run(
            [script, *arguments],
            env={"PATH": path, "NOTES": str(self.notes), **environ},
            capture_output=True,
            text=True,
            check=False,
        )

    @property
    def commands(self) -> list[str]:
        """The commands that docker got, without the compose file's name."""
        notes = self.notes.read_text().replace(f" --file {self.docker / 'docker-compose.yml'}", "")
        return [line for line in notes.splitlines() if line != "compose version"]


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def test_it_starts_waits_and_prints_the_address(shell: Shell) -> None:
    result = shell.run()

    assert result.returncode == 0, result.stderr
    assert shell.commands[0] == "compose up --detach --build --wait --wait-timeout 120 webhook-api nginx"
    assert result.stdout.startswith("3 replicas accept webhooks on http://127.0.0.1:3000/webhook/chatwoot\n")


def test_it_can_pull_the_image_instead_of_building_it(shell: Shell) -> None:
    assert shell.run("--pull").returncode == 0
    assert shell.commands[:2] == [
        "compose pull webhook-api",
        "compose up --detach --no-build --wait --wait-timeout 120 webhook-api nginx",
    ]


def test_settings_come_from_the_env_file(shell: Shell) -> None:
    env_file = shell.docker.parent / ".env"
    env_file.write_text("WEBHOOK_API_REPLICAS=5\n")

    assert shell.run().returncode == 0
    assert f"--env-file {shell.docker}/../.env up" in shell.commands[0]


def test_the_secrets_are_made_once_and_stay_private(shell: Shell) -> None:
    assert shell.run().returncode == 0
    secrets = [shell.docker / "secrets" / name for name in ("webhook_secret", "webhook_token")]
    first = [secret.read_text() for secret in secrets]
    secrets[0].write_text("Chatwoot's own\n")

    again = shell.run()

    assert all(re.fullmatch("[0-9a-f]{64}", text) for text in first)
    assert first[0] != first[1]
    assert [secret.read_text() for secret in secrets] == ["Chatwoot's own\n", first[1]]
    assert (shell.docker / "secrets").stat().st_mode & 0o777 == 0o700
    assert first[1] not in again.stdout + again.stderr


def test_a_start_that_does_not_get_healthy_fails(shell: Shell) -> None:
    result = shell.run(UP_EXIT_CODE="1", WEBHOOK_START_TIMEOUT="7")

    assert result.returncode == 1
    assert "--wait-timeout 7" in shell.commands[0]
    assert "not healthy within 7 s" in result.stderr


@pytest.mark.parametrize(
    ("option", "command"),
    [
        ("--status", "compose ps"),
        ("--logs", "compose logs --follow --tail 100"),
        ("--stop", "compose down"),
    ],
)
def test_the_other_commands(option: str, command: str, shell: Shell) -> None:
    assert shell.run(option).returncode == 0
    assert shell.commands == [command]


def test_an_unknown_option_is_refused(shell: Shell) -> None:
    result = shell.run("--restart")

    assert result.returncode == 1
    assert "usage:" in result.stderr
    assert shell.commands == []


def test_it_reports_a_missing_docker(shell: Shell) -> None:
    (shell.path / "docker").unlink()

    result = shell.run()

    assert result.returncode == 1
    assert result.stderr.endswith("docker is not installed\n")


def test_the_shell_scripts_are_clean() -> None:
    scripts = sorted(DOCKER.rglob("*.sh"))
    shellcheck = find_tool("shellcheck", "it is in Debian's package shellcheck")

    result = subprocess.run([shellcheck, *scripts], capture_output=True, text=True, check=False)

    assert len(scripts) == 3
    assert result.returncode == 0, result.stdout

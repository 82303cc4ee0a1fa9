"""Run each command in the docs, page by page, as a reader would from top to bottom.

The commands run in a clean copy of the repository, with the installed webhookd. `ELSEWHERE` lists those that
cannot run here, with the tests that replace them. Any other command must succeed.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

from tests.support.daemon import installed_twistd
from tests.support.process import ReservedPort
from tests.support.reader import REPOSITORY, Running, Terminal, blocks, commands, copy_repository
from tests.support.servers import RedisServer

TRANSLATION = "README.pt-BR.md"

DOCKER = "there is no Docker here: test_compose.py checks the file, and runs the script with a stand-in"
KUBERNETES = "there is no cluster here: test_kubernetes.py checks the files against its schemas"
NGINX = "this is the machine's own nginx: test_nginx.py reloads one"
SYSTEMD = "it needs a separate machine: test_systemd.py verifies the units with systemd, and starts them"
RELEASED = "it publishes: test_install.py builds, checks and installs what is released"
INSTALLED = "`make test` has done it, and test_newcomer.py does it in a clean copy"

ELSEWHERE: Mapping[str, str] = {
    "docker/start-webhook-api.sh": DOCKER,
    "docker/start-webhook-api.sh --status": DOCKER,
    "docker compose -f docker/docker-compose.yml up --detach --scale webhook-api=5 webhook-api nginx": DOCKER,
    "docker compose -f docker/docker-compose.yml --profile monitoring up --detach"
    " prometheus alertmanager grafana": DOCKER,
    "docker compose -f docker/docker-compose.yml --profile tools up --detach --build bull-board": DOCKER,
    "kubectl create secret generic webhookd --from-file=secret"
    " --from-literal=redis-url=redis://redis:6379/0": KUBERNETES,
    "kubectl apply -k conf/kubernetes": KUBERNETES,
    "docker/nginx/render.sh && nginx -t && systemctl reload nginx": NGINX,
    "nginx -t && nginx -s reload": NGINX,
    "python3 -m venv /opt/webhookd && /opt/webhookd/bin/pip install .": SYSTEMD,
    "/opt/webhookd/bin/twistd --help >/dev/null": SYSTEMD,
    "cp conf/systemd/* /etc/systemd/system/": SYSTEMD,
    "install -d -m 0700 /etc/webhookd": SYSTEMD,
    "echo 'redis://127.0.0.1:6379/0' >/etc/webhookd/redis-url": SYSTEMD,
    'echo "the signing secret that Chatwoot shows" >/etc/webhookd/secret': SYSTEMD,
    "systemctl daemon-reload": SYSTEMD,
    "systemctl enable --now webhookd@3001.socket webhookd@3001.service": SYSTEMD,
    "systemctl restart webhookd@3001.service": SYSTEMD,
    "python3 -m venv ~/webhookd-venv && ~/webhookd-venv/bin/pip install .": INSTALLED,
    "npm --prefix docs/worker/node ci": INSTALLED,
    ".venv-dev/bin/towncrier build --yes": RELEASED,
    'git tag --sign vX.Y.Z --message "webhookd X.Y.Z"': RELEASED,
    "git push origin vX.Y.Z": RELEASED,
    "python3 -m venv ~/released && ~/released/bin/pip install webhookd==X.Y.Z": RELEASED,
    "~/released/bin/webhookd doctor": RELEASED,
    "docker run --rm ghcr.io/webhookd/webhookd:X.Y.Z --version": RELEASED,
    "gh release view vX.Y.Z": RELEASED,
    "docker buildx imagetools create --tag ghcr.io/webhookd/webhookd:latest"
    " ghcr.io/webhookd/webhookd:GOOD": RELEASED,
}

DAEMON = re.compile(r"make run|([A-Z_]+=\S+ )*twistd .*")
WORKER = re.compile(r".*\bnode docs/worker/node/worker\.js")
OTHER_TARGET = re.compile(r"make (?!run$|help$).*")
"""Only checked for existence: such a target is the test run itself, or takes another hour."""

ANY_DAEMON = "REDIS_URL=redis://127.0.0.1:6379/0 twistd -n --pidfile= webhookd --port 3001 --token TOKEN"
"""Started for a page with commands that need a daemon and none that starts it."""


def pages() -> list[str]:
    """Return all pages that contain commands."""
    found = [path for glob in ("*.md", "docs/*.md", "docs/worker/*.md") for path in REPOSITORY.glob(glob)]
    names = sorted(str(path.relative_to(REPOSITORY)) for path in found)
    return [name for name in names if commands(name)]


class Reader:
    """Enters commands. A daemon runs until the next one starts; a worker ends once it waits for jobs."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self._daemon: Running | None = None

    def enter(self, command: str) -> str:
        if DAEMON.fullmatch(command):
            self.stop()
            self._daemon = Running(self._terminal, command, "connected to Redis")
            self._daemon.start()
            return ""
        if WORKER.fullmatch(command):
            with Running(self._terminal, command, "waiting for jobs") as worker:
                return worker.log
        if OTHER_TARGET.fullmatch(command):
            command = command.replace("make", "make -n", 1)
        return self._terminal.enter(command)

    def stop(self) -> None:
        """End the daemon, if there is one."""
        if self._daemon is not None:
            self._daemon.stop()
            self._daemon.close()


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean copy of the repository, with the venvs that ``make`` would create."""
    copy = copy_repository(tmp_path_factory.mktemp("docs") / "webhookd")
    (copy / ".venv-dev").symlink_to(REPOSITORY / ".venv-dev")
    (copy / ".venv").mkdir()
    (copy / ".venv" / "bin").symlink_to(installed_twistd().parent)
    modules = Path("docs", "worker", "node", "node_modules")
    (copy / modules).symlink_to(REPOSITORY / modules)
    for stamp in (".created", ".installed"):
        (copy / ".venv" / stamp).touch()
    return copy


@pytest.fixture
def reader(copy: Path) -> Iterator[Reader]:
    """A reader with a clone of the repository and a correctly configured Redis."""
    shutil.rmtree(copy / "var", ignore_errors=True)  # left by the reader of another page
    port = ReservedPort()
    safe = ["appendonly yes", "appendfsync always", "maxmemory-policy noeviction"]
    with RedisServer(config=safe) as redis:
        terminal = Terminal(
            copy,
            {
                "PATH": f"{installed_twistd().parent}:{os.environ['PATH']}",
                "PORT": str(port.number),
            },
            {"3001": str(port.number), "6379": str(redis.port), "HOST:PORT": f"127.0.0.1:{port.number}"},
            f'redis-cli() {{ command redis-cli -p {redis.port} "$@"; }}; git init -q',
        )
        reader = Reader(terminal)
        try:
            yield reader
        finally:
            reader.stop()
    port.close()


def shapes(lines: Iterable[str]) -> set[str]:
    """Return the lines without their numbers and the width of their columns."""
    return {" ".join(re.sub(r"\d+", "0", line).split()) for line in lines}


@pytest.mark.parametrize("page", [page for page in pages() if page != TRANSLATION])
def test_the_commands_of_a_page_do_what_it_says(page: str, reader: Reader) -> None:
    to_be_run = [command for command in commands(page) if command not in ELSEWHERE]
    if to_be_run and not any(DAEMON.fullmatch(command) for command in to_be_run):
        reader.enter(ANY_DAEMON)
    for block in blocks(page):
        printed = {command: reader.enter(command) for command in block.commands if command in to_be_run}
        assert shapes(block.output) <= shapes("".join(printed.values()).splitlines())
        answers = [output for command, output in printed.items() if command.startswith("curl -i")]
        assert all("HTTP/1.1 20" in answer for answer in answers)


def test_the_translation_has_the_same_commands() -> None:
    own = [command for command in commands(TRANSLATION) if command not in commands("README.md")]
    assert own == ["docker/start-webhook-api.sh"]


def test_what_is_run_elsewhere_is_still_in_the_docs() -> None:
    assert set(ELSEWHERE) <= {command for page in pages() for command in commands(page)}

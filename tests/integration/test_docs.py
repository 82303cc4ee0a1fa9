"""Every command in the docs is run, page by page, as somebody would who reads it from top to bottom.

A page's C{sh} blocks run in one terminal after another, in a clean copy of the repository, with the installed
webhookd. What cannot run here is in L{ELSEWHERE}, with what stands for it; a new command is run, or fails.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
from attrs import frozen

from tests.support.checkout import REPOSITORY, copy_repository
from tests.support.daemon import installed_twistd
from tests.support.process import ChildProcess, ReservedPort
from tests.support.servers import RedisServer

TRANSLATION = "README.pt-BR.md"

DOCKER = "there is no Docker here: test_compose.py checks the file, and runs the script with a stand-in"
KUBERNETES = "there is no cluster here: test_kubernetes.py checks the files against its schemas"
NGINX = "this is the machine's own nginx: test_nginx.py reloads one"
SYSTEMD = "it wants a machine of its own: test_systemd.py has systemd judge the units, and starts them"
INSTALLED = "it is installed already: test_install.py looks at what came of it"

ELSEWHERE: Mapping[str, str] = {
    "docker/start-webhook-api.sh": DOCKER,
    "docker/start-webhook-api.sh --status": DOCKER,
    "docker compose -f docker/docker-compose.yml up --detach --scale webhook-api=5 webhook-api nginx": DOCKER,
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
    "pip install .": INSTALLED,
}

DAEMON = re.compile(r"make run|([A-Z_]+=\S+ )*twistd .*")
WORKER = re.compile(r".*\bnode docs/worker/node/worker\.js")
OTHER_TARGET = re.compile(r"make (?!run$|help$).*")
"""What only `make` is asked about, and not done: it would be the whole test run, or another hour."""


@frozen
class Block:
    """The commands of one C{sh} block, and what the page says that they print, if it does."""

    commands: Sequence[str]
    output: Sequence[str]


def pages() -> list[str]:
    """All pages with commands in them."""
    found = [path for glob in ("*.md", "docs/*.md", "docs/worker/*.md") for path in REPOSITORY.glob(glob)]
    names = sorted(str(path.relative_to(REPOSITORY)) for path in found)
    return [name for name in names if blocks(name)]


def blocks(page: str) -> list[Block]:
    """The C{sh} blocks of a page."""
    pattern = re.compile(r"^```sh\n(.*?)^```\n(?:\n^```\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)
    found = pattern.findall((REPOSITORY / page).read_text(encoding="utf-8"))
    return [Block(commands(text), output.splitlines()) for text, output in found]


def commands(text: str) -> list[str]:
    """The commands of a block: a line each, without its comment, with the indented lines that follow it."""
    lines = re.findall(r"^\S.*\n(?:^[ \t].*\n)*", text, re.MULTILINE)
    return [re.sub(r"\s+# .*$", "", line).rstrip() for line in lines]


class Server(ChildProcess):
    """A command of a page that does not end by itself."""

    name = "server"

    def __init__(self, terminal: Terminal, command: str, sign_of_life: str) -> None:
        super().__init__()
        self._terminal = terminal
        self._command = command
        self._sign_of_life = sign_of_life

    def argv(self) -> Sequence[str]:
        return self._terminal.argv(f"exec env {self._command}")

    def environ(self) -> Mapping[str, str]:
        return self._terminal.environ

    def is_ready(self) -> bool:
        return self._sign_of_life in self.log


class Terminal:
    """A reader's terminal in a copy of the repository: directory and environment stay from block to block.

    Where a page says 3001, 6379 or HOST:PORT, the port of this test stands.
    """

    def __init__(self, copy: Path, redis: RedisServer) -> None:
        self._resources = ExitStack()
        port = ReservedPort()
        self._resources.callback(port.close)
        self._words = {
            "3001": str(port.number),
            "6379": str(redis.port),
            "HOST:PORT": f"127.0.0.1:{port.number}",
        }
        self._daemon: Server | None = None
        self._state = copy / "state.sh"
        self._state.write_text(
            f'cd {shlex.quote(str(copy))}\nredis-cli() {{ command redis-cli -p {redis.port} "$@"; }}\n'
        )
        self.environ = {
            "PATH": f"{installed_twistd().parent}:{os.environ['PATH']}",
            "HOME": os.environ["HOME"],
            "LANG": "C.UTF-8",
            "PORT": str(port.number),
            "NPM_CONFIG_PREFER_OFFLINE": "true",  # from what `make test` has fetched
        }

    def argv(self, command: str) -> Sequence[str]:
        """How a command is run in it; the state is what its shell leaves to the next one."""
        for word, here in self._words.items():
            command = command.replace(word, here)
        state = shlex.quote(str(self._state))
        keep = f"{{ declare -px; declare -f; printf 'cd %q\n' \"$PWD\"; }} >{state}"
        return ["bash", "-euo", "pipefail", "-c", f"source {state}\n{command}\n{keep}"]

    def enter(self, command: str) -> str:
        """Run a command as it is meant, and return what it printed; it must succeed."""
        if DAEMON.fullmatch(command):
            self.serve(command)
            return ""
        if WORKER.fullmatch(command):
            with Server(self, command, "waiting for jobs") as worker:
                return worker.log
        return self.run(command.replace("make", "make -n", 1) if OTHER_TARGET.fullmatch(command) else command)

    def serve(self, command: str) -> None:
        """Start a daemon, in the place of the one before."""
        self.stop()
        self._daemon = Server(self, command, "connected to Redis")
        self._daemon.start()

    def stop(self) -> None:
        """End the daemon, if there is one."""
        if self._daemon is not None:
            self._daemon.stop()
            self._daemon.close()
            self._daemon = None

    def run(self, command: str) -> str:
        result = subprocess.run(
            self.argv(command), env=self.environ, text=True, capture_output=True, timeout=60, check=False
        )
        printed = result.stdout + result.stderr
        assert result.returncode == 0, f"{command}\n{printed}"
        return printed

    def close(self) -> None:
        self.stop()
        self._resources.close()


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is in the repository and nothing else, with the venv that `make` would make."""
    copy = copy_repository(tmp_path_factory.mktemp("docs") / "webhookd")
    (copy / ".venv").mkdir()
    (copy / ".venv" / "bin").symlink_to(installed_twistd().parent)
    (copy / ".venv-dev").symlink_to(REPOSITORY / ".venv-dev")
    for stamp in (".created", ".installed"):
        (copy / ".venv" / stamp).touch()
    return copy


@pytest.fixture
def terminal(copy: Path) -> Iterator[Terminal]:
    """A terminal beside a Redis that is as it should be."""
    safe = ["appendonly yes", "appendfsync always", "maxmemory-policy noeviction"]
    with RedisServer(config=safe) as redis:
        terminal = Terminal(copy, redis)
        try:
            yield terminal
        finally:
            terminal.close()


def numberless(lines: Iterable[str]) -> set[str]:
    """Lines whose numbers are all the same."""
    return {re.sub(r"\d+", "0", line.rstrip()) for line in lines}


@pytest.mark.parametrize("page", [page for page in pages() if page != TRANSLATION])
def test_the_commands_of_a_page_do_what_it_says(page: str, terminal: Terminal) -> None:
    entered = [command for block in blocks(page) for command in block.commands if command not in ELSEWHERE]
    if entered and not any(DAEMON.fullmatch(command) for command in entered):
        terminal.serve(
            "REDIS_URL=redis://127.0.0.1:6379/0 twistd -n --pidfile= webhookd --port 3001 --token TOKEN"
        )
    for block in blocks(page):
        printed = {command: terminal.enter(command) for command in block.commands if command not in ELSEWHERE}
        assert numberless(block.output) <= numberless("".join(printed.values()).splitlines())
        assert all(
            "HTTP/1.1 20" in output for command, output in printed.items() if command.startswith("curl -i")
        )


def test_the_translation_has_the_same_commands() -> None:
    def all_commands(page: str) -> list[str]:
        return [command for block in blocks(page) for command in block.commands]

    own = [command for command in all_commands(TRANSLATION) if command not in all_commands("README.md")]
    assert own == ["docker/start-webhook-api.sh"]


def test_what_is_run_elsewhere_is_still_in_the_docs() -> None:
    documented = {command for page in pages() for block in blocks(page) for command in block.commands}
    assert set(ELSEWHERE) <= documented

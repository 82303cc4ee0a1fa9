"""A reader of our pages, who has cloned the repository and enters the commands into a terminal."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from attrs import frozen

from .process import ChildProcess

REPOSITORY = Path(__file__).parents[2]

_MADE_HERE = shutil.ignore_patterns(
    *(".git", ".venv*", "build", "dist", "*.egg-info", "node_modules", "apidocs", "var", "twistd.pid"),
    *("__pycache__", "dropin.cache", ".*_cache", ".coverage-data", ".hypothesis", "_trial_temp*"),
)
_BLOCK = re.compile(r"^```sh\n(.*?)^```\n(?:\n^```\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)
_DEADLINE_S = 180.0


@frozen
class Block:
    """The commands of one ``sh`` block, and the output that the page shows for them, if any."""

    commands: Sequence[str]
    output: Sequence[str]


def blocks(page: str) -> list[Block]:
    """Return the ``sh`` blocks of a page, which is a path in the repository."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    return [Block(_commands(shown), output.splitlines()) for shown, output in _BLOCK.findall(text)]


def _commands(text: str) -> list[str]:
    """Return the commands of a block: a line without its comment, and the indented lines after it."""
    lines = re.findall(r"^\S.*\n(?:^[ \t].*\n)*", text, re.MULTILINE)
    return [re.sub(r"\s+# .*$", "", line).rstrip() for line in lines]


def commands(page: str) -> list[str]:
    """Return all commands of a page."""
    return [command for block in blocks(page) for command in block.commands]


def copy_repository(path: Path) -> Path:
    """Copy the repository to a new directory, without the files that were made in it."""
    return Path(shutil.copytree(REPOSITORY, path, ignore=_MADE_HERE))


class Terminal:
    """A terminal in a directory, for one command after another.

    It keeps its directory, environment and shell functions. ``words`` are replaced in each command, such as
    the port 3001 of the page by that of the test.
    """

    def __init__(
        self, directory: Path, environ: Mapping[str, str], words: Mapping[str, str], set_up: str = ""
    ) -> None:
        self.environ = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], "LANG": "C.UTF-8", **environ}
        self._words = words
        self._state = directory / "terminal.sh"
        self._state.write_text(f"cd {shlex.quote(str(directory))}\n{set_up}\n")

    def argv(self, command: str) -> Sequence[str]:
        """Return the command of a shell that runs ``command``, and saves its state for the next one."""
        for word, here in self._words.items():
            command = command.replace(word, here)
        state = shlex.quote(str(self._state))
        keep = f"{{ declare -px; declare -f; printf 'cd %q\n' \"$PWD\"; }} >{state}"
        return ["bash", "-euo", "pipefail", "-c", f"source {state}\n{command}\n{keep}"]

    def enter(self, command: str) -> str:
        """Run a command, which must succeed, and return its output."""
        result = subprocess.run(
            self.argv(command),
            env=self.environ,
            text=True,
            capture_output=True,
            timeout=_DEADLINE_S,
            check=False,
        )
        printed = result.stdout + result.stderr
        assert result.returncode == 0, f"{command}\n{printed}"
        return printed


class Running(ChildProcess):
    """A command in a terminal that does not end by itself."""

    name = "running"

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

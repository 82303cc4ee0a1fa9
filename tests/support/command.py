"""The installed operator's command, run to its end or on a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from attrs import frozen

from .daemon import installed_twistd

_DEADLINE_S = 60.0


def command() -> Path:
    """Return the path of the installed ``webhookd``."""
    return installed_twistd().with_name("webhookd")


def environ_of(environ: Mapping[str, str]) -> Mapping[str, str]:
    """Return the whole environment of a command. It inherits nothing from the test run."""
    return {"PATH": os.defpath, "LANG": "C.UTF-8", **environ}


@frozen
class Running:
    """A command that is running."""

    process: subprocess.Popen[str]

    def end(self) -> subprocess.CompletedProcess[str]:
        """Wait for the end of the command. If it does not end in time, kill it and fail."""
        try:
            out, err = self.process.communicate(timeout=_DEADLINE_S)
        finally:
            self.process.kill()
        return subprocess.CompletedProcess(self.process.args, self.process.returncode, out, err)


def start_command(
    *arguments: str, environ: Mapping[str, str] = {}, cwd: Path | None = None, within: Sequence[str] = ()
) -> Running:
    """Start the command, so that several run at once. ``within`` is a program that runs its arguments."""
    return Running(
        subprocess.Popen(
            [*within, command(), *arguments],
            cwd=cwd,
            env=environ_of(environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    )


def run_command(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return start_command(*arguments, environ=environ).end()


def run_on_terminal(*arguments: str, **environ: str) -> str:
    """Return what the command writes to a terminal of 80 columns: standard output and error together."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [command(), *arguments],
        env=environ_of({"COLUMNS": "80", "TERM": "xterm", **environ}),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    written = b""
    with suppress(OSError):  # end of file on a terminal
        while chunk := os.read(ours, 65_536):
            written += chunk
    os.close(ours)
    process.wait(_DEADLINE_S)
    return written.decode()

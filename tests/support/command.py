"""The operator's command as it is installed, run to its end or on a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from .daemon import installed_twistd

_DEADLINE_S = 60.0


def command() -> Path:
    """The installed C{webhookd}."""
    return installed_twistd().with_name("webhookd")


def environ_of(environ: Mapping[str, str]) -> Mapping[str, str]:
    """The whole environment of a command: nothing of the test run's own leaks into it."""
    return {"PATH": os.defpath, "LANG": "C.UTF-8", **environ}


def run_command(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run(
        [command(), *arguments],
        env=environ_of(environ),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_DEADLINE_S,
        check=False,
    )


def run_on_terminal(*arguments: str, **environ: str) -> str:
    """What the command writes to a terminal of 80 columns, standard output and error together."""
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
    with suppress(OSError):  # the end, on a terminal
        while chunk := os.read(ours, 65_536):
            written += chunk
    os.close(ours)
    process.wait(_DEADLINE_S)
    return written.decode()

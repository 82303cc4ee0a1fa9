"""Libraries of the tests' own, preloaded into a program: its fsync and its wall clock fail on demand."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from tests.support.process import find_tool


class Workplace(Protocol):
    """Whoever has a directory for the libraries: the bench, or a child process."""

    directory: Path


def _preload(workplace: Workplace, name: str) -> str:
    """Compile ``name.c`` beside this module; the path of the library."""
    library = workplace.directory / f"{name}.so"
    compiler = find_tool("gcc", "it is in Debian's package gcc")
    source = Path(__file__).with_name(f"{name}.c")
    command = [
        compiler,
        "-shared",
        "-fPIC",
        "-O1",
        "-Wall",
        "-Werror",
        "-o",
        str(library),
        str(source),
        "-ldl",
    ]
    subprocess.run(command, check=True)
    return str(library)


class FaultySync:
    """An environment in which fsync fails, or takes 200 ms, while a test wants it."""

    def __init__(self, workplace: Workplace) -> None:
        self._fault = workplace.directory / "fsync"
        self.environ: Mapping[str, str] = {
            "LD_PRELOAD": _preload(workplace, "fsync_fault"),
            "FSYNC_FAULT": str(self._fault),
        }

    @contextmanager
    def faulty(self, fault: str) -> Iterator[None]:
        """``EIO`` or ``SLOW``, for a while."""
        self._fault.write_text(fault)
        try:
            yield
        finally:
            self._fault.unlink()


class FaultyClock:
    """An environment in which the wall clock can be set; the monotonic clock goes on."""

    def __init__(self, workplace: Workplace) -> None:
        self._fault = workplace.directory / "clock"
        self._fault.write_bytes(bytes(8))
        self.environ: Mapping[str, str] = {
            "LD_PRELOAD": _preload(workplace, "clock_fault"),
            "CLOCK_FAULT": str(self._fault),
        }

    def set(self, ahead_s: int) -> None:
        """So many seconds ahead of the true time."""
        with self._fault.open("r+b") as file:  # the daemon has mapped this very file
            file.write(struct.pack("=q", ahead_s))

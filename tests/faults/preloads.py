"""Libraries that make the fsync or the wall clock of a program fail on demand, with LD_PRELOAD."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from tests.support.process import find_tool


class Workplace(Protocol):
    """The owner of a directory for the libraries: the bench, or a child process."""

    directory: Path


def _preload(workplace: Workplace, name: str) -> str:
    """Compile ``name.c`` in the directory of this module, and return the path of the library."""
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
    """An environment in which fsync fails, or takes 200 ms, on demand."""

    def __init__(self, workplace: Workplace) -> None:
        self._fault = workplace.directory / "fsync"
        self.environ: Mapping[str, str] = {
            "LD_PRELOAD": _preload(workplace, "fsync_fault"),
            "FSYNC_FAULT": str(self._fault),
        }

    @contextmanager
    def faulty(self, fault: str) -> Iterator[None]:
        """Have the fault ``EIO`` or ``SLOW`` while the block runs."""
        self._fault.write_text(fault)
        try:
            yield
        finally:
            self._fault.unlink()


class FaultyClock:
    """An environment in which the wall clock can be set. The monotonic clock is not affected."""

    def __init__(self, workplace: Workplace) -> None:
        self._fault = workplace.directory / "clock"
        self._fault.write_bytes(bytes(8))
        self.environ: Mapping[str, str] = {
            "LD_PRELOAD": _preload(workplace, "clock_fault"),
            "CLOCK_FAULT": str(self._fault),
        }

    def set(self, ahead_s: int) -> None:
        """Set the clock to ``ahead_s`` seconds after the true time."""
        with self._fault.open("r+b") as file:  # the daemon has mapped this file
            file.write(struct.pack("=q", ahead_s))

"""Disks that fail: a small one, and one that the kernel makes read-only. Only root can mount them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.support.process import find_tool

from .bench import Bench

_CHUNK_BYTES = 65_536
_RESERVE_BYTES = 64 << 20
"""The space that the daemon leaves to other programs."""


@contextmanager
def mounted_tmpfs(path: Path, options: str) -> Iterator[None]:
    """Mount a tmpfs with options such as ``ro`` while the block runs."""
    _run("mount", "-t", "tmpfs", "-o", options, "tests", str(path))
    try:
        yield
    finally:
        _run("umount", "--lazy", str(path))


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


class SmallDisk:
    """A tmpfs with room for a few thousand events, until it is filled."""

    def __init__(self, bench: Bench) -> None:
        self.path = bench.directory / "disk"
        self.path.mkdir()
        _run("mount", "-t", "tmpfs", "-o", f"size={_RESERVE_BYTES + (24 << 20)}", "bench", str(self.path))
        bench.defer(lambda: _run("umount", "--lazy", str(self.path)))
        self._ballast = self.path / "ballast"

    def fill(self) -> None:
        """Fill the disk, also while others write to it."""
        with suppress(OSError), self._ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(_CHUNK_BYTES))

    def clear(self) -> None:
        """Free the space that `fill` took."""
        self._ballast.unlink()


class FragileDisk:
    """An ext4 on a loop device. After `fail`, it is read-only until `repair`."""

    def __init__(self, bench: Bench) -> None:
        self.path = bench.directory / "disk"
        self.path.mkdir()
        image = bench.directory / "image"
        with image.open("wb") as file:
            file.truncate(_RESERVE_BYTES * 4)
        _run(
            find_tool("mkfs.ext4", "it is in Debian's package e2fsprogs"),
            "-q",
            "-E",
            "lazy_itable_init=0",
            str(image),
        )
        self._device = _run("losetup", "--find", "--show", str(image))
        bench.defer(lambda: _run("losetup", "--detach", self._device))
        self._mount()
        bench.defer(lambda: _run("umount", "--lazy", str(self.path)))

    def _mount(self) -> None:
        _run("mount", "-o", "errors=remount-ro", self._device, str(self.path))

    def fail(self) -> None:
        """Make the kernel find an error, and so make the disk read-only."""
        Path("/sys/fs/ext4", Path(self._device).name, "trigger_fs_error").write_text("bench")

    def repair(self) -> None:
        """Mount the disk again. No file on it may be open."""
        _run("umount", str(self.path))
        _run("mount", "-o", "errors=remount-ro", self._device, str(self.path))

"""The directories of spools: one for each replica, below one root, each with a lock.

A directory belongs to the process that holds ``flock`` on its ``lock`` file. Process ids cannot serve (every
replica is process 1 of its container), and the kernel releases the lock when its holder dies. So a directory
whose lock is free is an orphan, and the next process that takes the lock takes over the spool.

The content of the lock file is the directory's label: the schema version and the fingerprint of the Redis,
prefix and queue of its records. If a directory has another label and is not empty, it is left alone.
``flock`` and SQLite's WAL both need a local disk, so network file systems are refused.

While a daemon holds a directory, it answers requests on the socket ``control`` in it. If it is killed, the
socket stays, and no process answers on it.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from enum import Enum
from pathlib import Path

from attrs import Factory, define, field, frozen
from twisted.logger import Logger

from webhookd.model import ConfigError

SCHEMA_VERSION = 1
LOCK_NAME = "lock"
DATABASE_NAME = "spool.sqlite"
CONTROL_NAME = "control"
REPLICA_PREFIX = "replica-"
_MAX_LABEL_BYTES = 65_536

# As named in /proc/self/mountinfo. The name of a FUSE file system follows "fuse.".
_NETWORK_FILE_SYSTEMS = frozenset(
    {"9p", "afs", "beegfs", "ceph", "cifs", "coda", "davfs", "gfs2", "glusterfs", "gpfs", "lustre"}
    | {"ncpfs", "nfs", "nfs4", "ocfs2", "orangefs", "pvfs2", "smb2", "smb3", "smbfs"}
    | {"fuse.ceph", "fuse.ceph-fuse", "fuse.curlftpfs", "fuse.davfs", "fuse.gcsfuse", "fuse.glusterfs"}
    | {"fuse.goofys", "fuse.juicefs", "fuse.lizardfs", "fuse.mfs", "fuse.moosefs", "fuse.mount-s3"}
    | {"fuse.nfs", "fuse.rclone", "fuse.s3fs", "fuse.seaweedfs", "fuse.smbnetfs", "fuse.sshfs"}
)
_log = Logger()


def fsync_directory(path: Path) -> None:
    """Make the names in a directory durable: fsync of a file does not cover its name."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_system_type(path: Path, mountinfo: str) -> str:
    """Return the type of the file system of an absolute, resolved path.

    ``mountinfo`` is the text of ``/proc/self/mountinfo``; see proc(5). If several file systems are mounted at
    one place, the last one counts.
    """
    found, depth = "", -1
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        escaped = before.split(" ")[4]
        mount_point = Path(re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), escaped))
        if path.is_relative_to(mount_point) and len(mount_point.parts) >= depth:
            found, depth = after.split(" ")[0], len(mount_point.parts)
    return found


def _read_mountinfo() -> str:
    try:
        return Path("/proc/self/mountinfo").read_text(errors="surrogateescape")
    except FileNotFoundError:
        return ""  # not Linux: unknown


@frozen
class SpoolDirectory:
    """A directory that this process holds until it releases or removes it."""

    path: Path
    _lock_fd: int

    @property
    def database(self) -> Path:
        """The path of the directory's database, which may not exist yet."""
        return self.path / DATABASE_NAME

    @property
    def is_vacant(self) -> bool:
        """True if it contains only its lock, and perhaps a socket."""
        return not _contents(self.path)

    def release(self) -> None:
        """Give the directory up, so that another process can take it."""
        os.close(self._lock_fd)

    def remove(self) -> None:
        """Remove the directory, whose database must be empty, and release it.

        Any other content (a damaged file that was set aside, a WAL that could not be written back) keeps it
        in place. A crash at any point leaves a vacant directory, because of the order: database, socket,
        lock, directory. A process that opened the lock file before it was unlinked gets the lock of a file
        without a name, and notices that (see `_try_lock`).
        """
        try:
            if _contents(self.path) <= {DATABASE_NAME}:
                self.database.unlink(missing_ok=True)
                (self.path / CONTROL_NAME).unlink(missing_ok=True)
                (self.path / LOCK_NAME).unlink()
                # Another replica may just have made a new lock file; then the directory is its own.
                with suppress(OSError):
                    self.path.rmdir()
        except OSError as error:
            _log.warn(
                "spool directory {path} cannot be removed: {error}", path=str(self.path), error=str(error)
            )
        finally:
            self.release()


def hold(path: Path) -> SpoolDirectory | None:
    """Take a directory with any label, and change nothing in it; None if another process holds it.

    :raises OSError: it does not exist, or may not be opened.
    """
    (path / LOCK_NAME).stat()
    descriptor = _try_lock(path, os.O_RDONLY)
    return None if descriptor is None else SpoolDirectory(path, descriptor)


def open_directory(path: Path) -> int:
    """Open a directory for `socket_path`, as the address of a socket has at most 107 bytes."""
    return os.open(path, os.O_PATH | os.O_DIRECTORY)


def socket_path(directory_fd: int) -> str:
    """Return a short path of the socket in a directory, valid while the descriptor is open."""
    return f"/proc/self/fd/{directory_fd}/{CONTROL_NAME}"


def _contents(path: Path) -> set[str]:
    """Return the names in a directory, except its lock and its socket."""
    return {entry.name for entry in path.iterdir()} - {LOCK_NAME, CONTROL_NAME}


def _try_lock(path: Path, flags: int = os.O_RDWR | os.O_CREAT) -> int | None:
    """Lock a directory; return the descriptor, or None if another process holds it or it is gone."""
    lock = path / LOCK_NAME
    with suppress(BlockingIOError, FileNotFoundError), ExitStack() as unless_held:
        descriptor = os.open(lock, flags, 0o600)
        unless_held.callback(os.close, descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between open and flock, the holder may have removed the directory, and a third process may have made
        # it again: only the lock of the file that has the name now counts.
        if os.path.samestat(os.fstat(descriptor), lock.stat()):
            unless_held.pop_all()
            return descriptor
    return None


class Tenancy(Enum):
    """The state of a directory: held by a running replica, free, or with another label."""

    HELD = "held"
    FREE = "free"
    FOREIGN = "foreign"


@define
class SpoolRoot:
    """The root below which all replicas have their directories.

    ``fingerprint`` identifies the destination of the records (Redis, prefix and queue) without secrets.
    All methods do I/O: call them in the spool's thread. They raise ``OSError`` if the disk fails.
    """

    path: Path
    _fingerprint: str
    _mountinfo: str = field(factory=_read_mountinfo)
    _warned: set[Path] = Factory(set)

    def prepare(self) -> None:
        """Make the root, with mode 0700, and check its file system.

        :raises ConfigError: it is on a network file system, whose locks and fsync cannot be trusted.
        """
        if not self.path.is_dir():
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.path.chmod(0o700)
            fsync_directory(self.path.parent)
        self.check_file_system()

    def check_file_system(self) -> None:
        """Check the file system of the root, which may not exist yet.

        :raises ConfigError: it is a network file system, whose locks and fsync cannot be trusted.
        """
        kind = file_system_type(self.path.resolve(), self._mountinfo)
        if kind in _NETWORK_FILE_SYSTEMS:
            raise ConfigError(f"the spool {self.path} is on a network file system, {kind}: use a local disk")

    def take(self) -> SpoolDirectory:
        """Take a directory for this replica: an orphan, with its records, or else a new one."""
        for directory in self.orphans():
            return directory
        while True:
            path = self.path / f"{REPLICA_PREFIX}{secrets.token_hex(8)}"
            path.mkdir(mode=0o700)
            # Until it is locked, another replica may take it for an orphan, and use it or remove it.
            with suppress(FileNotFoundError):
                path.chmod(0o700)  # despite the umask
                fsync_directory(self.path)
                claimed = self._claim(path)
                if claimed is not None:
                    return claimed

    def replicas(self) -> Sequence[Path]:
        """All directories of replicas below the root, held or not."""
        return sorted(self.path.glob(f"{REPLICA_PREFIX}*"))

    def is_ours(self, path: Path) -> bool:
        """Return whether a directory has our label."""
        return (path / LOCK_NAME).read_bytes() == self._label

    def orphans(self) -> Iterator[SpoolDirectory]:
        """Yield each directory that has our label and a free lock; lock it for the caller first."""
        for path in self.replicas():
            try:
                directory = self._claim(path)
            except (PermissionError, NotADirectoryError) as error:
                self._warn_once(path, str(error))
            else:
                if directory is not None:
                    yield directory

    def survey(self) -> Mapping[Path, Tenancy]:
        """Return the state of each directory; nothing is created or changed.

        Each lock is taken for an instant: a replica that starts just then does not take that directory.
        """
        return {path: self._tenancy(path) for path in self.replicas()}

    def _tenancy(self, path: Path) -> Tenancy:
        try:
            with (path / LOCK_NAME).open("rb") as lock:
                if lock.read(_MAX_LABEL_BYTES) != self._label:
                    return Tenancy.FOREIGN
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return Tenancy.HELD
        except OSError:
            return Tenancy.FOREIGN
        return Tenancy.FREE

    @property
    def _label(self) -> bytes:
        return json.dumps({"schema": SCHEMA_VERSION, "fingerprint": self._fingerprint}).encode()

    def _claim(self, path: Path) -> SpoolDirectory | None:
        descriptor = _try_lock(path)
        if descriptor is None:
            return None
        with ExitStack() as unless_ours:
            unless_ours.callback(os.close, descriptor)
            if self._take_over(path, descriptor):
                unless_ours.pop_all()
                return SpoolDirectory(path, descriptor)
        self._warn_once(path, "it was made by another version, or for another Redis, prefix or queue")
        return None

    def _take_over(self, path: Path, descriptor: int) -> bool:
        """Return whether the label is ours; an empty directory gets our label."""
        label = self._label
        if os.pread(descriptor, len(label) + 1, 0) == label:
            return True
        if _contents(path):
            return False
        # It is new, or its maker crashed before the label was complete, and so before it had any content.
        os.fchmod(descriptor, 0o600)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, label, 0)
        os.fsync(descriptor)
        fsync_directory(path)
        return True

    def _warn_once(self, path: Path, reason: str) -> None:
        if path not in self._warned:
            self._warned.add(path)
            _log.warn("spool directory {path} is left alone: {reason}", path=str(path), reason=reason)

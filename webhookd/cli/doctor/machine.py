"""The daemon's environment: configuration, the spool's disk, ports, limits of the system."""

from __future__ import annotations

import errno
import os
import pwd
import resource
import socket
import stat
import statistics
import tempfile
import timeit
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

import webhookd
from webhookd.cli.daemon import ask_health, local_url, tcp_address
from webhookd.cli.doctor.findings import Checks, Finding, fail, mebibytes, milliseconds, ok, skipped, warn
from webhookd.cli.terminal import Negative, Unreachable, brief
from webhookd.config import Config, unknown_names
from webhookd.model import ConfigError
from webhookd.spool.database import SpoolLimits, free_disk_bytes
from webhookd.spool.directory import SpoolRoot, Tenancy

# -- the configuration --------------------------------------------------------------------------------------


def options(environ: Mapping[str, str]) -> Finding:
    """Find misspelt variables. An unusable configuration ends the command before this check."""
    if unknown := unknown_names(environ):
        return warn(
            f"{', '.join(unknown)} in the environment: webhookd has no such option",
            "correct the name, unless another program needs it (Compose and Kubernetes set some)",
        )
    return ok("valid")


def secrets(settings: Config) -> Finding:
    """Find sources without credentials."""
    sources = settings.sources.values()
    if names := [source.name for source in sources if source.is_open]:
        return warn(
            f"anyone who reaches the port can add jobs for {', '.join(names)}",
            "set WEBHOOK_SECRET_FILE to Chatwoot's secret, or WEBHOOK_TOKEN_FILE",
        )
    said = (f"{source.name}: {_credentials(len(source.secrets), len(source.tokens))}" for source in sources)
    return ok("; ".join(said))


def _credentials(signing: int, tokens: int) -> str:
    counts = {"signing secrets": signing, "tokens": tokens}
    return " and ".join(f"{count} {name}" for name, count in counts.items() if count)


# -- the spool ----------------------------------------------------------------------------------------------

_FSYNCS = 5
_FSYNC_BYTES = 4096
_SLOW_FSYNC_S = 0.02
_MIN_FREE_BYTES = SpoolLimits().min_free_bytes


@frozen
class SpoolFacts:
    """The disk of the spool.

    ``place`` is its directory, or the nearest parent that exists. ``problem`` is the reason why the spool
    cannot be there or be written to. If there is none, ``fsync_s`` is the time of an fsync.
    """

    path: Path
    max_bytes: int
    place: Path
    owner: str
    user: str
    mode: int
    free_bytes: int
    problem: str | None
    fsync_s: float
    directories: Mapping[Path, Tenancy]


def look_at_spool(directory: str, settings: Config) -> SpoolFacts:
    """Gather facts about the disk, and leave nothing on it. Raises ``OSError`` if the disk is unreadable."""
    path = Path(directory).absolute()
    root = SpoolRoot(path, settings.destination)
    place = next(parent for parent in (path, *path.parents) if parent.exists())
    status = place.stat()
    problem, fsync_s = _try_to_write(root, place)
    return SpoolFacts(
        path=path,
        max_bytes=settings.spool_max_bytes,
        place=place,
        owner=_user_name(status.st_uid),
        user=_user_name(os.geteuid()),
        mode=stat.S_IMODE(status.st_mode),
        free_bytes=free_disk_bytes(place),
        problem=problem,
        fsync_s=fsync_s,
        directories=root.survey(),
    )


def _try_to_write(root: SpoolRoot, place: Path) -> tuple[str | None, float]:
    try:
        root.check_file_system()
        return None, _fsync_time(place)
    except ConfigError as error:
        return str(error), 0.0
    except OSError as error:
        return f"cannot write to {place}: {error.strerror}", 0.0


def _fsync_time(place: Path) -> float:
    """Return the median time of a few fsyncs, each of one page, as an event needs."""
    with tempfile.TemporaryFile(dir=place, buffering=0) as file:

        def write() -> None:
            file.write(bytes(_FSYNC_BYTES))
            os.fsync(file.fileno())

        return statistics.median(timeit.repeat(write, number=1, repeat=_FSYNCS))


def _user_name(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def directory(facts: SpoolFacts) -> Finding:
    """Check that the spool can be created and written to."""
    if facts.problem is not None:
        return fail(facts.problem, "set --spool to a directory on a local disk that the daemon may write to")
    if not facts.place.is_relative_to(facts.path):
        return ok(f"{facts.path} does not exist yet, and can be created")
    return ok(f"{facts.path} is writable")


def privacy(facts: SpoolFacts) -> Finding:
    """Check that no other user can read the messages."""
    if facts.place != facts.path:
        return ok("private, once the daemon has created it")
    if facts.mode & 0o077:
        return warn(f"other users can enter it: its mode is {facts.mode:o}", f"chmod 700 {facts.path}")
    if facts.owner != facts.user:
        return warn(
            f"it belongs to {facts.owner}, and you are {facts.user}",
            f"run this command as {facts.owner}, if the daemon does; else chown it to the daemon's user",
        )
    return ok(f"private to {facts.owner}")


def space(facts: SpoolFacts) -> Finding:
    """Check that the disk has room for the spool."""
    free, wanted = facts.free_bytes, facts.max_bytes + _MIN_FREE_BYTES
    said = f"{mebibytes(free)} free"
    if free <= _MIN_FREE_BYTES:
        return fail(
            f"{said}: below {mebibytes(_MIN_FREE_BYTES)} the spool takes no events",
            "free space on the disk, or set --spool to another one",
        )
    if free < wanted:
        return warn(
            f"{said}, but --spool-max-bytes and a reserve need {mebibytes(wanted)}",
            "free space on the disk, or lower --spool-max-bytes",
        )
    return ok(f"{said}, {mebibytes(facts.max_bytes)} needed")


def fsync(facts: SpoolFacts) -> Finding:
    """Check how long an event waits for the disk while Redis is unavailable."""
    if facts.problem is not None:
        return skipped("needs a disk")
    took = milliseconds(facts.fsync_s)
    if facts.fsync_s > _SLOW_FSYNC_S:
        return warn(f"{took}: each event waits this long while Redis is unavailable", "use a faster disk")
    return ok(took)


def contents(facts: SpoolFacts) -> Finding:
    """Find directories that no replica empties. The health of a running daemon reports its own records."""
    counts = Counter(facts.directories.values())
    said = f"directories: {counts[Tenancy.HELD]} in use, {counts[Tenancy.FREE]} of stopped replicas"
    if counts[Tenancy.FOREIGN]:
        return warn(
            f"{said}, {counts[Tenancy.FOREIGN]} for another Redis, prefix or queue, which no replica empties",
            "start webhookd with the options of that time; `webhookd spool list` names the directories",
        )
    if counts[Tenancy.FREE] and not counts[Tenancy.HELD]:
        return warn(f"{said}, perhaps with events", "start webhookd: it moves them to Redis")
    return ok(said)


SPOOL: Checks[SpoolFacts] = (
    ("directory", directory),
    ("privacy", privacy),
    ("space", space),
    ("fsync", fsync),
    ("contents", contents),
)

SPOOL_OFF = warn(
    "off: while Redis is unavailable, events are rejected, and Chatwoot never retries them",
    "set --spool to a directory on a local disk",
)

# -- the ports ----------------------------------------------------------------------------------------------


@frozen
class PortFacts:
    """A port on which the daemon listens, or will listen.

    ``refusal`` is the reason why a free port cannot be used. ``report`` is None if no program has the port,
    the health of the webhookd that has it, or empty if it is another program.
    """

    name: str
    is_needed: bool
    is_tcp: bool
    refusal: str | None = None
    report: Mapping[str, Any] | None = None


def look_at_port(endpoint: str, *, is_needed: bool) -> PortFacts:
    """Find out whether the port is free, and else which program answers there."""
    address = tcp_address(endpoint)
    if address is None:
        return PortFacts(endpoint, is_needed, is_tcp=False)
    host, port = address
    name = f"port {port}" + (f" of {host}" if host else "")
    problem = _try_to_bind(host, port)
    if problem is not None and problem.errno == errno.EADDRINUSE:
        return PortFacts(name, is_needed, is_tcp=True, report=_health_report(local_url(host, port)))
    return PortFacts(name, is_needed, is_tcp=True, refusal=problem.strerror if problem else None)


def _health_report(url: str) -> Mapping[str, Any]:
    """Return the report of a webhookd; empty if something else answers."""
    try:
        _status, report = ask_health(f"{url}/health")
    except (Unreachable, Negative):
        return {}
    is_ours = {"version", "uptimeSeconds"} <= report.keys() and isinstance(report.get("spool", {}), dict)
    return report if is_ours else {}


def _try_to_bind(host: str, port: int) -> OSError | None:
    """Return the error if the port cannot be bound. Does not listen, so as not to block a starting daemon."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error
        except OverflowError:
            return OSError(errno.EINVAL, "the highest port is 65535")
    return None


def port(facts: PortFacts) -> Finding:
    """Check that the port is free, or that a healthy webhookd has it."""
    bad = fail if facts.is_needed else warn
    if not facts.is_tcp:
        return ok(f"{facts.name}: not checked, only tcp: is")
    if facts.refusal is not None:
        return bad(f"{facts.name} is unavailable: {facts.refusal}", "choose another one")
    if facts.report is None:
        return ok(f"{facts.name} is free: webhookd is not running")
    if not facts.report:
        return bad(f"{facts.name} belongs to another program", "stop it, or choose another one")
    return _health(facts.name, facts.report)


def _health(name: str, report: Mapping[str, Any]) -> Finding:
    status, running = brief(str(report["status"])), brief(str(report["version"]))
    said = f"{name} belongs to webhookd {running}: {status}"
    if status != "ok":
        judge = fail if status == "unavailable" else warn
        return judge(said, "see /health, and the lines about Redis and the spool")
    spool = report.get("spool", {})
    dead, corrupt, records = (spool.get(key) or 0 for key in ("deadRecords", "corruptRecords", "records"))
    if dead or corrupt:
        return warn(f"{said}; its spool has {dead} dead and {corrupt} corrupt records", "webhookd spool list")
    if running != webhookd.__version__:
        return warn(f"{said}; this is {webhookd.__version__}", "restart it, if it should have been replaced")
    return ok(said + (f", {records} events wait in its spool" if records else ""))


# -- the system ---------------------------------------------------------------------------------------------

_FEW_DESCRIPTORS = 4096
_BACKLOG = 1024
_SOMAXCONN = Path("/proc/sys/net/core/somaxconn")


@frozen
class LimitFacts:
    """Limits of the kernel; ``somaxconn`` is None if it is unknown."""

    descriptors: int
    somaxconn: int | None


def look_at_limits() -> LimitFacts:
    """Return the limits of this process. The daemon has the same ones if it is started in the same way."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        somaxconn = int(_SOMAXCONN.read_text())
    except (OSError, ValueError):
        somaxconn = None
    return LimitFacts(2**31 if hard == resource.RLIM_INFINITY else hard, somaxconn)


def files(facts: LimitFacts) -> Finding:
    """Check the limit on connections: the daemon raises its soft limit to the hard limit."""
    if facts.descriptors < _FEW_DESCRIPTORS:
        return warn(
            f"at most {facts.descriptors} open files, which limits the number of senders at once",
            "raise it: LimitNOFILE= of systemd, `ulimits` of Compose, `ulimit -Hn`",
        )
    return ok(f"at most {facts.descriptors} open files")


def backlog(facts: LimitFacts) -> Finding:
    """Check the number of connections that can wait to be accepted."""
    if facts.somaxconn is not None and facts.somaxconn < _BACKLOG:
        return warn(
            f"net.core.somaxconn is {facts.somaxconn}, below the backlog of {_BACKLOG}",
            f"sysctl -w net.core.somaxconn={_BACKLOG}",
        )
    return ok(
        "unknown on this system" if facts.somaxconn is None else f"net.core.somaxconn is {facts.somaxconn}"
    )


LIMITS: Checks[LimitFacts] = (("open files", files), ("backlog", backlog))

"""The machine around the daemon: the configuration, the spool's disk, the ports, the limits of the system."""

from __future__ import annotations

import errno
import os
import pwd
import resource
import socket
import stat
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

import webhookd
from webhookd.cli.daemon import ask_health, local_url, tcp_address
from webhookd.cli.doctor.findings import Checks, Finding, fail, mebibytes, milliseconds, ok, skipped, warn
from webhookd.cli.terminal import Negative, Unreachable
from webhookd.config import Config, unknown_names
from webhookd.model import ConfigError
from webhookd.spool.database import SpoolLimits, free_disk_bytes
from webhookd.spool.directory import SpoolRoot, Tenancy

# -- the configuration --------------------------------------------------------------------------------------


@frozen
class Given:
    """The configuration, and the environment that it was read from."""

    settings: Config
    environ: Mapping[str, str]


def options(facts: Given) -> Finding:
    """Whether all that was meant is read; what cannot be read at all ends the command."""
    unknown = unknown_names(facts.environ)
    if unknown:
        return warn(
            f"{', '.join(unknown)} in the environment: no option of webhookd",
            "correct the name; in a container, others may have set it",
        )
    return ok("can be used")


def secrets(facts: Given) -> Finding:
    """Whether anybody may send."""
    sources = facts.settings.sources.values()
    if names := [source.name for source in sources if source.is_open]:
        return warn(
            f"anybody who reaches the port can add jobs for {', '.join(names)}",
            "set WEBHOOK_SECRET_FILE to Chatwoot's secret, or WEBHOOK_TOKEN_FILE",
        )
    said = (f"{source.name}: {_credentials(len(source.secrets), len(source.tokens))}" for source in sources)
    return ok("; ".join(said))


def _credentials(signing: int, tokens: int) -> str:
    counts = {"signing secrets": signing, "tokens": tokens}
    return " and ".join(f"{count} {name}" for name, count in counts.items() if count)


CONFIGURATION: Checks[Given] = (("options", options), ("secrets", secrets))

# -- the spool ----------------------------------------------------------------------------------------------

_FSYNCS = 5
_FSYNC_BYTES = 4096
_SLOW_FSYNC_S = 0.02
_MIN_FREE_BYTES = SpoolLimits().min_free_bytes


@frozen
class SpoolFacts:
    """The disk of the spool.

    ``place`` is its directory, or the nearest one above it that exists. ``problem`` is why no spool can be
    there, or nothing be written; without one, ``fsync_s`` is how long that takes to be safe.
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
    """Look at the disk; leaves nothing behind. Raises ``OSError`` where it cannot even be looked at."""
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
        return f"{place} cannot be written to: {error.strerror}", 0.0


def _fsync_time(place: Path) -> float:
    """The median of a few, each of a page like those that an event takes."""
    durations_s = []
    with tempfile.TemporaryFile(dir=place, buffering=0) as file:
        for _ in range(_FSYNCS):
            file.write(bytes(_FSYNC_BYTES))
            began_s = time.monotonic()
            os.fsync(file.fileno())
            durations_s.append(time.monotonic() - began_s)
    return statistics.median(durations_s)


def _user_name(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def directory(facts: SpoolFacts) -> Finding:
    """Whether there can be a spool."""
    if facts.problem is not None:
        return fail(facts.problem, "set --spool to a directory on a local disk that the daemon may write to")
    if not facts.place.is_relative_to(facts.path):
        return ok(f"{facts.path} is not there yet, and can be made")
    return ok(f"{facts.path} can be written to")


def privacy(facts: SpoolFacts) -> Finding:
    """Whether others can get at the messages in it."""
    if facts.place != facts.path:
        return ok("it will be the daemon's alone")
    if facts.mode & 0o077:
        return warn(f"others may enter it: its mode is {facts.mode:o}", f"chmod 700 {facts.path}")
    if facts.owner != facts.user:
        return warn(
            f"it belongs to {facts.owner}, and you are {facts.user}",
            f"run this as {facts.owner}, if the daemon runs so; else chown it to the daemon's user",
        )
    return ok(f"{facts.owner}'s alone")


def space(facts: SpoolFacts) -> Finding:
    """Whether the disk has the room that the spool may take."""
    free, wanted = facts.free_bytes, facts.max_bytes + _MIN_FREE_BYTES
    said = f"{mebibytes(free)} free"
    if free <= _MIN_FREE_BYTES:
        return fail(
            f"{said}: below {mebibytes(_MIN_FREE_BYTES)} the spool takes nothing",
            "free some of the disk, or set --spool to another one",
        )
    if free < wanted:
        return warn(
            f"{said}, of the {mebibytes(wanted)} that --spool-max-bytes and a reserve ask for",
            "free some of the disk, or lower --spool-max-bytes",
        )
    return ok(f"{said}, {mebibytes(facts.max_bytes)} wanted")


def fsync(facts: SpoolFacts) -> Finding:
    """How long an event waits for the disk while Redis is away."""
    if facts.problem is not None:
        return skipped("needs a disk")
    took = milliseconds(facts.fsync_s)
    if facts.fsync_s > _SLOW_FSYNC_S:
        return warn(f"{took}: while Redis is away, each event waits so long", "use a faster disk")
    return ok(took)


def contents(facts: SpoolFacts) -> Finding:
    """Whose directories are in it; what is in those of a running daemon, the daemon itself tells."""
    counts = Counter(facts.directories.values())
    said = f"directories: {counts[Tenancy.HELD]} in use, {counts[Tenancy.FREE]} of replicas that ended"
    if counts[Tenancy.FOREIGN]:
        return warn(
            f"{said}, {counts[Tenancy.FOREIGN]} for another Redis, prefix or queue, which nobody empties",
            "start a webhookd with the options of that time; `webhookd spool list` names the directories",
        )
    if counts[Tenancy.FREE] and not counts[Tenancy.HELD]:
        return warn(f"{said}, perhaps with events", "start webhookd: it sends them on")
    return ok(said)


SPOOL: Checks[SpoolFacts] = (
    ("directory", directory),
    ("privacy", privacy),
    ("space", space),
    ("fsync", fsync),
    ("contents", contents),
)

SPOOL_OFF = warn(
    "off: while Redis is away, events are refused, and Chatwoot does not send them again",
    "set --spool to a directory on a local disk",
)

# -- the ports ----------------------------------------------------------------------------------------------


@frozen
class PortFacts:
    """Where the daemon listens, or will.

    ``refusal`` is why the port could not be had where nobody has it; ``report`` is the health of the webhookd
    that has it, and empty where somebody else does.
    """

    name: str
    is_needed: bool
    is_tcp: bool
    is_taken: bool = False
    refusal: str | None = None
    report: Mapping[str, Any] = {}


def look_at_port(endpoint: str, *, is_needed: bool) -> PortFacts:
    """See whether somebody answers there, and who."""
    address = tcp_address(endpoint)
    if address is None:
        return PortFacts(endpoint, is_needed, is_tcp=False)
    host, port = address
    name = f"port {port}" + (f" of {host}" if host else "")
    problem = _try_to_bind(host, port)
    if problem is None or problem.errno != errno.EADDRINUSE:
        refusal = None if problem is None else problem.strerror
        return PortFacts(name, is_needed, is_tcp=True, refusal=refusal)
    report = _health_report(local_url(host, port))
    return PortFacts(name, is_needed, is_tcp=True, is_taken=True, report=report)


def _health_report(url: str) -> Mapping[str, Any]:
    """Return the report of a webhookd; empty if something else answers."""
    try:
        _status, report = ask_health(f"{url}/health")
    except (Unreachable, Negative):
        return {}
    return report if {"version", "uptimeSeconds"} <= report.keys() else {}


def _try_to_bind(host: str, port: int) -> OSError | None:
    """Why the daemon could not listen there. Nor do we: a daemon that starts meanwhile is not hindered."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error
    return None


def port(facts: PortFacts) -> Finding:
    """Whether it is free, or webhookd is there and well."""
    bad = fail if facts.is_needed else warn
    if not facts.is_tcp:
        return ok(f"{facts.name}: only tcp: can be looked at")
    if facts.refusal is not None:
        return bad(f"{facts.name} cannot be had: {facts.refusal}", "choose another one")
    if not facts.is_taken:
        return ok(f"{facts.name} is free: webhookd does not run here")
    if not facts.report:
        return bad(f"{facts.name} is another program's", "stop it, or choose another one")
    return _health(facts)


def _health(facts: PortFacts) -> Finding:
    status, running = str(facts.report["status"]), str(facts.report["version"])
    said = f"{facts.name} is that of webhookd {running}: {status}"
    if status != "ok":
        judge = fail if status == "unavailable" else warn
        return judge(said, "see /health and the other lines: Redis, the spool")
    spool = facts.report.get("spool", {})
    dead, corrupt, records = (spool.get(name) or 0 for name in ("deadRecords", "corruptRecords", "records"))
    if dead or corrupt:
        return warn(f"{said}; its spool has {dead} dead and {corrupt} corrupt records", "webhookd spool list")
    if running != webhookd.__version__:
        return warn(f"{said}; this is {webhookd.__version__}", "restart it, if it was to be replaced")
    return ok(said + (f", {records} events are on their way from its spool" if records else ""))


WEBHOOKS: Checks[PortFacts] = (("webhooks", port),)
OPS: Checks[PortFacts] = (("ops", port),)

# -- the system ---------------------------------------------------------------------------------------------

_FEW_DESCRIPTORS = 4096
_BACKLOG = 1024
_SOMAXCONN = Path("/proc/sys/net/core/somaxconn")


@frozen
class LimitFacts:
    """What the kernel allows; ``somaxconn`` is None where it does not tell."""

    descriptors: int
    somaxconn: int | None


def look_at_limits() -> LimitFacts:
    """Those of this process, which the daemon has too if it is started in the same way."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        somaxconn = int(_SOMAXCONN.read_text())
    except (OSError, ValueError):
        somaxconn = None
    return LimitFacts(2**31 if hard == resource.RLIM_INFINITY else hard, somaxconn)


def files(facts: LimitFacts) -> Finding:
    """How many connections senders may have: the daemon raises its own limit to the hard one."""
    if facts.descriptors < _FEW_DESCRIPTORS:
        return warn(
            f"{facts.descriptors} open files at most: so many senders at once, or fewer",
            "raise it: LimitNOFILE= of systemd, `ulimits` of Compose, `ulimit -Hn`",
        )
    return ok(f"{facts.descriptors} open files at most")


def backlog(facts: LimitFacts) -> Finding:
    """How many connections may wait to be accepted."""
    if facts.somaxconn is not None and facts.somaxconn < _BACKLOG:
        return warn(
            f"net.core.somaxconn is {facts.somaxconn}, below the backlog of {_BACKLOG}",
            f"sysctl -w net.core.somaxconn={_BACKLOG}",
        )
    return ok("unknown here" if facts.somaxconn is None else f"net.core.somaxconn is {facts.somaxconn}")


LIMITS: Checks[LimitFacts] = (("open files", files), ("backlog", backlog))

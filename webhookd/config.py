"""The configuration: every option once, resolved once into one frozen `Config`.

Defaults < TOML file < environment < command line. `OPTIONS` is the only list of options: the command line,
the environment names and the reference in the docs are made from it. Unknown options and TOML keys are
refused; unknown ``WEBHOOK_*`` names only warn, because Compose and Kubernetes set some of their own.
"""

from __future__ import annotations

import json
import re
import socket
import tomllib
from collections.abc import Callable, Mapping
from ipaddress import ip_network
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import field, frozen

from webhookd.bullmq.keys import QueueKeys
from webhookd.bullmq.options import JobOptions
from webhookd.bullmq.script import Wire
from webhookd.clock import wall_clock_ms
from webhookd.model import ConfigError
from webhookd.redis.settings import QueueSettings
from webhookd.redis.url import RedisUrl

if TYPE_CHECKING:  # `webhookd health`, which containers start every few seconds, needs no cryptography
    from webhookd.intake.auth import Network

#: The source behind ``/webhook/chatwoot``.
DEFAULT_SOURCE = "chatwoot"

DEFAULT_JOB_OPTIONS: Mapping[str, object] = {
    "attempts": 3,
    "backoff": {"type": "exponential", "delay": 1000},
    "removeOnComplete": {"age": 3600, "count": 1000},
    "removeOnFail": {"age": 604800},
}

_SOURCE_NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}")
_OPS_PORT_DISTANCE = 6100
_BACKLOG = 1024

Environment = Mapping[str, str]

#: Where the value of each option comes from: a flag of the command line, the name of an environment variable,
#: the path of the file, the path and the section in it, or `DEFAULT`.
Origins = Mapping[str, str]

DEFAULT = "default"


@frozen
class Source:
    """One Chatwoot installation: who may send for it, and where its jobs go.

    ``events`` are the wanted event names; None means all. ``origins`` are those of the options per source.
    """

    name: str
    secrets: tuple[str, ...] = field(repr=False)
    tokens: tuple[str, ...] = field(repr=False)
    networks: tuple[Network, ...]
    events: frozenset[str] | None
    queue: str
    job_options: JobOptions
    origins: Origins = field(repr=False, eq=False)

    @property
    def is_open(self) -> bool:
        """Whether anybody may send for it."""
        return not self.secrets and not self.tokens


@frozen
class Config:
    """Everything that can be set. One field for each of `OPTIONS`, and what follows from them.

    ``origins`` are those of all options, before a source says otherwise.
    """

    port: int
    interface: str
    endpoint: str
    ops_endpoint: str | None
    redis: RedisUrl
    prefix: str
    wire: Wire
    job_data: str
    lock_ttl_ms: int
    dedup_ttl_ms: int
    tolerance_s: int
    trusted_proxies: tuple[Network, ...]
    max_body_bytes: int
    max_in_flight: int
    max_in_flight_bytes: int
    redis_deadline_s: float
    id_fallback: str
    ack: int
    spool: str | None
    spool_max_bytes: int
    drain_timeout_s: float
    log_format: str
    log_level: str
    access_log: bool
    tracing: str
    sources: Mapping[str, Source]
    warnings: tuple[str, ...]
    origins: Origins = field(repr=False, eq=False)

    @property
    def queues(self) -> list[QueueKeys]:
        """The queues of all sources, by name."""
        names = {source.queue for source in self.sources.values()}
        return [QueueKeys(self.prefix, name) for name in sorted(names)]

    @property
    def destination(self) -> str:
        """Where jobs go, without secrets: Redis, prefix and queues. A spool's records are for one."""
        return f"{self.redis} {self.prefix} {' '.join(keys.queue for keys in self.queues)}"

    @property
    def replica(self) -> str:
        """The name of this daemon among those that share a Redis: host and port."""
        return f"{socket.gethostname()}:{self.port}"

    @property
    def queue_settings(self) -> QueueSettings:
        """How the daemon adds jobs, and a command that does its work: both know the same duplicates."""
        replica = self.replica
        return QueueSettings(
            prefix=self.prefix,
            wire=self.wire,
            lock_ttl_ms=max(self.lock_ttl_ms, self.dedup_ttl_ms),
            set_by=lambda: f"{wall_clock_ms()} {replica}",
            replicas=self.ack,
        )


# -- how a value is read ------------------------------------------------------------------------------------
# A parser takes a string from the command line or the environment, or a TOML value, and raises ValueError
# with the rest of the sentence "--option: …".


def _integer(minimum: int, maximum: int = 2**53) -> Callable[[object], int]:
    def parse(value: object) -> int:
        if isinstance(value, str) and re.fullmatch(r"[0-9]{1,16}", value.strip()):
            value = int(value)
        if type(value) is not int or not minimum <= value <= maximum:
            limit = f"from {minimum} to {maximum}" if maximum < 2**53 else f"of at least {minimum}"
            raise ValueError(f"must be a whole number {limit}")
        return value

    return parse


def _seconds(minimum: float, maximum: float) -> Callable[[object], float]:
    def parse(value: object) -> float:
        try:
            seconds = float(value) if isinstance(value, (str, int, float)) and value is not True else -1.0
        except (ValueError, OverflowError):
            seconds = -1.0
        if not minimum <= seconds <= maximum:
            raise ValueError(f"must be a number of seconds from {minimum:g} to {maximum:g}")
        return seconds

    return parse


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("must be a text that is not empty")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError("must be UTF-8")
    return value.strip()


def _choice(*allowed: str) -> Callable[[object], str]:
    def parse(value: object) -> str:
        text = str(value).strip().lower()
        if text not in allowed:
            raise ValueError(f"must be one of {', '.join(allowed)}")
        return text

    return parse


def _switch(value: object) -> bool:
    if isinstance(value, bool):
        return value
    return _choice("on", "off")(value) == "on"


def _texts(value: object) -> tuple[str, ...]:
    """Several texts: a TOML list, or one string with commas between them."""
    if isinstance(value, str):
        value = value.split(",")
    if not isinstance(value, (list, tuple)):
        raise ValueError("must be a list, or texts with commas between them")
    return tuple(_text(item) for item in value)


def _networks(value: object) -> tuple[Network, ...]:
    networks = []
    for text in _texts(value):
        try:
            networks.append(ip_network(text))
        except ValueError:
            raise ValueError(f"{text!r} is no network: write 192.0.2.0/24 or 2001:db8::/32") from None
    return tuple(networks)


def _events(value: object) -> frozenset[str] | None:
    names = _texts(value)
    return None if "*" in names else frozenset(names)


def _job_options(value: object) -> JobOptions:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError("is not JSON") from None
    if not isinstance(value, Mapping):
        raise ValueError("must be a JSON object of BullMQ job options")
    return JobOptions.from_mapping(value)


def _queue(value: object) -> str:
    return QueueKeys("bull", _text(value)).queue


def _prefix(value: object) -> str:
    return QueueKeys(_text(value), "q").prefix


def _spool(value: object) -> str | None:
    text = _text(value)
    return None if text == "off" else text


def _ack(value: object) -> int:
    """The number of replicas that must have a job."""
    match = re.fullmatch(r"redis|replicas:([1-9][0-9]?)", _text(value))
    if match is None:
        raise ValueError("must be redis, or replicas:N with N from 1 to 99")
    return int(match[1] or 0)


def _redis(value: object) -> RedisUrl:
    return RedisUrl.parse(_text(value))


def _wire(value: object) -> Wire:
    return Wire(_choice("auto", "5", "6")(value))


# -- the options --------------------------------------------------------------------------------------------


@frozen
class Option:
    """One option under all its names.

    ``name`` is the TOML key, and with ``_unit`` behind it the field of `Config`; the command line says it
    with dashes. The first of ``environment`` that is set and not empty counts. A ``secret`` may be read from
    the file that ``NAME_FILE`` names, and a ``repeatable`` one may be given several times. ``per_source``
    ones can be set under ``[sources.NAME]``.
    """

    name: str
    environment: tuple[str, ...]
    parse: Callable[[object], object]
    default: object
    help: str
    unit: str = ""
    secret: bool = False
    repeatable: bool = False
    per_source: bool = False

    @property
    def flag(self) -> str:
        """The name on the command line, without the two dashes in front."""
        return self.name.replace("_", "-")

    @property
    def field(self) -> str:
        """The field of `Config`."""
        return f"{self.name}_{self.unit}" if self.unit else self.name


OPTIONS: tuple[Option, ...] = (
    Option("port", ("WEBHOOK_PORT", "PORT"), _integer(1, 65535), 3001, "TCP port to listen on"),
    Option("interface", ("WEBHOOK_INTERFACE",), _text, "", "address to listen on [all]"),
    Option(
        "endpoint",
        ("WEBHOOK_ENDPOINT",),
        _text,
        "",
        "Twisted endpoint to listen on: systemd:, unix:, ssl:, … [from port and interface]",
    ),
    Option(
        "ops_endpoint",
        ("WEBHOOK_OPS_ENDPOINT",),
        _text,
        "",
        "Twisted endpoint for health that the world does not see, or off [loopback, port + 6100]",
    ),
    Option(
        "redis",
        ("REDIS_URL",),
        _redis,
        "redis://127.0.0.1:6379/0",
        "redis://, rediss://, unix://, redis+sentinel://…/NAME, or embedded:",
        secret=True,
    ),
    Option("queue", ("WEBHOOK_QUEUE",), _queue, "chatwoot", "name of the BullMQ queue", per_source=True),
    Option("prefix", ("WEBHOOK_PREFIX",), _prefix, "bull", "BullMQ's key prefix; a {hash tag} for a cluster"),
    Option(
        "wire",
        ("WEBHOOK_WIRE",),
        _wire,
        "auto",
        "BullMQ's major version on a paused queue: auto, 5 or 6",
    ),
    Option(
        "job_options",
        ("WEBHOOK_JOB_OPTIONS",),
        _job_options,
        DEFAULT_JOB_OPTIONS,
        "JSON of BullMQ job options",
        per_source=True,
    ),
    Option(
        "job_data",
        ("WEBHOOK_JOB_DATA",),
        _choice("payload", "envelope"),
        "payload",
        "what a job's data is: the request's body as it came (payload), or that in an envelope",
    ),
    Option(
        "lock_ttl",
        ("WEBHOOK_JOB_CREATE_LOCK_TTL",),
        _integer(1),
        5000,
        "milliseconds that a creation lock lasts at least",
        unit="ms",
    ),
    Option(
        "dedup_ttl",
        ("WEBHOOK_DEDUP_TTL",),
        _integer(0),
        3_600_000,
        "milliseconds in which a repeated event is no new job; 0: only the creation lock",
        unit="ms",
    ),
    Option(
        "events",
        ("WEBHOOK_EVENTS",),
        _events,
        "*",
        "names of the wanted events with commas between them, or *",
        per_source=True,
    ),
    Option(
        "secret",
        ("WEBHOOK_SECRET",),
        _texts,
        (),
        "signing secret; repeat it for several. Prefer WEBHOOK_SECRET_FILE: others can see a command line",
        secret=True,
        repeatable=True,
        per_source=True,
    ),
    Option(
        "token",
        ("WEBHOOK_TOKEN",),
        _texts,
        (),
        "token for senders that cannot sign; repeat it for several. Prefer WEBHOOK_TOKEN_FILE",
        secret=True,
        repeatable=True,
        per_source=True,
    ),
    Option(
        "tolerance",
        ("WEBHOOK_TOLERANCE",),
        _integer(1),
        300,
        "seconds that a signature's timestamp may be off, either way",
        unit="s",
    ),
    Option(
        "networks",
        ("WEBHOOK_NETWORKS",),
        _networks,
        (),
        "networks that may send, with commas between them, in addition to a signature or token [all]",
        per_source=True,
    ),
    Option(
        "trusted_proxies",
        ("WEBHOOK_TRUSTED_PROXIES",),
        _networks,
        (),
        "networks of the proxies whose X-Forwarded-For and X-Real-IP are believed [none]",
    ),
    Option(
        "max_body",
        ("WEBHOOK_MAX_BODY",),
        _integer(1),
        16_777_216,
        "bytes of the largest request body",
        unit="bytes",
    ),
    Option(
        "max_in_flight",
        ("WEBHOOK_MAX_IN_FLIGHT",),
        _integer(1),
        10_000,
        "requests under way at once; more are answered 429",
    ),
    Option(
        "max_in_flight_bytes",
        ("WEBHOOK_MAX_IN_FLIGHT_BYTES",),
        _integer(1),
        268_435_456,
        "bytes of bodies under way at once; more are answered 429",
    ),
    Option(
        "redis_deadline",
        ("WEBHOOK_REDIS_DEADLINE",),
        _seconds(0.01, 1.5),
        0.5,
        "seconds that a request waits for Redis",
        unit="s",
    ),
    Option(
        "id_fallback",
        ("WEBHOOK_ID_FALLBACK",),
        _choice("hash", "none"),
        "hash",
        "how the job id of an update without a delivery id ends: hash of the body, or none (random)",
    ),
    Option(
        "ack",
        ("WEBHOOK_ACK",),
        _ack,
        "redis",
        "when an event counts as safe in Redis: redis, or replicas:N when N replicas have it as well",
    ),
    Option(
        "spool",
        ("WEBHOOK_SPOOL",),
        _spool,
        "var/spool",
        "directory on a local disk for events that Redis cannot take now, or off",
    ),
    Option(
        "spool_max_bytes",
        ("WEBHOOK_SPOOL_MAX_BYTES",),
        _integer(1),
        1_073_741_824,
        "bytes that the spool may hold",
    ),
    Option(
        "drain_timeout",
        ("WEBHOOK_DRAIN_TIMEOUT",),
        _seconds(0, 3600),
        10,
        "seconds that the end of the daemon may take to empty the spool",
        unit="s",
    ),
    Option("log_format", ("WEBHOOK_LOG_FORMAT",), _choice("text", "json"), "text", "text for people or json"),
    Option(
        "log_level",
        ("WEBHOOK_LOG_LEVEL",),
        _choice("debug", "info", "warn", "error"),
        "info",
        "debug, info, warn or error",
    ),
    Option("access_log", ("WEBHOOK_ACCESS_LOG",), _switch, "off", "one log line a request: on or off"),
    Option(
        "tracing",
        ("WEBHOOK_TRACING",),
        _choice("off", "otlp"),
        "off",
        "otlp exports spans as OpenTelemetry's OTEL_… variables say; or off",
    ),
)

_CONFIG_FILE = Option("config", ("WEBHOOK_CONFIG",), _text, None, "TOML file; conf/webhookd.toml is a sample")

#: What the command line and the environment can say; ``config`` cannot name itself in a file.
ALL_OPTIONS = (_CONFIG_FILE, *OPTIONS)


# -- resolving ----------------------------------------------------------------------------------------------


def resolve(command_line: Mapping[str, object], environment: Environment) -> Config:
    """One `Config` from what was given; reads the files that it names.

    ``command_line`` maps option names to strings, or to a list of strings for repeatable ones, and has
    only those that were given. Raises `ConfigError` with one line that names the culprit.
    """
    path = _parsed(_CONFIG_FILE, *_given(_CONFIG_FILE, command_line, environment, {}))
    document = _read_toml(path) if path is not None else {}
    sections = _table(document.pop("sources", {}), "[sources]")
    _refuse_unknown(document, {option.name for option in OPTIONS}, "")
    values, origins = {}, {}
    for option in OPTIONS:
        where, value = _given(option, command_line, environment, document)
        values[option.name] = _parsed(option, where, value)
        origins[option.name] = path if where == option.name else where
    sources = {
        name: _source(name, section, values, origins, f"{path} [sources.{name}]")
        for name, section in sections.items()
    }
    sources.setdefault(DEFAULT_SOURCE, _source(DEFAULT_SOURCE, {}, values, origins, DEFAULT))
    values["endpoint"] = values["endpoint"] or _tcp_endpoint(values["port"], values["interface"])
    values["ops_endpoint"] = _ops_endpoint(values["ops_endpoint"], values["port"])
    fields = {option.field: values[option.name] for option in OPTIONS if not option.per_source}
    warnings = tuple(_warnings(environment, sources))
    return Config(**fields, sources=sources, warnings=warnings, origins=origins)


def _given(
    option: Option, command_line: Mapping[str, object], environment: Environment, document: Mapping[str, Any]
) -> tuple[str, object]:
    """The highest place that has an option, under the option's name there, and what stands in it."""
    if option.name in command_line:
        return f"--{option.flag}", command_line[option.name]
    for name in option.environment:
        if environment.get(name):
            return name, environment[name]
        if option.secret and environment.get(f"{name}_FILE"):
            return f"{name}_FILE", _read_secret(f"{name}_FILE", environment)
    if option.name in document:
        return option.name, document[option.name]
    return DEFAULT, option.default


def _parsed(option: Option, where: str, value: object) -> Any:
    if where == DEFAULT and value in (None, ""):
        return value
    try:
        return option.parse(value)
    except ValueError as error:
        hint = ""
        if isinstance(value, str) and value.startswith("tcp://"):
            hint = " (Kubernetes sets this name for a service: use enableServiceLinks: false)"
        raise ConfigError(f"{where}: {error}{hint}") from None


def _read_secret(name: str, environment: Environment) -> str:
    """A file's text; several secrets stand on a line each."""
    try:
        text = Path(environment[name]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name}: cannot read the file: {_reason(error)}") from None
    return ",".join(text.split())


def _read_toml(path: str) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read the file: {_reason(error)}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (ValueError, RecursionError):  # a number of thousands of digits; lists in lists in lists
        raise ConfigError(f"{path}: it cannot be read as TOML") from None


def _reason(error: OSError | UnicodeDecodeError) -> str:
    return (error.strerror or "unknown error") if isinstance(error, OSError) else "it is not UTF-8"


def _table(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: must be a table")
    return value


def _refuse_unknown(table: Mapping[str, Any], known: set[str], where: str) -> None:
    for key in table:
        if key not in known:
            raise ConfigError(f"{where}{_shown(key)}: there is no such option")


def _shown(key: str) -> str:
    """A TOML key on one line, whatever stands between its quotes."""
    return key if key.isprintable() else repr(key)


def _source(name: str, section: object, values: Mapping[str, Any], origins: Origins, origin: str) -> Source:
    """A source has its own values where its section, the ``origin``, has some, and the common ones else."""
    where = f"[sources.{_shown(name)}] "
    if not _SOURCE_NAME.fullmatch(name):
        raise ConfigError(f"{where}: a source's name is a-z, then up to 31 of a-z, 0-9, _ and -")
    table = _table(section, where)
    options = [option for option in OPTIONS if option.per_source]
    _refuse_unknown(table, {option.name for option in options}, where)
    own = {
        option.name: _parsed(option, where + option.name, table[option.name])
        for option in options
        if option.name in table
    }
    value: dict[str, Any] = {**values, **own}
    return Source(
        name=name,
        secrets=value["secret"],
        tokens=value["token"],
        networks=value["networks"],
        events=value["events"],
        queue=value["queue"],
        job_options=value["job_options"],
        origins={option.name: origin if option.name in own else origins[option.name] for option in options},
    )


def _tcp_endpoint(port: int, interface: str) -> str:
    escaped = interface.replace(":", "\\:")
    return f"tcp:{port}:backlog={_BACKLOG}" + (f":interface={escaped}" if interface else "")


def _ops_endpoint(given: str, port: int) -> str | None:
    if given == "off":
        return None
    if given:
        return given
    ops_port = port + _OPS_PORT_DISTANCE
    return f"tcp:{ops_port if ops_port < 65536 else port - _OPS_PORT_DISTANCE}:interface=127.0.0.1"


def unknown_names(environment: Environment) -> list[str]:
    """The names in the environment that look like options of ours, and are none."""
    known = {name for option in ALL_OPTIONS for name in option.environment}
    known |= {f"{name}_FILE" for option in ALL_OPTIONS if option.secret for name in option.environment}
    return [name for name in sorted(environment) if name.startswith("WEBHOOK_") and name not in known]


def _warnings(environment: Environment, sources: Mapping[str, Source]) -> list[str]:
    warnings = [f"{name} in the environment is no option of webhookd" for name in unknown_names(environment)]
    warnings += [
        f"source {source.name} has neither a secret nor a token: anybody who reaches it can add jobs"
        for source in sources.values()
        if source.is_open
    ]
    return warnings

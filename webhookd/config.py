"""The configuration: every option once, resolved into one frozen `Config`.

Precedence: default < TOML file < environment < command line. The fields of `Config` and `Source` declare the
options. The command line, the help and the reference in the docs are made from these fields. An unknown
option or TOML key is an error. An unknown ``WEBHOOK_*`` name is only a warning: Compose and Kubernetes set
some.
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

from attrs import evolve, field, fields, frozen

from webhookd.bullmq.keys import QueueKeys
from webhookd.bullmq.options import JobOptions
from webhookd.bullmq.script import Wire
from webhookd.clock import wall_clock_ms
from webhookd.model import ConfigError
from webhookd.redis.settings import QueueSettings
from webhookd.redis.url import RedisUrl
from webhookd.text import printable

if TYPE_CHECKING:  # containers run `webhookd health` every few seconds: it does not import cryptography
    from webhookd.intake.auth import Network

#: The source of ``/webhook/chatwoot``.
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

#: The origin of each option's value: a flag of the command line, the name of an environment variable, the
#: path of the file, the path and the section in it, or `DEFAULT`.
Origins = Mapping[str, str]

DEFAULT = "default"


# -- parsers ------------------------------------------------------------------------------------------------
# A parser takes a string from the command line or the environment, or a TOML value. Its ValueError completes
# the sentence "--option: …".


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
    return value if isinstance(value, bool) else _choice("on", "off")(value) == "on"


def _texts(value: object) -> tuple[str, ...]:
    """Parse a TOML list, or one string with commas between the texts."""
    if isinstance(value, str):
        value = value.split(",")
    if not isinstance(value, (list, tuple)):
        raise ValueError("must be a list, or texts with commas between them")
    return tuple(_text(item) for item in value)


def _networks(value: object) -> tuple[Network, ...]:
    return tuple(ip_network(text) for text in _texts(value))


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
    """Return the number of replicas that must have a job."""
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

    ``field`` is the attribute of `Config` or `Source` that holds the parsed value. If ``default`` is empty,
    the help shows ``default_help`` instead. A ``secret`` is not shown, and can be read from the file that
    ``NAME_FILE`` names. A ``repeatable`` option can be given several times. One that is ``per_source`` can
    also be set under ``[sources.NAME]``.
    """

    default: object
    parse: Callable[[object], object]
    help: str
    default_help: str = "none"
    _environment: tuple[str, ...] = ()
    unit: str = ""
    secret: bool = False
    repeatable: bool = False
    per_source: bool = False
    field: str = ""

    @property
    def name(self) -> str:
        """The TOML key: the field without its unit, and in the singular if the option is repeatable."""
        name = self.field.removesuffix("s") if self.repeatable else self.field
        return name.removesuffix(f"_{self.unit}")

    @property
    def flag(self) -> str:
        """The name on the command line, without the two dashes."""
        return self.name.replace("_", "-")

    @property
    def environment(self) -> tuple[str, ...]:
        """The environment variables. The first that is set and not empty counts."""
        return self._environment or (f"WEBHOOK_{self.name.upper()}",)

    @property
    def variables(self) -> tuple[str, ...]:
        """All names in the environment: the variables, and those that name a file with a secret."""
        return self.environment + tuple(f"{name}_FILE" for name in self.environment if self.secret)

    @property
    def shown_default(self) -> str:
        """The default as the help shows it."""
        if self.default in (None, "", ()):
            return f"({self.default_help})"
        return json.dumps(self.default) if isinstance(self.default, Mapping) else str(self.default)

    @property
    def full_help(self) -> str:
        """The help with the environment variables and the default, in the form that click uses."""
        return f"{self.help}  [env var: {', '.join(self.variables)}; default: {self.shown_default}]"


def _option(*arguments: Any, **named: Any) -> Any:
    """Return a field that has an option as its metadata. The arguments are those of `Option`."""
    option = Option(*arguments, **named)
    return field(repr=not option.secret, metadata={"option": option})


@frozen(kw_only=True)
class Source:
    """One Chatwoot installation: its credentials, and the queue and options of its jobs.

    ``events`` are the wanted event names; None means all. ``origins`` are those of the options per source.
    """

    name: str
    secrets: tuple[str, ...] = _option(
        (),
        _texts,
        "Signing secret; repeat it for several. Prefer WEBHOOK_SECRET_FILE: others can see a command line.",
        secret=True,
        repeatable=True,
    )
    tokens: tuple[str, ...] = _option(
        (),
        _texts,
        "Token for senders that cannot sign; repeat it for several. Prefer WEBHOOK_TOKEN_FILE.",
        secret=True,
        repeatable=True,
    )
    networks: tuple[Network, ...] = _option(
        (),
        _networks,
        "Networks that may send, separated by commas, in addition to a signature or token.",
        default_help="all",
    )
    events: frozenset[str] | None = _option("*", _events, "Wanted events, separated by commas, or *.")
    queue: str = _option("chatwoot", _queue, "Name of the BullMQ queue.")
    job_options: JobOptions = _option(DEFAULT_JOB_OPTIONS, _job_options, "BullMQ job options, as JSON.")
    origins: Origins = field(repr=False, eq=False)

    @property
    def is_open(self) -> bool:
        """True if anyone may send for it."""
        return not self.secrets and not self.tokens


@frozen(kw_only=True)
class Config:
    """The whole configuration: one field for each option that all sources share, and what follows from them.

    ``origins`` are those of all options, before a section of a source overrides them.
    """

    port: int = _option(
        3001, _integer(1, 65535), "TCP port to listen on.", environment=("WEBHOOK_PORT", "PORT")
    )
    interface: str = _option("", _text, "Address to listen on.", default_help="all")
    endpoint: str = _option(
        "",
        _text,
        "Twisted endpoint to listen on: systemd:, unix:, ssl:, …",
        default_help="from port and interface",
    )
    ops_endpoint: str | None = _option(
        "",
        _text,
        "Private Twisted endpoint for metrics, health and the status page, or off.",
        default_help="loopback, port + 6100",
    )
    redis: RedisUrl = _option(
        "redis://127.0.0.1:6379/0",
        _redis,
        "URL of Redis: redis://, rediss://, unix://, redis+sentinel://…/NAME, or embedded:",
        environment=("REDIS_URL",),
        secret=True,
    )
    prefix: str = _option("bull", _prefix, "Key prefix of BullMQ; a {hash tag} for a Redis Cluster.")
    wire: Wire = _option(
        "auto", _wire, "Major version of the workers' BullMQ, for a paused queue: auto, 5 or 6."
    )
    job_data: str = _option(
        "payload",
        _choice("payload", "envelope"),
        "Data of a job: the body unchanged (payload), or the body in an envelope (envelope).",
    )
    lock_ttl_ms: int = _option(
        5000,
        _integer(1),
        "Minimum lifetime of a creation lock, in ms.",
        environment=("WEBHOOK_JOB_CREATE_LOCK_TTL",),
        unit="ms",
    )
    dedup_ttl_ms: int = _option(
        3_600_000,
        _integer(0),
        "Time in which a repeated event adds no job, in ms. 0: only the creation lock counts.",
        unit="ms",
    )
    tolerance_s: int = _option(
        300, _integer(1), "Maximum seconds between a signature's timestamp and the clock.", unit="s"
    )
    trusted_proxies: tuple[Network, ...] = _option(
        (), _networks, "Networks of the proxies whose X-Forwarded-For and X-Real-IP are trusted."
    )
    max_body_bytes: int = _option(16_777_216, _integer(1), "Maximum bytes of a request body.", unit="bytes")
    max_in_flight: int = _option(10_000, _integer(1), "Maximum requests in progress; further ones get 429.")
    max_in_flight_bytes: int = _option(
        268_435_456, _integer(1), "Maximum bytes of all bodies in progress; further requests get 429."
    )
    redis_deadline_s: float = _option(
        0.5, _seconds(0.01, 1.5), "Maximum seconds that a request waits for Redis.", unit="s"
    )
    id_fallback: str = _option(
        "hash",
        _choice("hash", "none"),
        "Last part of the job id of an update without a delivery id: hash of the body, or none (random).",
    )
    ack: int = _option(
        "redis", _ack, "When Redis counts as having an event: redis, or replicas:N once N replicas have it."
    )
    spool: str | None = _option(
        "var/spool", _spool, "Directory on a local disk for events that Redis cannot take, or off."
    )
    spool_max_bytes: int = _option(1_073_741_824, _integer(1), "Maximum bytes of the spool.")
    drain_timeout_s: float = _option(
        10, _seconds(0, 3600), "Maximum seconds to drain the spool on shutdown.", unit="s"
    )
    log_format: str = _option("text", _choice("text", "json"), "Format of the log: text or json.")
    log_level: str = _option(
        "info", _choice("debug", "info", "warn", "error"), "Lowest level to log: debug, info, warn or error."
    )
    access_log: bool = _option("off", _switch, "Log a line for each request: on or off.")
    tracing: str = _option(
        "off",
        _choice("off", "otlp"),
        "Export spans, configured by OpenTelemetry's OTEL_… variables: otlp or off.",
    )
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
        """Redis, prefix and queues, without secrets: a spool's records belong to one destination."""
        return f"{self.redis} {self.prefix} {' '.join(keys.queue for keys in self.queues)}"

    @property
    def replica(self) -> str:
        """The name of this daemon among those that share a Redis: host and port."""
        return f"{socket.gethostname()}:{self.port}"

    @property
    def queue_settings(self) -> QueueSettings:
        """The rules by which jobs are added. The command uses them too, so both find the same duplicates."""
        replica = self.replica
        return QueueSettings(
            prefix=self.prefix,
            wire=self.wire,
            lock_ttl_ms=max(self.lock_ttl_ms, self.dedup_ttl_ms),
            set_by=lambda: f"{wall_clock_ms()} {replica}",
            replicas=self.ack,
        )


def _options_of(declaring: type[Config | Source], *, per_source: bool) -> tuple[Option, ...]:
    return tuple(
        evolve(attribute.metadata["option"], field=attribute.name, per_source=per_source)
        for attribute in fields(declaring)
        if attribute.metadata
    )


#: The options that all sources share, and those that a source can override.
COMMON_OPTIONS = _options_of(Config, per_source=False)
SOURCE_OPTIONS = _options_of(Source, per_source=True)
OPTIONS = COMMON_OPTIONS + SOURCE_OPTIONS

_CONFIG_FILE = Option(None, _text, "TOML file; conf/webhookd.toml is a sample.", field="config")

#: The options of the command line and the environment. A file cannot set ``config``.
ALL_OPTIONS = (_CONFIG_FILE, *OPTIONS)


# -- resolving ----------------------------------------------------------------------------------------------


def resolve(command_line: Mapping[str, object], environment: Environment) -> Config:
    """Return the `Config` of what was given; reads the files that it names.

    ``command_line`` maps option names to strings, or to a list of strings for repeatable ones, and has
    only those that were given. Raises `ConfigError` with one line that names the culprit.
    """
    path = _parsed(_CONFIG_FILE, *_given(_CONFIG_FILE, command_line, environment, {}))
    document = _read_toml(path) if path is not None else {}
    sections = _table(document.pop("sources", {}), "[sources]")
    _refuse_unknown(document, OPTIONS, "")
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
    return Config(
        sources=sources,
        warnings=tuple(_warnings(environment, sources)),
        origins=origins,
        **{option.field: values[option.name] for option in COMMON_OPTIONS},
    )


def _given(
    option: Option, command_line: Mapping[str, object], environment: Environment, document: Mapping[str, Any]
) -> tuple[str, object]:
    """Return the option's name in the highest place that has it, and its value there."""
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
    """Return the text of the file that a variable names. Several secrets stand on separate lines."""
    return ",".join(_read(environment[name], f"{name}: ").split())


def _read_toml(path: str) -> dict[str, Any]:
    try:
        return tomllib.loads(_read(path, f"{path}: "))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (ValueError, RecursionError):  # a number of thousands of digits; lists in lists in lists
        raise ConfigError(f"{path}: it cannot be read as TOML") from None


def _read(path: str, where: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{where}cannot read the file: {error.strerror or 'unknown error'}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{where}cannot read the file: it is not UTF-8") from None


def _table(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: must be a table")
    return value


def _refuse_unknown(table: Mapping[str, Any], options: tuple[Option, ...], where: str) -> None:
    known = {option.name for option in options}
    for key in table:
        if key not in known:
            raise ConfigError(f"{where}{printable(key)}: there is no such option")


def _source(name: str, section: object, values: Mapping[str, Any], origins: Origins, origin: str) -> Source:
    """Return a source: the values of its ``section``, which is their ``origin``, else the common values."""
    where = f"[sources.{printable(name)}] "
    if not _SOURCE_NAME.fullmatch(name):
        raise ConfigError(f"{where}: a source's name is a-z, then up to 31 of a-z, 0-9, _ and -")
    table = _table(section, where)
    _refuse_unknown(table, SOURCE_OPTIONS, where)
    own = {
        option.name: _parsed(option, where + option.name, table[option.name])
        for option in SOURCE_OPTIONS
        if option.name in table
    }
    return Source(
        name=name,
        origins={
            option.name: origin if option.name in own else origins[option.name] for option in SOURCE_OPTIONS
        },
        **{option.field: {**values, **own}[option.name] for option in SOURCE_OPTIONS},
    )


def _tcp_endpoint(port: int, interface: str) -> str:
    escaped = interface.replace(":", "\\:")
    return f"tcp:{port}:backlog={_BACKLOG}" + (f":interface={escaped}" if interface else "")


def _ops_endpoint(given: str, port: int) -> str | None:
    if given:
        return None if given == "off" else given
    ops_port = port + _OPS_PORT_DISTANCE
    return f"tcp:{ops_port if ops_port < 65536 else port - _OPS_PORT_DISTANCE}:interface=127.0.0.1"


def unknown_names(environment: Environment) -> list[str]:
    """Return the ``WEBHOOK_*`` names in the environment that no option has."""
    known = {name for option in ALL_OPTIONS for name in option.variables}
    return [name for name in sorted(environment) if name.startswith("WEBHOOK_") and name not in known]


def _warnings(environment: Environment, sources: Mapping[str, Source]) -> list[str]:
    warnings = [f"{name} in the environment is no option of webhookd" for name in unknown_names(environment)]
    warnings += [
        f"source {source.name} has neither a secret nor a token: anyone who reaches it can add jobs"
        for source in sources.values()
        if source.is_open
    ]
    return warnings

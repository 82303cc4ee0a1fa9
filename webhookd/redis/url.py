"""The forms of a Redis URL. Pure.

* ``redis://[user[:password]@]host[:6379][/database]``, and ``rediss://`` for TLS (``?ca_file=PATH``
  names the file of a private certificate authority);
* ``unix://[user[:password]@]/path/to/socket[?db=N]``;
* ``redis+sentinel://[user[:password]@]host[:26379],host…/NAME[/database]``: user, password and database
  are those of the Redis servers;
* ``embedded:`` or ``embedded:PORT``: a private server that the daemon runs itself.
"""

from __future__ import annotations

from ipaddress import IPv6Address
from urllib.parse import parse_qs, unquote

from attrs import field, frozen

_REDIS_PORT = 6379
_SENTINEL_PORT = 26379

HostPort = tuple[str, int]


@frozen
class RedisUrl:
    """A parsed URL: exactly one of ``hosts``, ``socket_path`` and ``embedded`` is set.

    With a ``sentinel_name``, the ``hosts`` are Sentinels, else they are one Redis server.
    """

    hosts: tuple[HostPort, ...] = ()
    socket_path: str | None = None
    sentinel_name: str | None = None
    embedded: bool = False
    embedded_port: int | None = None
    tls: bool = False
    ca_file: str | None = None
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    database: int = 0

    @classmethod
    def parse(cls, text: str) -> RedisUrl:
        """Parse a URL.

        :raises ValueError: its message is one line, which repeats no password.
        """
        scheme = text.partition(":")[0]
        if scheme not in _PARSERS:
            known = ", ".join(_PARSERS)
            raise ValueError(f"not a Redis URL: it must begin with one of {known}")
        return _PARSERS[scheme](text)

    def __str__(self) -> str:
        """Return the URL without credentials, for logs and for comparing one Redis with another."""
        if self.embedded:
            return "embedded:"
        if self.socket_path is not None:
            return f"unix://{self.socket_path}?db={self.database}"
        hosts = ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts)
        if self.sentinel_name is not None:
            return f"redis+sentinel://{hosts}/{self.sentinel_name}/{self.database}"
        return f"{'rediss' if self.tls else 'redis'}://{hosts}/{self.database}"


def _split(text: str) -> tuple[str, str, str]:
    """Split a URL into authority, path and query (RFC 3986, appendix B).

    urllib expects one host: it refuses several if one of them is an IPv6 address.
    """
    _, _, rest = text.rstrip().partition(":")
    rest, _, _ = rest.partition("#")
    rest, _, query = rest.partition("?")
    if not rest.startswith("//"):
        return "", rest, query
    authority, slash, path = rest[2:].partition("/")
    if ("[" in authority) != ("]" in authority):
        raise ValueError(
            "not a URL: write special characters of a password as %XX, and an IPv6 address in brackets"
        )
    return authority, slash + path, query


def _parse_redis(text: str) -> RedisUrl:
    authority, path, query = _split(text)
    options = _options(query, {"ca_file"})
    tls = text.startswith("rediss:")
    if "ca_file" in options and not tls:
        raise ValueError("ca_file needs rediss://")
    username, password, hosts = _authority(authority, _REDIS_PORT)
    if len(hosts) != 1:
        raise ValueError("a redis:// URL names one host; for several Sentinels use redis+sentinel://")
    return RedisUrl(
        hosts=hosts,
        tls=tls,
        ca_file=options.get("ca_file"),
        username=username,
        password=password,
        database=_database(path.strip("/")),
    )


def _parse_sentinel(text: str) -> RedisUrl:
    authority, path, query = _split(text)
    _options(query, set())
    username, password, hosts = _authority(authority, _SENTINEL_PORT)
    name, _, database = path.strip("/").partition("/")
    if not name:
        raise ValueError("a redis+sentinel:// URL ends with the name of the primary: /NAME")
    return RedisUrl(
        hosts=hosts,
        sentinel_name=unquote(name),
        username=username,
        password=password,
        database=_database(database),
    )


def _parse_unix(text: str) -> RedisUrl:
    authority, path, query = _split(text)
    options = _options(query, {"db"})
    username, password, rest = _user_info(authority)
    path = unquote(rest + path)
    if not path.startswith("/"):
        raise ValueError("a unix:// URL names an absolute path: unix:///run/redis.sock")
    return RedisUrl(
        socket_path=path, username=username, password=password, database=_database(options.get("db", ""))
    )


def _parse_embedded(text: str) -> RedisUrl:
    port = text.partition(":")[2]
    if not port:
        return RedisUrl(embedded=True)
    return RedisUrl(embedded=True, embedded_port=_number(port, 1, 65535, "the port"))


_PARSERS = {
    "redis": _parse_redis,
    "rediss": _parse_redis,
    "redis+sentinel": _parse_sentinel,
    "unix": _parse_unix,
    "embedded": _parse_embedded,
}


def _user_info(authority: str) -> tuple[str | None, str | None, str]:
    user_info, _, rest = authority.rpartition("@")
    username, _, password = user_info.partition(":")
    return unquote(username) or None, unquote(password) or None, rest


def _authority(authority: str, default_port: int) -> tuple[str | None, str | None, tuple[HostPort, ...]]:
    username, password, hosts = _user_info(authority)
    if username is not None and password is None:
        raise ValueError("a user name needs a password: user:password@host")
    return username, password, tuple(_address(host, default_port) for host in hosts.split(","))


def _address(text: str, default_port: int) -> HostPort:
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or not _is_ipv6(host) or rest[:1] not in ("", ":"):
            raise ValueError("only an IPv6 address may be in brackets, and a port may follow: [::1]:6379")
        port = rest[1:]
    else:
        host, _, port = text.partition(":")
        if not host:
            raise ValueError("the URL names no host")
    return host, _number(port, 1, 65535, "the port") if port else default_port


def _is_ipv6(text: str) -> bool:
    try:
        IPv6Address(text)
    except ValueError:
        return False
    return True


def _database(text: str) -> int:
    return _number(text, 0, 1_000_000, "the database") if text else 0


def _options(query: str, known: set[str]) -> dict[str, str]:
    options = {name: values[-1] for name, values in parse_qs(query).items()}
    if options.keys() - known:  # the message does not name them: after a "?" can be the rest of a password
        raise ValueError(f"the URL may have {' and '.join(known) or 'nothing'} after a question mark")
    return options


def _number(text: str, minimum: int, maximum: int, what: str) -> int:
    if not (text.isascii() and text.isdigit()) or not minimum <= int(text) <= maximum:
        raise ValueError(f"{what} must be a number from {minimum} to {maximum}")
    return int(text)

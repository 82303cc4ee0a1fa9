"""The running daemon: its addresses, and its health.

Containers run ``webhookd health`` every few seconds. So this module does not import Twisted, and uses
Python's own HTTP client.
"""

from __future__ import annotations

import http.client
import json
import re
import signal
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any
from urllib.parse import urlsplit

from webhookd.cli.terminal import Negative, Unreachable, WrongUse
from webhookd.config import DEFAULT_SOURCE, Config

_DEADLINE_S = 3.0
_MAX_REPORT_BYTES = 1_048_576
_ANY_ADDRESS = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  # none is bound here


def tcp_address(endpoint: str) -> tuple[str, int] | None:
    """Return interface and port of a Twisted endpoint ``tcp:PORT:…``; None for all others."""
    kind, *arguments = [re.sub(r"\\(.)", r"\1", part) for part in re.split(r"(?<!\\):", endpoint)]
    named = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    port = named.get("port", arguments[0] if arguments else "")
    if kind not in ("tcp", "tcp4", "tcp6") or not port.isdecimal():
        return None
    return named.get("interface", ""), int(port)


def local_url(interface: str, port: int) -> str:
    """Return the URL of a server on this machine, without a slash at the end."""
    host = _ANY_ADDRESS.get(interface, interface)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def daemon_url(settings: Config) -> str:
    """Return the URL at which the daemon of this configuration answers on this machine."""
    address = tcp_address(settings.endpoint)
    if address is None:
        raise WrongUse(f"the daemon listens on {settings.endpoint}: give its URL with --url")
    return local_url(*address)


def webhook_url(settings: Config, url: str | None, source: str) -> str:
    """Return the URL for the webhooks of a source; a URL with a path is used as it is."""
    base = url or daemon_url(settings)
    if urlsplit(base).path:
        return base
    return f"{base}/webhook/chatwoot" + ("" if source == DEFAULT_SOURCE else f"/{source}")


def ask_health(url: str) -> tuple[int, Mapping[str, Any]]:
    """Return the status code and the report of ``/health`` or a path below it.

    Raises `Unreachable`, or `Negative` if something else than webhookd answers.
    """
    parts = urlsplit(url)
    connect = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    try:
        with _deadline(), closing(connect(parts.hostname or "", parts.port)) as connection:
            connection.request("GET", parts.path)
            answer = connection.getresponse()
            body = answer.read(_MAX_REPORT_BYTES)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise Unreachable(f"{url}: {_reason(error)}") from None
    try:
        report = json.loads(body)
    except (ValueError, RecursionError):
        report = None
    if not isinstance(report, dict) or "status" not in report:
        raise Negative(f"{url}: {answer.status}, but not as webhookd answers")
    return answer.status, report


@contextmanager
def _deadline() -> Iterator[None]:
    """Limit the whole exchange: a socket's own timeout starts again with every byte."""

    def late(_signal: int, _frame: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, _DEADLINE_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {_DEADLINE_S:g} s"
    if isinstance(error, http.client.RemoteDisconnected):
        return "the connection ended before the answer"
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return "it does not speak HTTP"

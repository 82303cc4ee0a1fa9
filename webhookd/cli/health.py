"""``webhookd health``: how the daemon says that it is, as an exit code.

Containers start it every few seconds, so it needs no Twisted, and asks with Python's own HTTP client.
"""

from __future__ import annotations

import http.client
import json
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import click

from webhookd.cli.settings import configured, daemon_url, url_option
from webhookd.cli.terminal import Negative, Unreachable, brief, json_option, print_json
from webhookd.config import Config

_DEADLINE_S = 3.0
_MAX_REPORT_BYTES = 1_048_576
_COLOURS = {"ok": "green", "up": "green", "closed": "green", "degraded": "yellow", "down": "red"}


@click.command()
@click.option("--live", "path", flag_value="/health/live", default=True, help="It answers.  [default]")
@click.option("--ready", "path", flag_value="/health/ready", help="It could accept an event now.")
@click.option("--full", "path", flag_value="/health", help="All that it knows of itself; it is ready.")
@url_option
@configured("port", "interface", "endpoint")
@json_option
def command(settings: Config, path: str, url: str | None, *, as_json: bool) -> None:
    """Ask the daemon how it is.

    Exit codes: 0 well; 1 not well; 3 it does not answer.
    """
    address = (url or daemon_url(settings)) + path
    code, report = _ask(address)
    if as_json:
        print_json(report)
    elif path == "/health":
        _print_report(report)
    status = brief(str(report["status"]))
    if code != http.client.OK:
        raise Negative(f"{address}: {code} {status}")
    if path != "/health" and not as_json:
        click.echo(f"{address}: {code} {_coloured(status)}")


def _ask(address: str) -> tuple[int, Mapping[str, Any]]:
    parts = urlsplit(address)
    secure = parts.scheme == "https"
    connect = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    try:
        with _deadline():
            connection = connect(parts.hostname or "", parts.port)
            connection.request("GET", parts.path)
            answer = connection.getresponse()
            body = answer.read(_MAX_REPORT_BYTES)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise Unreachable(f"{address}: {_reason(error)}") from None
    try:
        report = json.loads(body)
    except (ValueError, RecursionError):
        report = None
    if not isinstance(report, dict) or "status" not in report:
        raise Negative(f"{address}: {answer.status}, but not as webhookd answers")
    return answer.status, report


@contextmanager
def _deadline() -> Iterator[None]:
    """For all of it: a socket's own timeout is for each read, and a byte now and then would prolong it."""

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


def _print_report(report: Mapping[str, Any], indent: str = "") -> None:
    """A line for each fact, and the facts of a section below its name."""
    width = max((len(name) for name, value in report.items() if not isinstance(value, dict)), default=0)
    for name, value in report.items():
        if isinstance(value, dict):
            click.echo(f"{indent}{click.style(brief(name), bold=True)}")
            _print_report(value, indent + "  ")
        else:
            click.echo(f"{indent}{brief(name):<{width}}  {_shown(value)}")


def _shown(value: object) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case list():
            return brief(", ".join(map(str, value))) or "-"
        case _:
            return _coloured(brief(str(value)))


def _coloured(word: str) -> str:
    return click.style(word, fg=_COLOURS[word]) if word in _COLOURS else word

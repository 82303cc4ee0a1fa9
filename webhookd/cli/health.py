"""``webhookd health``: the daemon's health, as an exit code."""

from __future__ import annotations

import http.client
from collections.abc import Mapping
from typing import Any

import click

from webhookd.cli.daemon import ask_health, daemon_url
from webhookd.cli.settings import configured, url_option
from webhookd.cli.terminal import Negative, brief, json_option, print_json
from webhookd.config import Config

_COLOURS = {"ok": "green", "up": "green", "closed": "green", "degraded": "yellow", "down": "red"}


@click.command()
@click.option(
    "--live",
    "path",
    flag_value="/health/live",
    default=True,
    show_default=False,
    help="Check that it answers. This is the default.",
)
@click.option("--ready", "path", flag_value="/health/ready", help="Check that it can accept an event now.")
@click.option("--full", "path", flag_value="/health", help="Like --ready, but show the whole report.")
@url_option
@configured("port", "interface", "endpoint")
@json_option
def command(settings: Config, path: str, url: str | None, *, as_json: bool) -> None:
    """Ask the daemon for its health.

    Exit codes: 0 healthy; 1 not healthy; 3 no answer.
    """
    address = (url or daemon_url(settings)) + path
    code, report = ask_health(address)
    if as_json:
        print_json(report)
    elif path == "/health":
        _print_report(report)
    status = brief(str(report["status"]))
    if code != http.client.OK:
        raise Negative(f"{address}: {code} {status}")
    if path != "/health" and not as_json:
        click.echo(f"{address}: {code} {_coloured(status)}")


def _print_report(report: Mapping[str, Any], indent: str = "") -> None:
    """Print a line for each value, and the values of a section below its name."""
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

"""``webhookd config``: the daemon's configuration, and the origin of each value."""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import Enum
from typing import Any

import click

from webhookd.bullmq.options import JobOptions
from webhookd.cli.settings import configured
from webhookd.cli.terminal import json_option, print_json, print_table
from webhookd.config import COMMON_OPTIONS, OPTIONS, SOURCE_OPTIONS, Config, Option, Source
from webhookd.redis.url import RedisUrl


@click.command()
@configured(*(option.name for option in OPTIONS))
@json_option
def command(settings: Config, *, as_json: bool) -> None:
    """Show the configuration, and the origin of each value.

    Accepts all options of the daemon, to try them out. Of secrets it shows only their number and length.
    """
    common = _values(COMMON_OPTIONS, settings)
    sources = {name: _values(SOURCE_OPTIONS, source) for name, source in settings.sources.items()}
    if as_json:
        print_json({"options": common, "sources": sources, "warnings": settings.warnings})
        return
    print_table(("OPTION", "FROM", "VALUE"), [_row(value) for value in common])
    for name, values in sources.items():
        click.echo()
        print_table((f"SOURCE {name}", "FROM", "VALUE"), [_row(value) for value in values])
    for warning in settings.warnings:
        click.echo(f"{click.style('warning:', fg='yellow')} {warning}", err=True)


def _values(options: Sequence[Option], holder: Config | Source) -> list[dict[str, Any]]:
    """Return the resolved options in printable form: secrets are masked."""
    return [
        {
            "option": option.name,
            "origin": holder.origins[option.name],
            "value": _shown(option, getattr(holder, option.field)),
        }
        for option in options
    ]


def _row(value: dict[str, Any]) -> tuple[str, str, str]:
    shown = value["value"]
    text = shown if isinstance(shown, str) and shown else json.dumps(shown, ensure_ascii=False)
    return value["option"], value["origin"], text


def _shown(option: Option, value: Any) -> Any:  # noqa: PLR0911  # a table
    """Return a value that JSON can represent, as it would be written into the file."""
    match value:
        case RedisUrl():
            return f"{value} (with a password)" if value.password else str(value)
        case JobOptions():
            options = json.loads(value.encode("x"))
            del options["jobId"]
            return options
        case Enum():
            return value.value
        case None:
            return "*" if option.name == "events" else "off"
        case frozenset():
            return sorted(value)
        case tuple():
            return [f"{len(item)} characters" if option.secret else str(item) for item in value]
        case int() if option.name == "ack":
            return f"replicas:{value}" if value else "redis"
        case _:
            return value

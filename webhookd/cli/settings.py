"""The daemon's configuration, for the subcommands."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from typing import Any
from urllib.parse import urlsplit

import click

from webhookd.cli.terminal import WrongUse
from webhookd.config import ALL_OPTIONS, DEFAULT_SOURCE, Config, Source, resolve
from webhookd.model import ConfigError


def configured(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command the named options of the daemon, and ``--config``.

    The command gets the whole `webhookd.config.Config` as ``settings``, resolved as the daemon resolves it.
    An unusable configuration is a usage error.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(command)
        def call(**arguments: Any) -> Any:
            given = {option.name: arguments.pop(option.name) for option in options}
            given = {name: value for name, value in given.items() if value not in (None, ())}
            try:
                return command(settings=resolve(given, os.environ), **arguments)
            except ConfigError as error:
                raise WrongUse(str(error)) from None

        for option in reversed(options):
            call = click.option(
                f"--{option.flag}",
                option.name,
                help=option.full_help,
                metavar="VALUE",
                multiple=option.repeatable,
            )(call)
        return call

    options = [option for option in ALL_OPTIONS if option.name in {"config", *names}]
    return decorate


def _checked_url(_context: click.Context, _parameter: click.Parameter, url: str | None) -> str | None:
    if url is None:
        return None
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # for example a port of letters
        usable = False
    if not usable or not url.isascii() or not url.isprintable() or " " in url:
        raise WrongUse(f"--url: {url!r} is not an address like http://127.0.0.1:3001")
    return url.rstrip("/")


#: Gives a command ``--url``, as the argument ``url``: None, or an address without a slash at the end.
url_option = click.option(
    "--url",
    metavar="URL",
    callback=_checked_url,
    show_default="this machine, as the daemon is configured",
    help="Address of the daemon.",
)

#: Gives a command ``--source``, as the argument ``source``: a name for `find_source`.
source_option = click.option(
    "--source",
    metavar="NAME",
    default=DEFAULT_SOURCE,
    help="Name of the Chatwoot installation, if there are several.",
)


def find_source(settings: Config, name: str) -> Source:
    """Return the source with this name."""
    if name not in settings.sources:
        raise WrongUse(f"there is no source {name!r}; the sources are: {', '.join(settings.sources)}")
    return settings.sources[name]


def secrets_of(source: Source) -> tuple[str, ...]:
    """Return the secrets of a source; having none is a usage error."""
    if not source.secrets:
        raise WrongUse(
            f"no secret of the source {source.name} is known: set WEBHOOK_SECRET_FILE, or --secret"
        )
    return source.secrets

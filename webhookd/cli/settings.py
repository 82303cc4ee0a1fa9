"""The daemon's own configuration, for the parts of the command."""

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
    """Give a command those of the daemon's options that concern it, and ``--config``.

    It gets the whole `webhookd.config.Config` as ``settings``, resolved as the daemon resolves it: the
    command line, the environment, the file, the defaults. One that cannot be used is wrong use.
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
    except ValueError:  # such as a port of letters
        usable = False
    if not usable or not url.isascii() or not url.isprintable() or " " in url:
        raise WrongUse(f"--url: {url!r} is no address such as http://127.0.0.1:3001")
    return url.rstrip("/")


#: Gives a command ``--url``, as the argument ``url``: None, or an address without a slash at its end.
url_option = click.option(
    "--url",
    metavar="URL",
    callback=_checked_url,
    show_default="this machine, as the daemon is configured",
    help="Where it answers.",
)

#: Gives a command ``--source``, as the argument ``source``: a name for `find_source`.
source_option = click.option(
    "--source",
    metavar="NAME",
    default=DEFAULT_SOURCE,
    help="Which Chatwoot installation is meant, if there are several.",
)


def find_source(settings: Config, name: str) -> Source:
    """The source of that name."""
    if name not in settings.sources:
        raise WrongUse(f"there is no source {name!r}, but: {', '.join(settings.sources)}")
    return settings.sources[name]


def secrets_of(source: Source) -> tuple[str, ...]:
    """Its secrets, of which there must be one."""
    if not source.secrets:
        raise WrongUse(
            f"no secret of the source {source.name} is known: set WEBHOOK_SECRET_FILE, or --secret"
        )
    return source.secrets

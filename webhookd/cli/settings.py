"""The daemon's own configuration, for the parts of the command."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from webhookd.config import ALL_OPTIONS, resolve


def configured(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command those of the daemon's options that concern it, and ``--config``.

    It gets the whole L{webhookd.config.Config} as ``settings``, resolved as the daemon resolves it: the
    command line, the environment, the file, the defaults.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(command)
        def call(**arguments: Any) -> Any:
            given = {option.name: arguments.pop(option.name) for option in options}
            given = {name: value for name, value in given.items() if value not in (None, ())}
            return command(settings=resolve(given, os.environ), **arguments)

        for option in reversed(options):
            add = click.option(
                f"--{option.flag}", option.name, help=option.help, metavar="VALUE", multiple=option.repeatable
            )
            call = add(call)
        return call

    options = [option for option in ALL_OPTIONS if option.name in {"config", *names}]
    return decorate

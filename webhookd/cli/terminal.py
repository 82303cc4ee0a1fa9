"""What the parts of the command print, and how they end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click
import msgspec

_Command = TypeVar("_Command", bound=Callable[..., Any])


class Negative(click.ClickException):
    """The answer is no: exit code 1."""

    exit_code = 1


class WrongUse(click.ClickException):
    """The command, or the configuration, cannot be what was meant: exit code 2."""

    exit_code = 2


class Unreachable(click.ClickException):
    """What was asked for cannot be reached or read: exit code 3."""

    exit_code = 3


def json_option(command: _Command) -> _Command:
    """Give a command the flag ``--json``, which it gets as ``as_json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for a program to read.")(command)


def print_json(value: object) -> None:
    """Print a value as JSON, indented."""
    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2))


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows below their headings, each column as wide as its widest cell."""
    lines = [headings, *rows]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    for number, line in enumerate(lines):
        text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        click.echo(click.style(text, bold=True) if number == 0 else text)

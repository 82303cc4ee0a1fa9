"""Output and exit codes of the subcommands."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable, Collection, Sequence
from textwrap import wrap
from typing import Any

import click
import msgspec

from webhookd.text import printable

_MIN_COLUMN = 20
_MAX_BRIEF = 300  # characters; a job id has at most 190
_MAX_FILE_BYTES = 64 * 1024**2


class Negative(click.ClickException):
    """A check that failed: exit code 1."""

    exit_code = 1


class WrongUse(click.ClickException):
    """A usage error, in the command or in the configuration: exit code 2."""

    exit_code = 2


class Unreachable(click.ClickException):
    """A server that cannot be reached, or a file that cannot be read: exit code 3."""

    exit_code = 3


#: Gives a command the flag ``--json``, as the argument ``as_json``.
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


def print_json(value: object) -> None:
    """Print a value as JSON, indented."""
    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2))


def print_table(
    headings: Sequence[str], rows: Sequence[Sequence[str]], numbers: Collection[int] = ()
) -> None:
    """Print rows below their headings, each column as wide as its widest cell.

    The columns at the positions ``numbers`` are aligned right. On a terminal, the last column is wrapped to
    fit.
    """
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    indent = sum(widths[:-1]) + 2 * len(widths[:-1])
    for number, line in enumerate((headings, *rows)):
        *cells, last = [
            cell.rjust(width) if position in numbers else cell.ljust(width)
            for position, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        start = "".join(f"{cell}  " for cell in cells)
        text = (start + f"\n{' ' * indent}".join(_wrapped(last.rstrip(), indent))).rstrip()
        click.echo(click.style(text, bold=True) if number == 0 else text)


def _wrapped(text: str, indent: int) -> Sequence[str]:
    room = shutil.get_terminal_size().columns - indent
    if not sys.stdout.isatty() or room < _MIN_COLUMN:
        return [text]
    return wrap(text, room, break_long_words=False, break_on_hyphens=False) or [""]


def brief(text: str) -> str:
    """Return untrusted text as one line of limited length that cannot control a terminal."""
    return printable(text[:_MAX_BRIEF])[:_MAX_BRIEF]  # an escape is longer than its character


def duration(seconds: int) -> str:
    """Format a duration in the largest unit that gives at least 2."""
    for unit, unit_s in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * unit_s:
            return f"{seconds // unit_s} {unit}"
    return f"{seconds} s"


def read_file(path: str) -> bytes:
    """Return the bytes of a file, or of the standard input if the path is ``-``."""
    try:
        with click.open_file(path, "rb") as file:
            content: bytes = file.read(_MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        raise Unreachable(f"{path}: cannot read the file: {getattr(error, 'strerror', error)}") from None
    if len(content) > _MAX_FILE_BYTES:
        raise Unreachable(f"{path}: more than {_MAX_FILE_BYTES} bytes are not a webhook")
    return content


class Progress:
    """A progress bar on the standard error: only on a terminal, and only after one second."""

    def __init__(self, label: str, length: int, now_s: Callable[[], float]) -> None:
        """``length`` is the amount of work; ``now_s`` is a clock."""
        self._bar: Any = click.progressbar(length=length, label=label, file=sys.stderr)
        self._now_s = now_s
        self._begins_s = now_s() + 1 if sys.stderr.isatty() else math.inf

    def show(self, done: int) -> None:
        """Show that ``done`` of the work is finished."""
        if self._now_s() >= self._begins_s:
            self._bar.update(done - self._bar.pos)

    def end(self, done: int) -> None:
        """Show the last state, and end the bar's line."""
        if self._now_s() >= self._begins_s:
            self.show(done)
            self._bar.render_finish()

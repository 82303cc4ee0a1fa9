"""The command ``webhookd``: a group whose parts are imported when they are asked for."""

from __future__ import annotations

import os
from importlib import import_module

import click

import webhookd

#: The parts, in the order of ``--help``: a module of this package each.
PARTS = ("doctor", "send", "sign", "verify", "spool", "jobs", "health", "config", "completion")


class LazyGroup(click.Group):
    """The parts, each imported when it is asked for: `health` must not wait for what `doctor` needs."""

    def list_commands(self, _context: click.Context) -> list[str]:
        """Their names."""
        return list(PARTS)

    def get_command(self, _context: click.Context, name: str) -> click.Command | None:
        """One of them."""
        if name not in PARTS:
            return None
        command: click.Command = import_module(f"webhookd.cli.{name}").command
        return command


@click.command(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True},
)
@click.version_option(webhookd.__version__, prog_name="webhookd", message="%(prog)s %(version)s")
@click.pass_context
def main(context: click.Context) -> None:
    """Look after webhookd, the daemon that turns Chatwoot's webhooks into BullMQ jobs.

    The daemon itself is started by: twistd -n --pidfile= webhookd

    Exit codes: 0 it is so; 1 it is not; 2 the command is used wrongly; 3 what was asked for cannot be reached
    or read.
    """
    if os.environ.get("NO_COLOR"):
        context.color = False

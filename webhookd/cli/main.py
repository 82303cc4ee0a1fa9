"""The command ``webhookd``: a group that imports each subcommand when it is used."""

from __future__ import annotations

import os
from importlib import import_module

import click

import webhookd

#: The subcommands, in the order of ``--help``. Each is a module of this package.
PARTS = ("doctor", "send", "sign", "verify", "spool", "jobs", "health", "config", "completion")


class LazyGroup(click.Group):
    """A group that imports a subcommand when it is used: ``health`` must not load what ``doctor`` imports."""

    def list_commands(self, _context: click.Context) -> list[str]:
        """Return the names of the subcommands."""
        return list(PARTS)

    def get_command(self, _context: click.Context, name: str) -> click.Command | None:
        """Return one subcommand."""
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
    """Operate webhookd, the daemon that turns Chatwoot's webhooks into BullMQ jobs.

    To start the daemon itself: twistd -n --pidfile= webhookd

    Exit codes: 0 success; 1 check failed; 2 usage error; 3 unreachable or unreadable.
    """
    if os.environ.get("NO_COLOR"):
        context.color = False

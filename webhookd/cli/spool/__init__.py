"""The command ``webhookd spool``: a look at the events on disk, and their rescue."""

from __future__ import annotations

import click

from webhookd.cli.spool import change, drain, read


@click.group(
    commands=[
        read.list_command,
        read.show,
        read.export,
        read.verify,
        drain.drain,
        change.requeue_dead,
        change.purge,
    ]
)
def command() -> None:
    """Look at the events on disk, and rescue them.

    Each replica has its own directory below the spool (--spool, WEBHOOK_SPOOL). A running replica answers
    itself; the directory of a stopped one is locked meanwhile. Use the same configuration as the replicas:
    a spool for another Redis, prefix or queue can be read, but not changed.
    """

"""``webhookd spool``: what waits on disk, and what to do about it."""

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
    """See what waits on disk, and rescue it.

    Each replica has a directory of its own below the spool (--spool, WEBHOOK_SPOOL). It may run or not: a
    running one is asked, a stopped one is locked meanwhile. Give the same configuration that the replicas
    have; what is for another Redis, prefix or queue can be read, and not changed.
    """

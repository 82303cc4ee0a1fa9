"""What the parts of ``webhookd spool`` share: options, the reactor, progress, and how numbers look."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from webhookd.cli.reactor import run
from webhookd.cli.settings import configured
from webhookd.cli.spool.replicas import Replica, Replicas, short_name
from webhookd.cli.terminal import Progress, WrongUse
from webhookd.clock import wall_clock_ms
from webhookd.config import Config
from webhookd.reactor import IReactor
from webhookd.spool.database import SpoolLimits
from webhookd.spool.directory import SpoolRoot
from webhookd.spool.queue import SpoolThread

_T = TypeVar("_T")
_Command = TypeVar("_Command", bound=Callable[..., Any])

spool_options = configured("spool", "redis", "queue", "prefix")


def _replica_option(default: str) -> Callable[[_Command], _Command]:
    help_text = f"How the replica's name begins, or its directory.  [default: {default}]"
    return click.option("--replica", "wanted", metavar="NAME", help=help_text)


one_replica, some_replicas = _replica_option("the only one"), _replica_option("all")


def with_replicas(settings: Config, work: Callable[[Replicas], Coroutine[Any, Any, _T]]) -> _T:
    """Run ``work`` with the reactor, and with the thread in which spools do theirs."""
    if settings.spool is None:
        raise WrongUse("the spool is off")
    root = SpoolRoot(Path(settings.spool).absolute(), settings.destination)
    limits = SpoolLimits(max_bytes=settings.spool_max_bytes)

    async def main(reactor: IReactor) -> _T:
        thread = SpoolThread(reactor)
        thread.start()
        try:
            return await work(Replicas(root, reactor, thread, limits))
        finally:
            thread.stop()

    return run(main)


@contextmanager
def progress(verb: str, replica: Replica, length: int) -> Iterator[Callable[[int], None]]:
    """A progress bar; it gets how much was done since."""
    bar, done = Progress(f"{verb} {short_name(replica.path)[:8]}", length, time.monotonic), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        bar.show(done)

    try:
        yield advance
    finally:
        bar.end(done)


def amount(count: int, noun: str) -> str:
    """A number of things, in words."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def size(size_bytes: int) -> str:
    """A number of bytes, in the largest unit that there is one of."""
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.1f} {unit}"
    return f"{size_bytes} B"


def age_s(at_ms: int) -> int:
    """Whole seconds since a time."""
    return max(0, wall_clock_ms() - at_ms) // 1000

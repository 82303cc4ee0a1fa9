"""Shared by the parts of ``webhookd spool``: options, the reactor, progress, and the format of numbers."""

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
    help_text = "The beginning of the replica's name, or its directory."
    return click.option("--replica", "wanted", metavar="NAME", show_default=default, help=help_text)


one_replica, some_replicas = _replica_option("the only one"), _replica_option("all")


def with_replicas(settings: Config, work: Callable[[Replicas], Coroutine[Any, Any, _T]]) -> _T:
    """Run ``work`` with the reactor and the thread of the spools; return its result."""
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
    """Show a progress bar; yield what advances it."""
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
    """Format a number of things."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def size(size_bytes: int) -> str:
    """Format a number of bytes, in the largest unit that fits."""
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.1f} {unit}"
    return f"{size_bytes} B"


def age_s(at_ms: int) -> int:
    """Return the whole seconds since a time."""
    return max(0, wall_clock_ms() - at_ms) // 1000

"""``webhookd doctor``: check everything around the daemon, and say how to fix it.

The functions ``look_at_…`` gather facts, within a deadline; only they do I/O. A check is a function from
facts to a finding; most parts have a table of their checks: `SERVER`, `QUEUE`, `SPOOL`, `LIMITS`.
"""

from __future__ import annotations

import os
import shutil
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from threading import Thread
from typing import TypeVar

import click
from attrs import asdict

from webhookd.cli.doctor import machine, redis
from webhookd.cli.doctor.findings import Finding, Level, Result, fail, run_checks, skip_checks, skipped, warn
from webhookd.cli.reactor import run
from webhookd.cli.redis import NOT_RUNNING, find_redis
from webhookd.cli.settings import configured
from webhookd.cli.terminal import Negative, json_option, print_json
from webhookd.config import OPTIONS, Config
from webhookd.model import ConfigError, QueueUnavailable
from webhookd.reactor import IReactor
from webhookd.redis.embedded import find_server

_DISK_DEADLINE_S = 10.0
_COLOURS = {Level.OK: "green", Level.WARN: "yellow", Level.FAIL: "red", Level.SKIPPED: "blue"}
_MAX_WIDTH = 100
_INDENT = 24
_T = TypeVar("_T")


@click.command()
@configured(*(option.name for option in OPTIONS))
@click.option("--strict", is_flag=True, help="Exit with 1 for warnings too.")
@json_option
def command(settings: Config, *, strict: bool, as_json: bool) -> None:
    """Check the configuration, Redis, the queues, the spool, the ports and the system.

    Accepts all options of the daemon, and reads the same environment and file. It changes nothing, except
    that it adds one job to a scratch queue in Redis and removes it again.

    Exit codes: 0 no failure; 1 a check failed; 2 the configuration is unusable.
    """
    results = [
        Result("Configuration", "options", machine.options(os.environ)),
        Result("Configuration", "secrets", machine.secrets(settings)),
        *run(lambda reactor: check_redis(reactor, settings)),
        *check_ports(settings),
        *check_spool(settings),
        *run_checks("System", machine.LIMITS, machine.look_at_limits()),
    ]
    levels = Counter(result.finding.level for result in results)
    if as_json:
        checks = [{"part": one.part, "check": one.check, **asdict(one.finding)} for one in results]
        print_json({"levels": {level.value: levels[level] for level in Level}, "checks": checks})
    else:
        _print(results, levels)
    if levels[Level.FAIL] or (strict and levels[Level.WARN]):
        raise click.exceptions.Exit(Negative.exit_code)


# -- the parts that need I/O --------------------------------------------------------------------------------


async def check_redis(reactor: IReactor, settings: Config) -> list[Result]:
    """Check Redis and each queue."""
    url = find_redis(settings)
    if url is None:
        return _no_redis(settings, Result("Redis", "connection", _no_embedded_redis()))
    try:
        facts = await redis.look_at_redis(reactor, settings, url)
    except QueueUnavailable as error:
        return _no_redis(settings, Result("Redis", "connection", redis.no_connection(url, error)))
    results = run_checks("Redis", redis.SERVER, facts)
    for queue in facts.queues:
        results += run_checks(f"Queue {queue.keys.queue}", redis.QUEUE, queue)
    return results


def _no_embedded_redis() -> Finding:
    try:
        find_server()
    except ConfigError as error:
        return fail(str(error), "or set REDIS_URL to your own Redis")
    return warn(NOT_RUNNING, "start webhookd, and run this command in its working directory")


def _no_redis(settings: Config, connection: Result) -> list[Result]:
    why = "needs Redis"
    results = [connection, *skip_checks("Redis", redis.SERVER[1:], why)]
    for keys in settings.queues:
        results += skip_checks(f"Queue {keys.queue}", redis.QUEUE, why)
    return results


def check_ports(settings: Config) -> list[Result]:
    """Check the ports on which the daemon listens."""
    webhooks = machine.look_at_port(settings.endpoint, is_needed=True)
    results = [Result("Ports", "webhooks", machine.port(webhooks))]
    if settings.ops_endpoint is not None:
        ops = machine.look_at_port(settings.ops_endpoint, is_needed=False)
        results.append(Result("Ports", "ops", machine.port(ops)))
    return results


def check_spool(settings: Config) -> list[Result]:
    """Check the spool and its disk."""
    directory = settings.spool
    if directory is None:
        return [Result("Spool", "directory", machine.SPOOL_OFF)]
    facts = _within_deadline(lambda: machine.look_at_spool(directory, settings))
    if isinstance(facts, machine.SpoolFacts):
        return run_checks("Spool", machine.SPOOL, facts)
    reason = f"the disk does not respond within {_DISK_DEADLINE_S:g} s" if facts is None else str(facts)
    finding = fail(f"{directory}: {reason}", "set --spool to a directory on a local disk that works")
    return [Result("Spool", "directory", finding), *skip_checks("Spool", machine.SPOOL[1:], "needs a disk")]


def _within_deadline(look: Callable[[], _T]) -> _T | OSError | None:
    """Return the result or the error of ``look``; None if the disk hangs, which leaves a thread running."""
    outcomes: list[_T | OSError] = []

    def work() -> None:
        try:
            outcomes.append(look())
        except OSError as error:
            outcomes.append(error)

    thread = Thread(target=work, daemon=True)
    thread.start()
    thread.join(_DISK_DEADLINE_S)
    return outcomes[0] if outcomes else None


# -- what is printed ----------------------------------------------------------------------------------------


def _print(results: Sequence[Result], levels: Counter[Level]) -> None:
    for part, of_part in groupby(results, key=lambda result: result.part):
        click.echo(click.style(part, bold=True))
        for result in _merged(of_part):
            _print_result(result)
        click.echo()
    click.echo(", ".join(f"{levels[level]} {_coloured(level)}" for level in Level if levels[level]))


def _merged(results: Iterable[Result]) -> Iterator[Result]:
    """Merge consecutive results that were skipped for the same reason."""
    for finding, group in groupby(results, key=lambda result: result.finding):
        if finding.level is Level.SKIPPED:
            same = list(group)
            yield Result(same[0].part, finding.detail, skipped(", ".join(one.check for one in same)))
        else:
            yield from group


def _print_result(result: Result) -> None:
    finding = result.finding
    head = f"  {_coloured(finding.level)}{' ' * (8 - len(finding.level.value))}{result.check:<{_INDENT - 10}}"
    first, *others = _wrapped(finding.detail)
    click.echo(head + first)
    for line in (*others, *(_wrapped(f"→ {finding.advice}", "  ") if finding.advice else ())):
        click.echo(" " * _INDENT + line)


def _wrapped(text: str, indent: str = "") -> list[str]:
    room = min(shutil.get_terminal_size().columns, _MAX_WIDTH) - _INDENT
    return textwrap.wrap(
        text, max(room, 20), subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _coloured(level: Level) -> str:
    return click.style(level.value, fg=_COLOURS[level])

"""``webhookd send``: send webhooks as Chatwoot does, one or many."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import click
from click.shell_completion import CompletionItem
from twisted.internet.task import LoopingCall

from webhookd.cli.daemon import webhook_url
from webhookd.cli.deliveries import event_numbers, headers, renumbered
from webhookd.cli.histogram import histogram, percentile
from webhookd.cli.reactor import run
from webhookd.cli.sender import Post, Reply, Sender
from webhookd.cli.settings import configured, find_source, source_option, url_option
from webhookd.cli.terminal import (
    Negative,
    Progress,
    Unreachable,
    json_option,
    print_json,
    print_table,
    read_file,
)
from webhookd.config import Config, Source
from webhookd.reactor import IReactor
from webhookd.samples import SAMPLES

_DEADLINE_S = 5.0  # as long as Chatwoot waits
_MAX_REPEAT = 1_000_000
_MAX_WIDTH = 80
_TICK_S = 0.1
_PERCENTS = (50, 90, 95, 99)


def _complete(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the samples that match, and leave files to the shell."""
    names = [CompletionItem(name) for name in SAMPLES if name.startswith(incomplete)]
    return [*names, CompletionItem(incomplete, type="file")]


@click.command()
@click.argument("what", default="message_created", metavar="[SAMPLE | FILE]", shell_complete=_complete)
@click.option("--list", "only_list", is_flag=True, help="List the samples, and send nothing.")
@url_option
@source_option
@configured("port", "interface", "endpoint", "secret", "token")
@click.option(
    "--repeat", type=click.IntRange(1, _MAX_REPEAT), default=1, metavar="N", help="Send N requests."
)
@click.option(
    "--rate",
    type=click.FloatRange(0.1, 10_000),
    metavar="R",
    show_default="each reply starts the next request",
    help="Send R requests a second without waiting for replies.",
)
@click.option(
    "--duplicates",
    type=click.FloatRange(0, 100),
    default=0,
    metavar="PERCENT",
    help="Percentage of requests that repeat the previous one.",
)
@json_option
def command(
    settings: Config,
    what: str,
    url: str | None,
    source: str,
    repeat: int,
    rate: float | None,
    duplicates: float,
    *,
    only_list: bool,
    as_json: bool,
) -> None:
    """Send a sample of Chatwoot's webhooks, or a file.

    The request is signed if a secret is configured, or else carries a token if one is. Each sample, and each
    repetition of a file, gets new ids, so that it becomes a separate job. "-" reads the standard input.

    Exit codes: 0 all were accepted; 1 some were not; 3 no reply.
    """
    if only_list:
        _list_samples(as_json=as_json)
        return
    address = webhook_url(settings, url, source)
    make = _maker(what, find_source(settings, source))
    numbers = list(event_numbers(repeat, duplicates))
    replies, took_s = run(lambda reactor: _send(reactor, address, make, numbers, rate))
    if as_json:
        print_json(_summary(address, replies, took_s))
    elif repeat == 1:
        _print_one(replies[0])
    else:
        _print_many(replies, took_s, rate)
    _judge(address, replies)


def _list_samples(*, as_json: bool) -> None:
    if as_json:
        print_json([{"name": s.name, "sentBy": s.sent_by, "bytes": len(s.body)} for s in SAMPLES.values()])
        return
    rows = [(s.name, s.sent_by, str(len(s.body))) for s in SAMPLES.values()]
    print_table(("SAMPLE", "SENT BY CHATWOOT'S", "BYTES"), rows)


def _maker(what: str, source: Source) -> Callable[[int], Post]:
    """Return a function that makes requests by number. The current microsecond makes the ids of a run new."""
    sample = SAMPLES.get(what)
    body = _read(what) if sample is None else sample.body
    first = time.time_ns() // 1000

    def make(number: int) -> Post:
        is_as_given = sample is None and number == 0
        content = body if is_as_given else renumbered(body, first + number)
        return Post(content, headers(source, content, first + number, int(time.time())))

    return make


def _read(path: str) -> bytes:
    if path != "-" and not Path(path).exists():
        raise Unreachable(f"{path!r} is neither a sample (--list names them) nor a file")
    return read_file(path)


async def _send(
    reactor: IReactor, address: str, make: Callable[[int], Post], numbers: Sequence[int], rate: float | None
) -> tuple[Sequence[Reply], float]:
    """Return all replies, and how many seconds they took."""
    sender = Sender(reactor, address, make, _DEADLINE_S)
    progress = Progress("Sending", len(numbers), reactor.seconds)
    ticks = LoopingCall(lambda: progress.show(len(sender.replies)))
    ticks.start(_TICK_S)
    started_s = reactor.seconds()
    replies = await sender.send(numbers, rate)
    took_s = reactor.seconds() - started_s
    ticks.stop()
    progress.end(len(replies))
    return replies, took_s


# -- what is printed ----------------------------------------------------------------------------------------


def _counts(replies: Iterable[Reply]) -> Sequence[tuple[int | None, str, int]]:
    counts = Counter((reply.status, reply.outcome) for reply in replies)
    return [(status, outcome, count) for (status, outcome), count in counts.most_common()]


def _latencies_ms(replies: Iterable[Reply]) -> Mapping[str, float]:
    ordered = sorted(reply.latency_ms for reply in replies)
    named = {f"p{percent}": percentile(ordered, percent) for percent in _PERCENTS}
    return {name: round(value, 2) for name, value in {**named, "max": ordered[-1]}.items()}


def _summary(address: str, replies: Sequence[Reply], took_s: float) -> Mapping[str, object]:
    return {
        "url": address,
        "requests": len(replies),
        "seconds": round(took_s, 3),
        "answers": [
            {"status": status, "outcome": outcome, "count": count}
            for status, outcome, count in _counts(replies)
        ],
        "latencyMs": _latencies_ms(replies),
        "jobId": replies[0].job_id if len(replies) == 1 else None,
    }


def _print_one(reply: Reply) -> None:
    if reply.is_taken:
        outcome = click.style(f"{reply.status} {reply.outcome}", fg="green")
        click.echo(" ".join(filter(None, [outcome, reply.job_id, f"({reply.latency_ms:.0f} ms)"])))


def _print_many(replies: Sequence[Reply], took_s: float, rate: float | None) -> None:
    rows = [
        (str(count), "-" if status is None else str(status), outcome)
        for status, outcome, count in _counts(replies)
    ]
    print_table(("REQUESTS", "STATUS", "OUTCOME"), rows)
    asked = "" if rate is None else f" of {rate:g} asked for"
    click.echo(f"\n{len(replies)} in {took_s:.1f} s, {len(replies) / took_s:.0f} a second{asked}")
    click.echo("  ".join(f"{name} {value:.1f} ms" for name, value in _latencies_ms(replies).items()) + "\n")
    width = min(_MAX_WIDTH, shutil.get_terminal_size().columns)
    for line in histogram([reply.latency_ms for reply in replies], width):
        click.echo(line)


def _judge(address: str, replies: Sequence[Reply]) -> None:
    refused = [reply for reply in replies if not reply.is_taken]
    if not refused:
        return
    status, outcome, _count = _counts(refused)[0]
    if all(reply.status is None for reply in replies):
        raise Unreachable(f"{address}: {outcome}")
    which = "" if len(replies) == 1 else f"{len(refused)} of {len(replies)} were not accepted: "
    raise Negative(f"{address}: {which}{'' if status is None else f'{status} '}{outcome}")

"""A program that puts a load on a spool and prints its answers, until a test kills it.

    python -m tests.support.crash_spool ROOT FIRST_NUMBER

It appends jobs in groups, and removes some of the oldest from time to time. It prints one line for each step
at once: `acknowledged N`, `removing N`, `removed N`, `refused REASON`.
"""

from __future__ import annotations

import os
import sys
from itertools import count
from pathlib import Path

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater, react

from tests.support.spools import job_number, make_job
from webhookd.model import Receipt, SpoolUnavailable
from webhookd.spool.database import SpoolLimits
from webhookd.spool.directory import SpoolRoot
from webhookd.spool.queue import Spool, Spools, SpoolThread

FINGERPRINT = "to be killed"
GROUP = 10


def say(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


async def append_group(spool: Spool, first: int) -> None:
    def appended(receipt: Receipt) -> None:
        say("acknowledged", receipt.job_id.rpartition(".")[2])

    data = os.urandom(1500)
    appends = [spool.append(make_job(number, data=data)) for number in range(first, first + GROUP)]
    for append in appends:
        append.addCallback(appended)
        try:
            await append
        except SpoolUnavailable as error:
            say("refused", error)


async def remove_some(spool: Spool) -> None:
    try:
        records = await spool.first(GROUP // 2, 1 << 20)
        for record in records:
            say("removing", job_number(record.job))
        await spool.remove([record.sequence for record in records])
        for record in records:
            say("removed", job_number(record.job))
    except SpoolUnavailable as error:
        say("refused", error)


async def run(reactor: IReactorTime, root: str, first: str) -> None:
    thread = SpoolThread(reactor)  # type: ignore[arg-type]
    thread.start()
    spools = Spools(SpoolRoot(Path(root), FINGERPRINT), thread, lambda: 0, SpoolLimits(min_free_bytes=0))
    spool = await spools.open_own()
    for group in count():
        await append_group(spool, int(first) + group * GROUP)
        if group % 3 == 2:
            await remove_some(spool)
        if spool.stats.problem is not None:
            await deferLater(reactor, 0.01)


def main(reactor: IReactorTime, *arguments: str) -> Deferred[None]:
    return Deferred.fromCoroutine(run(reactor, *arguments))


if __name__ == "__main__":
    react(main, sys.argv[1:])

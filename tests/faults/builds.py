"""Builds of webhookd with crash points, or with a defect, that no release has.

A build is a copy of the installed package with a few edits of its source. Each edit must fit exactly once:
an edit that no longer fits ends the run, so that no run silently tests nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from attrs import field, frozen

from tests.support.daemon import installed_twistd


@frozen
class Edit:
    """One edit of one file of the package: ``new`` replaces the only ``old``."""

    file: str
    old: str
    new: str

    def apply(self, package: Path) -> None:
        """Edit the copy."""
        path = package / self.file
        source = path.read_text()
        if source.count(self.old) != 1:
            raise ValueError(f"{self.file} holds {source.count(self.old)} times, not once: {self.old!r}")
        path.write_text(source.replace(self.old, self.new))


@frozen
class Build:
    """A named set of edits, and of modules to add."""

    name: str
    edits: tuple[Edit, ...] = ()
    modules: Mapping[str, str] = field(factory=dict)

    def __add__(self, other: Build) -> Build:
        """Return a build with the edits of both."""
        return Build(
            f"{self.name}, {other.name}", self.edits + other.edits, {**self.modules, **other.modules}
        )

    def make(self, directory: Path) -> Mapping[str, str]:
        """Make the build below a directory; return the environment in which the installed twistd runs it."""
        package = directory / "webhookd"
        shutil.copytree(_installed_package(), package, ignore=shutil.ignore_patterns("__pycache__"))
        for edit in self.edits:
            edit.apply(package)
        for name, source in self.modules.items():
            (package / name).write_text(source)
        return {"PYTHONPATH": str(directory)}


def _installed_package() -> Path:
    environment = installed_twistd().parent.parent
    (package,) = environment.glob("lib/python3*/site-packages/webhookd")
    return package


# -- crash points -------------------------------------------------------------------------------------------

CRASH_AT = "WEBHOOKD_CRASH_AT"
"""The environment variable that selects a crash point: ``NAME:PASSES:SECONDS:ACTION``."""

_CRASH_POINTS = '''\
"""The points at which the fault bench kills the daemon: no release has this module."""

import os
import signal
import time

_name, _passes, _seconds, _action = os.environ.get("WEBHOOKD_CRASH_AT", "nowhere:1:0:die").split(":")
_left = int(_passes)


def point(name):
    """Pass a crash point; at the selected point and pass, wait a little, and die."""
    global _left
    if name == _name:
        _left -= 1
        if _left == 0:
            time.sleep(float(_seconds))
            if _action == "die":
                os.kill(os.getpid(), signal.SIGKILL)
'''


def _pass(name: str) -> str:
    """Return a statement that passes a crash point."""
    return f'__import__("webhookd.crash").crash.point("{name}")'


def _before(file: str, statement: str, name: str) -> Edit:
    return Edit(file, statement, f"{_pass(name)}; {statement}")


CRASH_POINTS = (
    "before verify",
    "after verify",
    "after spool append before fsync",
    "after fsync before ack",
    "after Redis reply before ack",
    "after ack",
)

_COMMIT = 'connection.execute("COMMIT")'
_ANSWER = "        event = receipt.event if receipt.event in EVENTS"

CRASHING = Build(
    "with crash points",
    (
        _before("intake/__init__.py", "source.authenticator.verify(", "before verify"),
        _before("intake/__init__.py", "event = parse(delivery, self.fallback)", "after verify"),
        Edit(
            "spool/database.py",
            _COMMIT,
            f"{_pass('after spool append before fsync')}; {_COMMIT}; {_pass('after fsync before ack')}",
        ),
        _before("redis/queue.py", "self._acknowledged(\n", "after Redis reply before ack"),
        Edit(  # the answer is written within this turn of the reactor
            "web.py",
            _ANSWER,
            "        from twisted.internet import reactor\n"
            f"        reactor.callLater(0.02, lambda: {_pass('after ack')})\n{_ANSWER}",
        ),
    ),
    {"crash.py": _CRASH_POINTS},
)


# -- one defect each ----------------------------------------------------------------------------------------

WITHOUT_MEMORY = Build(
    "without the memory of acknowledged jobs",
    (
        Edit(
            "redis/recent.py",
            "for _, _, jobs in self._batches for job in jobs]",
            "for _, _, jobs in () for job in jobs]",
        ),
    ),
)

ACKNOWLEDGES_EARLY = Build(
    "acknowledges before the commit",
    (
        Edit(
            "delivery.py",
            "        return self._spool.append(job).addCallback(self._note_spooled)",
            "        from twisted.internet.defer import succeed\n"
            "        from webhookd.model import Outcome\n"
            "        self._spool.append(job).addCallback(self._note_spooled)\n"
            "        return succeed(Receipt(Outcome.SPOOLED, job.id, job.name))",
        ),
    ),
)

CHECKS_THEN_ADDS = Build(
    "checks and adds in two calls",
    (
        Edit("bullmq/add_jobs.lua", "  if call('EXISTS', job.lock) == 1 then", "  if false then"),
        Edit("bullmq/add_jobs.lua", "  if found == 'hash' then", "  if false then"),
        Edit("bullmq/add_jobs.lua", "  elseif found ~= 'none' then", "  elseif false then"),
        Edit(
            "redis/queue.py",
            "        settings = self._settings\n        keys, arguments",
            "        settings = self._settings\n"
            "        found = [\n"
            "            await connection.within(\n"
            "                self._deadline_s,\n"
            "                connection.exists(self._keys_of(job.queue).create_lock(job.id)))\n"
            "            for job in jobs\n"
            "        ]\n"
            "        if any(found):\n"
            "            new = [job for job, is_there in zip(jobs, found) if not is_there]\n"
            "            results = iter(await self._add(connection, new) if new else [])\n"
            "            return [AddResult.LOCK_HELD if is_there else next(results) for is_there in found]\n"
            "        keys, arguments",
        ),
    ),
)

LOCKS_FIRST = Build(
    "locks before it adds",
    (
        Edit(
            "bullmq/add_jobs.lua",
            "    push(job)\n  end\n  call('SET', job.lock, lock_value, 'PX', lock_ttl)",
            "    push(job)\n  end",
        ),
        Edit(
            "bullmq/add_jobs.lua",
            "  rehearse_undo(job)\n  call('HMSET'",
            "  call('SET', job.lock, lock_value, 'PX', lock_ttl)\n  rehearse_undo(job)\n  call('HMSET'",
        ),
    ),
)

REUSES_CONNECTIONS = Build(
    "uses a connection again after a deadline",
    (
        Edit(
            "redis/connection.py",
            "            if reason.unknown or reason.kind in ASK_AGAIN:",
            "            if reason.kind is RedisErrorKind.TIMEOUT:\n"
            "                self.replyQueue.waiting.pop(0)  # txredisapi would remember who waited\n"
            "            elif reason.unknown or reason.kind in ASK_AGAIN:",
        ),
    ),
)

_PLAIN = '''\
"""A drain that adds jobs without a check for duplicates."""

from twisted.internet.defer import ensureDeferred
from webhookd.bullmq.keys import QueueKeys
from webhookd.model import QueueUnavailable, RedisErrorKind


def add(sink, job):
    return ensureDeferred(_add(sink, job))


async def _add(sink, job):
    connection = sink._pool.writer
    if connection is None:
        raise QueueUnavailable(RedisErrorKind.DISCONNECTED, "not connected")
    keys = QueueKeys(sink._settings.prefix, job.queue)
    fields = {"name": job.name, "data": job.data, "opts": job.options, "timestamp": str(job.timestamp_ms)}
    await connection.within(5.0, connection.hmset(keys.job(job.id), fields))
    await connection.within(5.0, connection.lpush(keys.wait, job.id))
'''

DRAINS_PLAINLY = Build(
    "drains the spool without the script",
    (
        Edit(
            "delivery.py",
            "self._sink.add(record.job)",
            '__import__("webhookd.plain").plain.add(self._sink, record.job)',
        ),
    ),
    {"plain.py": _PLAIN},
)

LOCKS_FOR_EVER = Build(
    "gives its locks no time to live",
    (Edit("bullmq/add_jobs.lua", "lock_value, 'PX', lock_ttl)", "lock_value)"),),
)

DRAINS_BACKWARDS = Build(
    "drains the spool from its end",
    (Edit("spool/database.py", 'FROM live ORDER BY sequence"', 'FROM live ORDER BY sequence DESC"'),),
)

"""The ledger of a sender: a file with a line before each request, and a line after it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

from attrs import evolve, frozen

from tests.support.process import Resource
from tests.support.webhooks import Webhook, webhook


def event(number: int) -> Webhook:
    """Return the event with a number. Each process makes the same one."""
    return webhook(number)


@frozen
class Attempt:
    """One request. Times are readings of the monotonic clock, which all processes of a machine share.

    ``due_s`` is its time in the schedule. Without an answer, ``status`` is 0, and ``outcome`` is the reason.
    """

    serial: int
    number: int
    port: int
    due_s: float
    sent_s: float
    answered_s: float | None = None
    status: int = 0
    outcome: str = "under way"

    @property
    def key(self) -> str:
        """The id of its job."""
        return event(self.number).job_id

    @property
    def is_acknowledged(self) -> bool:
        """True if its answer says that the event is accepted."""
        return 200 <= self.status < 300

    @property
    def was_given_up(self) -> bool:
        """True if the sender lost patience."""
        return self.outcome == TimeoutError.__name__

    @property
    def latency_s(self) -> float:
        """Seconds from when it was due until its answer, or until the sender gave up."""
        return (self.answered_s or self.sent_s) - self.due_s


class Ledger(Resource):
    """The writer of a ledger. It writes a line before a request is sent, and one after its answer."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", buffering=1)
        self._serial = 0

    def sends(self, number: int, port: int, due_s: float | None = None) -> int:
        """Record that a request will be sent, and return its serial number for `answered`."""
        self._serial += 1
        now_s = time.monotonic()
        due_s = now_s if due_s is None else due_s
        self._file.write(f"sends {self._serial} {number} {port} {due_s:.6f} {now_s:.6f}\n")
        return self._serial

    def answered(self, serial: int, status: int, outcome: str) -> None:
        """Record an answer, or with status 0 the reason why there is none."""
        self._file.write(f"answered {serial} {time.monotonic():.6f} {status} {outcome}\n")

    def close(self) -> None:
        self._file.close()


def read_ledger(path: Path) -> list[Attempt]:
    """Return all attempts of one sender, in the order in which they were sent."""
    attempts: dict[int, Attempt] = {}
    for line in path.read_text().splitlines():
        kind, serial, *fields = line.split(" ", 5)
        if kind == "sends":
            number, port, due_s, sent_s = fields
            attempts[int(serial)] = Attempt(int(serial), int(number), int(port), float(due_s), float(sent_s))
        else:
            answered_s, status, outcome = fields
            attempts[int(serial)] = evolve(
                attempts[int(serial)], answered_s=float(answered_s), status=int(status), outcome=outcome
            )
    return list(attempts.values())


def unanswered(attempts: Iterable[Attempt]) -> list[int]:
    """Return the numbers of the events that have not been acknowledged."""
    open_numbers = dict.fromkeys(attempt.number for attempt in attempts)
    for attempt in attempts:
        if attempt.is_acknowledged:
            open_numbers.pop(attempt.number, None)
    return list(open_numbers)

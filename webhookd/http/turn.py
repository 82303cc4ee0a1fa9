"""One turn of the reactor: what it brings is handled together, at its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

MAX_TOGETHER = 64

_Item = TypeVar("_Item")

_log = Logger()


class EndOfTurn(Generic[_Item]):
    """Takes each of its steps for all that a turn of the reactor brought, before it takes the next step.

    A request needs more code than a processor keeps near, the kernel's too. Where one request after the other
    goes all the way, each finds that the one before it has thrown everything out: that cost a fifth of the
    CPU time under load. Nothing waits longer for it than until the sockets that are ready have been read, and
    no more than `MAX_TOGETHER` wait: what they hold is counted nowhere yet.
    """

    def __init__(self, clock: IReactorTime, *steps: Callable[[_Item], None]) -> None:
        self._clock = clock
        self._steps = steps
        self._items: list[_Item] = []

    def add(self, item: _Item) -> None:
        """Have this item handled with the others of this turn."""
        if not self._items:
            self._clock.callLater(0, self._take_steps)
        self._items.append(item)
        if len(self._items) == MAX_TOGETHER:
            self._take_steps()

    def _take_steps(self) -> None:
        items, self._items = self._items, []
        for step in self._steps:
            for item in items:
                try:
                    step(item)
                except Exception:  # noqa: BLE001  # a defect of ours, which must cost nobody else his answer
                    _log.failure("cannot handle {item!r}", item=item)

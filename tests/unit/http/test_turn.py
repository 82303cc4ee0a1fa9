from __future__ import annotations

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from webhookd.http.turn import MAX_TOGETHER, EndOfTurn


class EndOfTurnTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.done: list[str] = []
        self.turn = EndOfTurn(self.clock, self.first, self.second)

    def first(self, item: str) -> None:
        if item == "bad":
            raise RuntimeError(item)
        self.done.append(f"first {item}")

    def second(self, item: str) -> None:
        self.done.append(f"second {item}")
        if item == "again":
            self.turn.add("later")

    def test_nothing_happens_before_the_end(self) -> None:
        self.turn.add("a")

        self.assertEqual(self.done, [])

    def test_each_step_is_taken_for_all_before_the_next(self) -> None:
        for item in "abc":
            self.turn.add(item)
        self.clock.advance(0)

        self.assertEqual(self.done, ["first a", "first b", "first c", "second a", "second b", "second c"])

    def test_a_crowd_does_not_wait(self) -> None:
        for number in range(MAX_TOGETHER):
            self.turn.add(str(number))
        self.assertEqual(self.done[MAX_TOGETHER - 1 : MAX_TOGETHER + 1], ["first 63", "second 0"])

        self.turn.add("a")
        self.clock.advance(0)
        self.assertEqual(len(self.done), 2 * (MAX_TOGETHER + 1))

    def test_each_is_handled_once(self) -> None:
        self.turn.add("a")
        self.clock.advance(0)
        self.turn.add("b")
        self.clock.advance(0)

        self.assertEqual(self.done, ["first a", "second a", "first b", "second b"])

    def test_what_comes_meanwhile_has_its_own_turn(self) -> None:
        self.turn.add("again")
        self.turn.add("a")
        self.clock.advance(0)

        self.assertEqual(self.done[-2:], ["first later", "second later"])
        self.assertEqual(self.done.index("second a"), 3)

    def test_a_defect_costs_the_others_nothing(self) -> None:
        for item in ("a", "bad", "b"):
            self.turn.add(item)
        self.clock.advance(0)

        self.assertEqual(self.done, ["first a", "first b", "second a", "second bad", "second b"])
        self.assertEqual([str(failure.value) for failure in self.flushLoggedErrors(RuntimeError)], ["bad"])

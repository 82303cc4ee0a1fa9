"""Log lines for people and for machines, from a level up."""

from __future__ import annotations

import json
import sys
from io import StringIO

from twisted.logger import Logger, LogLevel, LogPublisher
from twisted.trial.unittest import SynchronousTestCase

from webhookd.logs import make_observer

LEVELS = ("debug", "info", "warn", "error")


class LogTests(SynchronousTestCase):
    def written(self, log_format: str, log_level: str) -> list[str]:
        """The lines of one message at each level."""
        stdout = StringIO()
        self.patch(sys, "stdout", stdout)
        log = Logger("test", observer=LogPublisher(make_observer(log_format, log_level)))
        for level in LEVELS:
            log.emit(LogLevel.lookupByName(level), "{what} happened", what=level)
        return stdout.getvalue().splitlines()

    def test_text_from_each_level_up(self) -> None:
        for position, level in enumerate(LEVELS):
            with self.subTest(level):
                lines = self.written("text", level)
                self.assertEqual(
                    [line.rpartition("] ")[2] for line in lines],
                    [f"{one} happened" for one in LEVELS[position:]],
                )

    def test_json_from_each_level_up(self) -> None:
        for position, level in enumerate(LEVELS):
            with self.subTest(level):
                events = [json.loads(line) for line in self.written("json", level)]
                self.assertEqual([event["what"] for event in events], list(LEVELS[position:]))

    def test_a_line_break_in_a_value_begins_no_line_that_looks_like_ours(self) -> None:
        stdout = StringIO()
        self.patch(sys, "stdout", stdout)
        for log_format in ("text", "json"):
            log = Logger("test", observer=LogPublisher(make_observer(log_format, "info")))
            log.info("{event}", event="x\n2026-01-01T00:00:00+0000 [webhookd#error] forged")

        for line in stdout.getvalue().splitlines():
            self.assertFalse(line.startswith("2026-01-01T00:00:00+0000"), line)

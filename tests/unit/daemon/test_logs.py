"""Log lines for people and for machines, from a level up, and floods of them."""

from __future__ import annotations

import json
import sys
from datetime import datetime
from errno import ENOSPC
from io import StringIO
from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import maybeDeferred
from twisted.internet.task import Clock
from twisted.logger import (
    ILogObserver,
    LogEvent,
    Logger,
    LogLevel,
    LogPublisher,
    formatEvent,
    globalLogPublisher,
)
from twisted.python import log
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from webhookd.daemon.logs import (
    LINES_OF_A_KIND,
    MAX_KINDS,
    WINDOW_S,
    LogWindows,
    RepeatLimiter,
    json_line,
    make_observer,
    text_line,
)
from webhookd.model import SpoolUnavailable

LEVELS = ("debug", "info", "warn", "error")
NOW_S = 1_788_264_005.1234

VALUES = st.one_of(
    st.text(), st.integers(), st.floats(), st.booleans(), st.none(), st.binary(), st.lists(st.text())
)


def event(log_format: str = "it happened", **fields: Any) -> LogEvent:
    return {
        "log_time": NOW_S,
        "log_level": LogLevel.info,
        "log_namespace": "webhookd.test",
        "log_format": log_format,
        **fields,
    }


def failed(error: Exception) -> Failure:
    """A failure with a traceback from here."""

    def fail() -> None:
        raise error

    failures: list[Failure] = []
    maybeDeferred(fail).addErrback(failures.append)
    return failures[0]


class LevelTests(SynchronousTestCase):
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
                lines = [line.split(maxsplit=1)[1] for line in self.written("text", level)]
                self.assertEqual(lines, [f"{one:5} {one} happened" for one in LEVELS[position:]])

    def test_json_from_each_level_up(self) -> None:
        for position, level in enumerate(LEVELS):
            with self.subTest(level):
                lines = [json.loads(line) for line in self.written("json", level)]
                self.assertEqual([line["what"] for line in lines], list(LEVELS[position:]))
                self.assertEqual([line["level"] for line in lines], list(LEVELS[position:]))


class LineTests(SynchronousTestCase):
    def test_a_line_of_text(self) -> None:
        time, rest = text_line(event("{what} happened", what="much")).split(" ", 1)

        self.assertEqual(rest, "info  much happened\n")
        self.assertEqual(datetime.fromisoformat(time).timestamp(), 1_788_264_005.123)

    def test_a_line_of_json(self) -> None:
        line = json.loads(json_line(event("{status} for {client}", status=401, client="::1", source=None)))

        self.assertEqual(datetime.fromisoformat(line.pop("time")).timestamp(), 1_788_264_005.123)
        self.assertEqual(
            line,
            {
                "level": "info",
                "logger": "webhookd.test",
                "message": "401 for ::1",
                "status": 401,
                "client": "::1",
            },
        )

    def test_no_field_takes_the_place_of_ours(self) -> None:
        line = json.loads(json_line(event("so it was", time=0, level="x", logger="x", message="x")))

        self.assertEqual(
            (line["level"], line["logger"], line["message"]), ("info", "webhookd.test", "so it was")
        )

    def test_a_line_has_an_end(self) -> None:
        line = json.loads(json_line(event("{path}", path="x" * 10_000)))

        self.assertEqual((len(line["path"]), len(line["message"])), (257, 2049))
        self.assertLess(len(text_line(event("{path}", path="x" * 10_000))), 2200)

    @given(st.dictionaries(st.from_regex(r"[a-z_]{1,9}", fullmatch=True), VALUES))
    def test_any_event_is_one_line_of_plain_values(self, fields: dict[str, Any]) -> None:
        fields = {name: value for name, value in fields.items() if not name.startswith("log_")}
        happened = event(" ".join(f"{{{name}}}" for name in fields), **fields)
        text, line = text_line(happened), json_line(happened)

        self.assertTrue(text[:-1].isprintable(), repr(text))
        self.assertTrue(line[:-1].isprintable() and line.isascii(), repr(line))
        for value in json.loads(line, parse_constant=self.fail).values():
            self.assertIsInstance(value, str | int | float)
            self.assertLess(len(str(value)), 5000)

    def test_a_line_break_in_a_value_begins_no_line_that_looks_like_ours(self) -> None:
        forged = event("{what}", what="x\n2026-01-01T00:00:00+0000 error forged\x1b[2J\u2028\u202e")

        self.assertEqual(len(text_line(forged).splitlines()), 1)
        self.assertIn(r"x\n2026-01-01T00:00:00+0000 error forged\x1b[2J\u2028\u202e", text_line(forged))
        self.assertEqual(len(json_line(forged).splitlines()), 1)


class FailureTests(SynchronousTestCase):
    def test_a_failure_of_ours_has_its_text_and_a_traceback(self) -> None:
        failure = failed(SpoolUnavailable("the disk\n2026-01-01 is full"))
        line = json.loads(json_line(event("cannot go on", log_failure=failure)))

        self.assertEqual(line["error"], "SpoolUnavailable: the disk\n2026-01-01 is full")
        self.assertIn("test_logs.py", line["traceback"])
        self.assertEqual(line["message"], "cannot go on")
        first, *others = text_line(event("cannot go on", log_failure=failure)).splitlines()
        self.assertTrue(first.endswith(" cannot go on"))
        self.assertTrue(others and all(other.startswith("\t") for other in others))
        self.assertEqual(others[:2], ["\tSpoolUnavailable: the disk", "\t2026-01-01 is full"])

    def test_what_an_unexpected_error_quotes_is_not_repeated(self) -> None:
        for line_of in (text_line, json_line):
            line = line_of(
                event("cannot go on", log_failure=failed(ValueError("bad number: '+4915550172839'")))
            )
            self.assertIn("ValueError", line)
            self.assertIn("test_logs.py", line)
            self.assertNotIn("+49", line)

    def test_nor_by_twisteds_older_log(self) -> None:
        written: list[LogEvent] = []
        globalLogPublisher.addObserver(cast(ILogObserver, written.append))
        self.addCleanup(globalLogPublisher.removeObserver, cast(ILogObserver, written.append))
        log.err(failed(ValueError("+4915550172839")))  # as TimerService does
        self.flushLoggedErrors(ValueError)

        for line_of in (text_line, json_line):
            line = line_of(written[-1])
            self.assertIn("Unhandled Error", line)
            self.assertIn("test_logs.py", line)
            self.assertNotIn("+49", line)

    def test_a_deep_traceback_is_cut(self) -> None:
        def fall(depth: int) -> None:
            if not depth:
                raise OSError(5, "broken")
            fall(depth - 1)

        try:
            fall(100)
        except OSError:
            line = json.loads(json_line(event(log_failure=Failure())))
        self.assertEqual(len(line["traceback"].splitlines()), 20)
        self.assertIn("broken", line["error"])


class FloodTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.written: list[LogEvent] = []
        self.limiter = RepeatLimiter(cast(ILogObserver, self.written.append))
        self.clock = Clock()
        self.windows = LogWindows(self.clock, self.limiter)
        self.windows.startService()

    def refuse(self, count: int, code: str = "bad_token", source: str = "chatwoot") -> None:
        for number in range(count):
            self.limiter(
                event("refused {code}, {number}", code=code, source=source, number=number, status=401)
            )

    def lines(self) -> list[str]:
        return [formatEvent(one) for one in self.written]

    def test_a_flood_is_counted_and_reported_once(self) -> None:
        self.refuse(1000)
        self.assertEqual(self.lines(), [f"refused bad_token, {number}" for number in range(LINES_OF_A_KIND)])

        self.clock.advance(WINDOW_S)

        self.assertEqual(len(self.written), LINES_OF_A_KIND + 1)
        self.assertEqual(self.lines()[-1], "990 more lines like this one: refused bad_token, 999")
        line = json.loads(json_line(self.written[-1]))
        self.assertEqual(
            (line["repeated"], line["code"], line["source"], line["status"]),
            (990, "bad_token", "chatwoot", 401),
        )
        self.assertNotIn("number", line)

    def test_no_report_when_all_lines_were_written(self) -> None:
        self.refuse(LINES_OF_A_KIND)
        self.clock.advance(WINDOW_S)

        self.assertEqual(len(self.written), LINES_OF_A_KIND)

    def test_the_next_window_counts_from_zero(self) -> None:
        for _ in range(3):
            self.refuse(LINES_OF_A_KIND)
            self.clock.advance(WINDOW_S)

        self.assertEqual(len(self.written), 3 * LINES_OF_A_KIND)

    def test_kinds_do_not_hide_each_other(self) -> None:
        self.refuse(100)
        self.refuse(1, code="too_many")
        self.refuse(1, source="branch")
        self.limiter(event("cannot go on", log_failure=failed(ValueError())))

        self.assertEqual(
            self.lines()[LINES_OF_A_KIND:], ["refused too_many, 0", "refused bad_token, 0", "cannot go on"]
        )

    def test_a_change_of_state_is_always_written(self) -> None:
        for number in range(1000):
            self.limiter(event("the breaker is {state}", state="open" if number % 2 else "closed"))

        self.assertEqual(len(self.written), 1000)

    def test_failures_come_in_floods_too(self) -> None:
        for _ in range(1000):
            self.limiter(event("cannot go on", log_failure=failed(ValueError())))
        self.windows.stopService()

        self.assertEqual(self.lines()[LINES_OF_A_KIND:], ["990 more lines like this one: cannot go on"])
        self.assertNotIn("log_failure", self.written[-1])

    def test_those_of_twisteds_older_log_too(self) -> None:
        for _ in range(1000):
            self.limiter(event("{log_text}", log_text="Unhandled Error", failure=failed(ValueError())))

        self.assertEqual(len(self.written), LINES_OF_A_KIND)

    def test_a_disk_that_is_full_for_a_moment_does_not_end_the_windows(self) -> None:
        is_full = True

        def write(line: LogEvent) -> None:
            if is_full and "repeated" in line:
                raise OSError(ENOSPC, "no space left")
            self.written.append(line)

        self.limiter = RepeatLimiter(cast(ILogObserver, write))
        self.windows = LogWindows(self.clock, self.limiter)
        self.windows.startService()
        self.refuse(11)
        self.clock.advance(WINDOW_S)
        is_full = False
        self.refuse(11)
        self.clock.advance(WINDOW_S)

        self.assertEqual(len(self.written), 2 * LINES_OF_A_KIND + 1)

    def test_made_up_sources_do_not_fill_memory_or_the_log(self) -> None:
        for number in range(10_000):
            self.refuse(1, source=f"source-{number}")
        self.assertEqual(len(self.written), MAX_KINDS + LINES_OF_A_KIND)

        self.clock.advance(WINDOW_S)

        line = json.loads(json_line(self.written[-1]))
        self.assertEqual(line["repeated"], 10_000 - MAX_KINDS - LINES_OF_A_KIND)
        self.assertNotIn("source", line)

    def test_the_last_window_ends_with_the_daemon(self) -> None:
        self.refuse(11)
        self.windows.stopService()

        self.assertEqual(self.written[-1]["repeated"], 1)
        self.assertEqual(self.clock.getDelayedCalls(), [])

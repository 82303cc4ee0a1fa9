"""``python -m tests.faults``: run the rows, and print or write the table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .bench import Result, Row, run
from .report import line_of, write_report
from .rows import ROWS


def _rows(arguments: argparse.Namespace) -> Sequence[Row]:
    if arguments.only:
        return [ROWS[name] for name in arguments.only.split(",")]
    return [row for row in ROWS.values() if row.short or not arguments.short]


def _run(row: Row) -> Result:
    """Run a row. If it is only late, run it again: another program may have used the processors."""
    result = run(row)
    if result.holds and result.is_late:
        print(line_of(result), flush=True)
        return run(row)
    return result


def main() -> int:
    """Run the chosen rows, and return 0 if all hold."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults")
    parser.add_argument("--only", help="names of rows, separated by commas")
    parser.add_argument("--short", action="store_true", help="only the rows that `make test` runs, too")
    arguments = parser.parse_args()
    results: list[Result] = []
    for row in _rows(arguments):
        result = _run(row)
        results.append(result)
        print(line_of(result), flush=True)
        for problem in (*result.problems, *result.too_late):
            print(f"      {problem}", flush=True)
        if result.logs:
            print(result.logs, file=sys.stderr, flush=True)
    if not arguments.only and not arguments.short:
        write_report(results)
    return 0 if all(result.holds and not result.is_late for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())

"""``python -m tests.attack``: runs the sections, prints the table; exits with 0 if all invariants hold."""

from __future__ import annotations

import argparse
import sys

from .sections import ALL, SHORT, table
from .target import Tally


def main() -> int:
    """Run the chosen sections; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.attack")
    parser.add_argument("--only", help="names of sections with commas between them: " + ", ".join(ALL))
    parser.add_argument("--short", action="store_true", help="only the short sections, as the tests do")
    arguments = parser.parse_args()
    sections = SHORT if arguments.short else ALL
    tallies: list[Tally] = []
    for name in arguments.only.split(",") if arguments.only else sections:
        print(f"{name} ...", file=sys.stderr, flush=True)
        tallies += sections[name]()
    print(table(tallies))
    problems = [f"{one.section}: {problem}" for one in tallies for problem in one.problems]
    print("\n".join(problems), file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

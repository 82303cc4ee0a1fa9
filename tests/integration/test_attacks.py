"""A part of the attacks (`tests.attack`). ``make attack`` runs all, and prints the table."""

from __future__ import annotations

import pytest

from tests.attack.sections import SHORT, table


@pytest.mark.slow
@pytest.mark.parametrize("section", SHORT)
def test_attack(section: str) -> None:
    tallies = SHORT[section]()
    print(table(tallies))

    assert [problem for tally in tallies for problem in tally.problems] == []
    assert all(tally.tried for tally in tallies)

"""The fault bench bites: each of these defects shows, and only they do."""

from __future__ import annotations

import pytest

from tests.faults.bench import run
from tests.faults.flaws import FLAWS, Flaw


@pytest.mark.parametrize("flaw", FLAWS, ids=[flaw.name for flaw in FLAWS])
def test_a_flawed_build_is_caught(flaw: Flaw) -> None:
    result = run(flaw.row, build=flaw.build)
    assert any(problem.startswith(flaw.violation) for problem in result.problems), result.problems


@pytest.mark.parametrize("flaw", FLAWS, ids=[flaw.name for flaw in FLAWS])
def test_the_same_build_without_the_flaw_is_not(flaw: Flaw) -> None:
    result = run(flaw.row)
    assert not result.problems, result.logs

"""The fault bench bites: each of these defects shows, and only they do."""

from __future__ import annotations

import pytest

from tests.faults.bench import run_gently
from tests.faults.flaws import FLAWS, Flaw


@pytest.mark.parametrize("flaw", FLAWS, ids=[flaw.name for flaw in FLAWS])
def test_a_flawed_build_is_caught(flaw: Flaw) -> None:
    result = run_gently(flaw.row, build=flaw.build)
    assert any(problem.startswith(flaw.violation) for problem in result.problems), result.problems


_ELSEWHERE = [flaw for flaw in FLAWS if not flaw.row.short]  # test_faults.py runs the others


@pytest.mark.parametrize("flaw", _ELSEWHERE, ids=[flaw.name for flaw in _ELSEWHERE])
def test_the_same_build_without_the_flaw_is_not(flaw: Flaw) -> None:
    result = run_gently(flaw.row)
    assert not result.problems, result.logs

"""The fault bench finds each of these defects, and nothing without them."""

from __future__ import annotations

import pytest

from tests.faults.bench import run_gently
from tests.faults.flaws import FLAWS, Flaw

pytestmark = pytest.mark.slow

NOT_SHORT = [flaw for flaw in FLAWS if not flaw.row.short]
"""The flaws whose row test_faults.py does not run."""


@pytest.mark.parametrize("flaw", FLAWS, ids=[flaw.name for flaw in FLAWS])
def test_a_flawed_build_is_caught(flaw: Flaw) -> None:
    result = run_gently(flaw.row, build=flaw.build)
    assert any(problem.startswith(flaw.violation) for problem in result.problems), result.problems


@pytest.mark.parametrize("flaw", NOT_SHORT, ids=[flaw.name for flaw in NOT_SHORT])
def test_the_same_build_without_the_flaw_is_not(flaw: Flaw) -> None:
    result = run_gently(flaw.row)
    assert not result.problems, result.logs

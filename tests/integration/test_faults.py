"""Some rows of the fault bench, with less load. Only `make faults` runs all rows, and judges times."""

from __future__ import annotations

import pytest

from tests.faults.bench import Row, run_gently
from tests.faults.report import line_of
from tests.faults.rows import ROWS

SHORT = [row for row in ROWS.values() if row.short]


@pytest.mark.parametrize("row", SHORT, ids=[row.name for row in SHORT])
def test_the_invariants_hold(row: Row) -> None:
    result = run_gently(row)
    print(line_of(result))
    assert not result.problems, result.logs

"""Keep unit tests and integration tests in separate runs."""

from __future__ import annotations

from collections.abc import Sequence

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: Sequence[pytest.Item]) -> None:
    """Refuse to run both kinds in one process.

    pytest-twisted starts the reactor, and it keeps running. Trial's test cases run the reactor themselves,
    and fail if it already runs.
    """
    kinds = {item.path.relative_to(config.rootpath).parts[:2] for item in items}
    if len(kinds) > 1:
        raise pytest.UsageError("run `pytest -p no:twisted tests/unit` apart from `pytest tests/integration`")

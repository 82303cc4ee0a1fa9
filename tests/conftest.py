"""Keeps the two kinds of tests apart."""

from __future__ import annotations

from collections.abc import Sequence

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: Sequence[pytest.Item]) -> None:
    """Refuse to run both kinds in one process, and say what to do instead.

    pytest-twisted starts the reactor and leaves it running, and trial's test cases, which turn the reactor
    themselves, fail once it runs.
    """
    kinds = {item.path.relative_to(config.rootpath).parts[:2] for item in items}
    if len(kinds) > 1:
        raise pytest.UsageError("run `pytest -p no:twisted tests/unit` and `pytest tests/integration` apart")

"""A copy of the repository as somebody gets it who clones it."""

from __future__ import annotations

import shutil
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]

_MADE_HERE = shutil.ignore_patterns(
    *(".git", ".venv*", "build", "dist", "*.egg-info", "node_modules", "apidocs", "var", "twistd.pid"),
    *("__pycache__", "dropin.cache", ".*_cache", ".hypothesis", "_trial_temp*"),
)


def copy_repository(path: Path) -> Path:
    """Copy what is in the repository to a new directory, and nothing that was made in it."""
    return Path(shutil.copytree(REPOSITORY, path, ignore=_MADE_HERE))

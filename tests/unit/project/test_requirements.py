"""The lock file has the versions that the tests use, with hashes against tampering."""

from __future__ import annotations

import re
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

REPOSITORY = Path(__file__).parents[3]


def pins(name: str) -> dict[str, str]:
    """Return the version of each package in a requirements file, with the rest of its line."""
    text = (REPOSITORY / name).read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.partition("==") for line in text.splitlines() if not line.startswith(("#", "-"))]
    return {_normal(package): version for package, _, version in lines}


def _normal(package: str) -> str:
    """Return a package's name without its extras, normalised like on PyPI."""
    return re.sub(r"[-_.]+", "-", package.partition("[")[0]).lower()


class RequirementsTests(SynchronousTestCase):
    def test_the_lock_file_has_the_pinned_versions_and_no_others(self) -> None:
        locked = {
            package: version.partition(" --hash")[0].rstrip().replace(" ;", ";")
            for package, version in pins("requirements.lock").items()
        }

        self.assertEqual(locked, pins("requirements.txt"))

    def test_each_package_has_its_hashes(self) -> None:
        for package, version in pins("requirements.lock").items():
            with self.subTest(package):
                self.assertRegex(
                    version, r'^[^ ]+( ; python_full_version < "[0-9.]+")?( +--hash=sha256:[0-9a-f]{64})+$'
                )

"""docs/architecture.md shows the packages as they are."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def shown() -> list[set[str]]:
    """Return the rows of the picture, from top to bottom."""
    return [set(row.replace("│", " ").split()) for row in re.findall(r"^│(.*)│$", PAGE, re.MULTILINE)]


def checked() -> list[set[str]]:
    """Return the layers that import-linter checks, from top to bottom."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = [
        one for one in project["tool"]["importlinter"]["contracts"] if one["containers"] == ["webhookd"]
    ]
    return [set(layer.split(" | ")) for layer in contract["layers"]]


class ArchitectureTests(SynchronousTestCase):
    def test_the_picture_shows_the_layers_of_the_contract(self) -> None:
        self.assertEqual(shown(), checked())

    def test_each_part_is_described(self) -> None:
        described = set(re.findall(r"`([a-z]+)(?:/|\.py)`", PAGE))

        self.assertEqual(set().union(*checked()) - described, set())

    def test_each_module_that_it_names_exists(self) -> None:
        for name in re.findall(r"`([\w/]+\.py)`", PAGE):
            with self.subTest(name):
                self.assertTrue((ROOT / name).exists() or list(ROOT.glob(f"webhookd/**/{name}")))

"""The workflows agree with the package and the Makefile."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from twisted.trial.unittest import SynchronousTestCase

REPOSITORY = Path(__file__).parents[3]


def read(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


def workflow(name: str) -> Any:
    return yaml.safe_load(read(f".github/workflows/{name}.yml"))


class WorkflowTests(SynchronousTestCase):
    def test_each_python_that_the_package_names_is_tested(self) -> None:
        named = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', read("setup.py"))

        self.assertEqual(workflow("ci")["jobs"]["test"]["strategy"]["matrix"]["python"], named)

    def test_each_command_of_make_is_a_target(self) -> None:
        targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
        steps = [
            step
            for name in ("ci", "release")
            for job in workflow(name)["jobs"].values()
            for step in job.get("steps", [])
        ]
        commands = re.findall(
            r"^make ([a-z -]+)$", "\n".join(step.get("run", "") for step in steps), re.MULTILINE
        )

        self.assertEqual(set(" ".join(commands).split()) - targets, set())
        self.assertIn("dist", commands)

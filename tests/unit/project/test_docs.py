"""The docs about the options agree with the options."""

from __future__ import annotations

import re
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from tests.docs import configuration
from webhookd.config import DEFAULT_JOB_OPTIONS, OPTIONS, resolve

ROOT = Path(__file__).parents[3]
SAMPLE = ROOT / "conf" / "webhookd.toml"


class ConfigurationTests(SynchronousTestCase):
    def test_the_reference_is_that_of_the_options(self) -> None:
        self.assertEqual(
            configuration.PAGE.read_text(encoding="utf-8"), configuration.page(), "run `make docs`"
        )

    def test_the_sample_names_every_option_once(self) -> None:
        common, _, _ = SAMPLE.read_text(encoding="utf-8").partition("# [sources.")
        named = re.findall(r"^(?:# )?(?:(\w+) = |\[(\w+)\])", common, re.MULTILINE)

        self.assertEqual(
            sorted(key or table for key, table in named),
            sorted([*DEFAULT_JOB_OPTIONS, *(option.name for option in OPTIONS)]),
        )

    def test_the_sample_changes_nothing(self) -> None:
        self.assertEqual(resolve({"config": str(SAMPLE)}, {}), resolve({}, {}))


class LinkTests(SynchronousTestCase):
    def test_each_link_leads_somewhere(self) -> None:
        for glob in ("*.md", "docs/*.md", "docs/worker/*.md"):
            for page in ROOT.glob(glob):
                for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
                    with self.subTest(f"{page.name}: {target}"):
                        self.assertTrue((page.parent / target).exists())

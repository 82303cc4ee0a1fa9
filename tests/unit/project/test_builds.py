"""The edits that make flawed builds of webhookd still fit its source."""

from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

import webhookd
from tests.bench.observed import UNCOUNTED
from tests.faults import builds

_PACKAGE = Path(webhookd.__file__).parent
_BUILDS = [UNCOUNTED, *(each for each in vars(builds).values() if isinstance(each, builds.Build))]


class Edits(SynchronousTestCase):
    """A run of all faults takes ten minutes, and ends at the first edit that does not fit."""

    def test_each_fits_once(self) -> None:
        """In the file that it names."""
        self.assertGreater(len(_BUILDS), 8)
        for build in _BUILDS:
            for edit in build.edits:
                source = (_PACKAGE / edit.file).read_text()
                self.assertEqual(source.count(edit.old), 1, f"{build.name}: {edit.file}: {edit.old}")

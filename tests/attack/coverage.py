"""Fuzzing by coverage: ``python -m tests.attack.coverage TARGET DIRECTORY… -max_total_time=600``.

The targets are those of `tests.attack.fuzz`; the other options are libFuzzer's. libFuzzer writes useful
inputs to the first directory.
"""

from __future__ import annotations

import sys
from importlib import import_module


def main() -> None:
    """Fuzz until libFuzzer ends the process."""
    atheris = import_module("atheris")
    with atheris.instrument_imports(include=["webhookd"]):
        targets = import_module("tests.attack.fuzz").TARGETS
    name, *rest = sys.argv[1:]
    atheris.Setup([sys.argv[0], *rest], targets[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()

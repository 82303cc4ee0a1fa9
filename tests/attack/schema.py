"""schemathesis compares the daemon with its description, docs/openapi.yaml."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from .target import Tally, Target

DESCRIPTION = Path(__file__).parents[2] / "docs" / "openapi.yaml"


def attack_schema(target: Target, examples: int) -> Tally:
    """Send requests that the description allows or forbids, and compare each answer with it."""
    tally = Tally(f"schemathesis, {examples:,} examples per operation")
    command = [
        *(str(Path(sys.executable).with_name("schemathesis")), "run", str(DESCRIPTION)),
        *("--url", target.daemon.url, "--exclude-path", "/metrics", "--max-examples", str(examples)),
        *("--generation-database", "none", "--no-color"),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=target.redis.directory)
    generated = re.search(r"([0-9]+) generated", ended.stdout)
    tally.tried = int(generated[1]) if generated else 0
    if ended.returncode:
        tally.problems.append(f"{ended.stdout}{ended.stderr}"[-4000:])
    tally.problems += target.problems()
    return tally

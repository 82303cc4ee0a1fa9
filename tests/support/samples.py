"""The sample webhooks: exact request bodies and headers, and the job id that each must get."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

SAMPLES_DIRECTORY = Path(__file__).parents[1] / "samples"


@frozen
class Sample:
    """One request as Chatwoot sends it; its name is that of its file without C{.json}."""

    name: str
    event: str
    body: bytes
    headers: Mapping[str, str]
    job_id: str


_MANIFEST: Mapping[str, Any] = json.loads((SAMPLES_DIRECTORY / "manifest.json").read_bytes())

SECRET: str = _MANIFEST["secret"]
"""What the samples are signed with."""

SIGNED_AT_S = int(_MANIFEST["timestamp"])
"""When the samples were signed, in seconds since the epoch."""


def _sample(name: str, entry: Mapping[str, Any]) -> Sample:
    return Sample(
        name=name,
        event=entry["event"],
        body=(SAMPLES_DIRECTORY / f"{name}.json").read_bytes(),
        headers=entry["headers"],
        job_id=entry["job_id"],
    )


SAMPLES: Mapping[str, Sample] = {name: _sample(name, entry) for name, entry in _MANIFEST["samples"].items()}
"""All samples by name."""

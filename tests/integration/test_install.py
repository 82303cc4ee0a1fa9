"""The built wheel, in a venv that holds nothing else: what a user gets."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support.daemon import installed_twistd


def run_twistd(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the installed twistd to its end, where nothing of the checkout can be imported."""
    return subprocess.run(
        [str(installed_twistd()), *arguments],
        cwd=directory,
        env={"LANG": "C.UTF-8"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def run_python(directory: Path, code: str) -> str:
    """What a program prints that runs in the venv of the installed webhookd."""
    python = installed_twistd().with_name("python")
    return subprocess.run(
        [python, "-c", code], cwd=directory, capture_output=True, text=True, check=True
    ).stdout


def test_twistd_lists_the_command(tmp_path: Path) -> None:
    result = run_twistd(tmp_path, "--help")

    assert result.returncode == 0
    assert "Chatwoot's webhooks, each once, as BullMQ jobs in Redis." in result.stdout


def test_the_command_explains_its_options(tmp_path: Path) -> None:
    result = run_twistd(tmp_path, "webhookd", "--help")

    assert (result.returncode, result.stderr) == (0, "")
    for option in ("--port=", "--redis=", "--queue=", "--lock-ttl="):
        assert option in result.stdout


@pytest.mark.parametrize(
    "wrong",
    [["--no-such-option"], ["--port", "http"], ["--redis", "mysql://localhost"], ["--lock-ttl", "-1"]],
)
def test_a_wrong_option_is_one_line_and_no_traceback(tmp_path: Path, wrong: list[str]) -> None:
    result = run_twistd(tmp_path, "-n", "--pidfile=", "webhookd", *wrong)

    last_line = (result.stdout + result.stderr).strip().splitlines()[-1]
    assert result.returncode != 0
    assert wrong[0].lstrip("-") in last_line
    assert "Traceback" not in result.stdout + result.stderr


def test_the_package_carries_its_script_and_its_types(tmp_path: Path) -> None:
    listing = "import importlib.resources as r; print(*(f.name for f in r.files('webhookd{}').iterdir()))"

    assert "add_jobs.lua" in run_python(tmp_path, listing.format(".bullmq"))
    assert "py.typed" in run_python(tmp_path, listing.format(""))


def test_the_plugin_directory_stays_twisteds_own(tmp_path: Path) -> None:
    """An ``__init__.py`` of ours in twisted/plugins would overwrite Twisted's own."""
    found = run_python(
        tmp_path,
        "from importlib.metadata import files;"
        "print(*sorted(str(f) for f in files('webhookd') if f.match('twisted/plugins/*.py')))",
    )

    assert found.split() == ["twisted/plugins/webhookd_plugin.py"]


def test_installs_nothing_that_it_does_not_declare(tmp_path: Path) -> None:
    """What makes it work is what the wheel declares, and not the packages of the test run."""
    installed = run_python(
        tmp_path, "import importlib.metadata as m; print(*(d.name for d in m.distributions()))"
    )

    assert "webhookd" in installed.split()
    assert "pytest" not in installed.split()

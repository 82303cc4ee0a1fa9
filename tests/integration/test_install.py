"""The built wheel, in a venv with its dependencies and nothing else, and the distributions of a release."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import pytest

from tests.support.daemon import installed_twistd
from tests.support.reader import copy_repository
from webhookd import __version__


def run(directory: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, in a directory from which nothing of the checkout can be imported."""
    return subprocess.run(
        command,
        cwd=directory,
        env={"LANG": "C.UTF-8"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def run_twistd(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the installed twistd to its end."""
    return run(directory, installed_twistd(), *arguments)


def run_python(directory: Path, code: str) -> str:
    """Return the output of a program that runs in the venv of the installed webhookd."""
    return run(directory, installed_twistd().with_name("python"), "-c", code).stdout


def test_twistd_lists_the_command(tmp_path: Path) -> None:
    result = run_twistd(tmp_path, "--help")

    assert result.returncode == 0
    assert "Chatwoot's webhooks, each once, as BullMQ jobs in Redis." in result.stdout


def test_the_command_explains_its_options(tmp_path: Path) -> None:
    result = run_twistd(tmp_path, "webhookd", "--help")

    assert (result.returncode, result.stderr) == (0, "")
    for option in ("--port=", "--redis=", "--queue=", "--lock-ttl="):
        assert option in result.stdout


def test_the_package_carries_its_script_and_its_types(tmp_path: Path) -> None:
    listing = "import importlib.resources as r; print(*(f.name for f in r.files('webhookd{}').iterdir()))"

    assert "add_jobs.lua" in run_python(tmp_path, listing.format(".bullmq"))
    assert "py.typed" in run_python(tmp_path, listing.format(""))


def test_the_plugin_directory_stays_twisteds_own(tmp_path: Path) -> None:
    """An ``__init__.py`` of ours in twisted/plugins would overwrite that of Twisted."""
    found = run_python(
        tmp_path,
        "from importlib.metadata import files;"
        "print(*sorted(str(f) for f in files('webhookd') if f.match('twisted/plugins/*.py')))",
    )

    assert found.split() == ["twisted/plugins/webhookd_plugin.py"]


def test_installs_nothing_that_it_does_not_declare(tmp_path: Path) -> None:
    """The wheel works with the packages that it declares, without those of the test run."""
    installed = run_python(
        tmp_path, "import importlib.metadata as m; print(*(d.name for d in m.distributions()))"
    )

    assert "webhookd" in installed.split()
    assert "pytest" not in installed.split()


# -- the distributions of a release -------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return copy_repository(tmp_path / "copy")


def build(copy: Path) -> tuple[Path, Path]:
    """Build a source distribution, and a wheel from it, as ``make dist`` does."""
    built = run(copy, sys.executable, "-m", "build")
    assert built.returncode == 0, built.stdout + built.stderr
    (source,) = (copy / "dist").glob("*.tar.gz")
    (wheel,) = (copy / "dist").glob("*.whl")
    return source, wheel


def install(distribution: Path, directory: Path) -> Path:
    """Install a distribution in a new venv, with the dependencies of the installed webhookd."""
    venv.create(directory)
    python = directory / "bin" / "python"
    installed = run(
        directory, sys.executable, "-m", "pip", "--python", python, "install", distribution, "--no-deps"
    )
    assert installed.returncode == 0, installed.stdout + installed.stderr
    (packages,) = directory.glob("lib/python*/site-packages")
    (dependencies,) = installed_twistd().parents[1].glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(f"{dependencies}\n")
    return python


@pytest.mark.slow
def test_a_release_is_complete_and_works(copy: Path, tmp_path: Path) -> None:
    """One test, because each build takes seconds."""
    repository = {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()}
    source, wheel = build(copy)

    for tool, *arguments in (("twine", "check", "--strict", source, wheel), ("check_wheel_contents", wheel)):
        checked = run(copy, sys.executable, "-m", tool, *arguments)
        assert checked.returncode == 0, checked.stdout + checked.stderr

    with tarfile.open(source) as archive:
        archived = {name.partition("/")[2] for name in archive.getnames()}
    missing = {name for name in repository - archived if not name.startswith((".ci/", ".github/"))}
    assert missing == {".pre-commit-config.yaml"}

    for distribution in (wheel, source):
        python = install(distribution, tmp_path / f"venv{distribution.suffix}")
        where = run(tmp_path, python, "-c", "import webhookd; print(webhookd.__file__)").stdout
        assert Path(where).is_relative_to(python.parents[1])
        for command in ((python, installed_twistd(), "webhookd"), (python.with_name("webhookd"),)):
            assert run(tmp_path, *command, "--version").stdout.split()[-1] == __version__
            assert run(tmp_path, *command, "--help").returncode == 0
        doctor = run(tmp_path, python.with_name("webhookd"), "doctor", "--redis", "redis://127.0.0.1:1/0")
        assert doctor.returncode == 1
        assert "Connection was refused" in doctor.stdout

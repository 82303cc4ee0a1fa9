"""A page in a real browser: Debian's chromium, which Playwright drives (tests/browser/browser.js)."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from .process import Resource, find_tool, node

_SCRIPT = Path(__file__).parents[1] / "browser" / "browser.js"


class BrowserFailed(Exception):
    """The browser could not carry out a command, or not in time."""


class Browser(Resource):
    """One browser with one page at a time. It ends with the ``with`` block or the test run."""

    def __init__(self) -> None:
        chromium = find_tool("chromium", "it is in Debian's package of that name")
        self._process = subprocess.Popen(
            [node(), str(_SCRIPT), chromium], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self) -> Self:
        self._read()
        return self

    def close(self) -> None:
        self._process.communicate()

    def open(self, url: str, **settings: Any) -> None:
        """Open a page in a new profile. The settings are those of Playwright's ``newContext``."""
        self._do("open", url=url, settings=settings)

    def evaluate(self, script: str) -> Any:
        """Return the value of an expression."""
        return self._do("evaluate", script=script)

    def wait(self, script: str) -> None:
        """Return when an expression is true. Raise `BrowserFailed` if it takes too long."""
        self._do("wait", script=script)

    def prefer(self, **settings: str) -> None:
        """Change the user's preferences. The settings are those of Playwright's ``emulateMedia``."""
        self._do("prefer", settings=settings)

    def press(self, key: str) -> None:
        """Press a key."""
        self._do("press", key=key)

    def screenshot(self, path: Path, **settings: Any) -> None:
        """Save a PNG. The settings are those of Playwright."""
        self._do("screenshot", path=str(path), settings=settings)

    def violations(self) -> Sequence[str]:
        """Return the accessibility problems that axe finds on the page."""
        found: Sequence[str] = self._do("axe")
        return found

    @property
    def errors(self) -> Sequence[str]:
        """The errors and warnings on the page's console."""
        errors: Sequence[str] = self._do("seen")["errors"]
        return errors

    @property
    def requests(self) -> Sequence[str]:
        """The URLs of all requests that the page made."""
        requests: Sequence[str] = self._do("seen")["requests"]
        return requests

    def _do(self, action: str, **options: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"action": action, **options}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise BrowserFailed(f"the browser ended with {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise BrowserFailed(answer["error"])
        return answer["result"]

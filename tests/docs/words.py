"""Find words that make the project's text hard to read, and print what to write instead.

    python -m tests.docs.words

``make lint`` runs it over all tracked text. The words are in ``words.txt``.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
WORDS = Path(__file__).with_name("words.txt")

NOT_CHECKED = [
    "*.png",
    "*.lock",
    "*package-lock.json",
    "webhookd/samples/*.json",
    "tests/attack/corpus",
    "README.pt-BR.md",
    "tests/docs/words.txt",
    "tests/unit/project/test_words.py",
]

_BETWEEN_WORDS = r'[\s#*/"-]+'
"""A phrase may continue on the next line of a comment or a string."""


def _rules() -> list[tuple[re.Pattern[str], str]]:
    """Return the patterns of ``words.txt``, each with its advice."""
    lines = WORDS.read_text(encoding="utf-8").splitlines()
    pairs = [line.split(" => ") for line in lines if line and not line.startswith("#")]
    return [
        (re.compile(rf"(?<!\w)(?:{pattern.replace(' ', _BETWEEN_WORDS)})\b", re.IGNORECASE), advice)
        for pattern, advice in pairs
    ]


RULES = _rules()


def findings(text: str) -> Iterator[str]:
    """Yield line number, phrase and advice for each phrase of a text that breaks a rule."""
    for pattern, advice in RULES:
        for match in pattern.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            yield f"{line}: {' '.join(match[0].split())!r}: write {advice}"


def main() -> None:
    """Check every tracked text file."""
    command = ["git", "ls-files", "--", ".", *(f":!{path}" for path in NOT_CHECKED)]
    listed = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    files = [ROOT / name for name in listed.splitlines()]
    found = [
        f"{file.relative_to(ROOT)}:{finding}"
        for file in files
        if file.exists()
        for finding in findings(file.read_text(encoding="utf-8"))
    ]
    sys.exit("\n".join(found) or None)


if __name__ == "__main__":
    main()

"""What others wrote, made fit for a line of ours."""

from __future__ import annotations


def printable(text: str) -> str:
    """The same without what would move the cursor, begin a line, or turn the direction of writing."""
    if text.isprintable():
        return text
    return "".join([one if one.isprintable() else ascii(one)[1:-1] for one in text])

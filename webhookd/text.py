"""Text from outside, made safe for a line of a log or a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    """Return the text, with each character escaped that would move the cursor, or end or reverse the line."""
    if text.isprintable():
        return text
    return "".join([one if one.isprintable() else ascii(one)[1:-1] for one in text])

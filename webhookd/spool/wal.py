"""Repair of SQLite's write-ahead log: one flipped bit in it would hide every later commit.

Each frame of a WAL (a page as one commit left it) has a checksum over itself and all frames before it. SQLite
reads up to the first wrong checksum, and assumes that a crash tore the rest: a commit that was not
acknowledged. But a commit is on disk before the next one begins. So if two commits follow the wrong checksum,
the first of them was acknowledged, and the cause is damage, not a crash. Then all checksums are computed
again. The records' own checksums, and SQLite's integrity check, find the damage within the pages.

What a crash tore is cut off. SQLite would write over its beginning only: after the next crash, the rest of it
would pass for commits, although it is older than those before it.

The format is that of https://www.sqlite.org/fileformat2.html#walformat.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator

from attrs import frozen

_LITTLE_ENDIAN, _BIG_ENDIAN = 0x377F0682, 0x377F0683  # byte order of the checksums
_VERSION = 3_007_000
_HEADER = struct.Struct(">8I")  # magic, version, page size, number, two salts, two sums
_FRAME = struct.Struct(">6I")  # page number, pages after a commit or else 0, two salts, two sums
_SUMS = struct.Struct(">2I")
_MASK = 0xFFFFFFFF

_Sums = tuple[int, int]


@frozen
class _Frame:
    """One frame of a WAL.

    ``is_current``: it belongs to this log, not to an earlier one in the same file. ``is_good``: its checksum
    is right.
    """

    page: int
    pages_after_commit: int
    is_current: bool
    is_good: bool
    covered: bytes


def repair(wal: bytes) -> tuple[bytes, bool]:
    """Return a WAL that SQLite reads to its end, the last commit, and whether it was damaged."""
    if len(wal) < _HEADER.size:
        return wal, False
    magic, _version, page_bytes, number, *salts, first, second = _HEADER.unpack_from(wal)
    if magic not in (_LITTLE_ENDIAN, _BIG_ENDIAN) or not 512 <= page_bytes <= 65_536:
        return wal, False
    order = "<" if magic == _LITTLE_ENDIAN else ">"
    frames = list(_frames(wal, order, page_bytes, _SUMS.pack(*salts), (first, second)))
    is_head_good = _sum(wal[: _HEADER.size - _SUMS.size], order, (0, 0)) == (first, second)
    bad = (
        next((at for at, frame in enumerate(frames) if not frame.is_good), len(frames)) if is_head_good else 0
    )
    commits = [at for at, frame in enumerate(frames) if frame.is_current and frame.pages_after_commit]
    if sum(at >= bad for at in commits) < 2:
        if not is_head_good:
            return wal, False  # SQLite reads none of it, and does not continue it: nothing is torn here
        whole = max((at + 1 for at in commits if at < bad), default=0)
        return wal[: whole and _HEADER.size + whole * (_FRAME.size + page_bytes)], False
    pages = max(
        (frames[at].pages_after_commit for at in commits if at >= bad and frames[at].is_good), default=0
    )
    kept = [
        frame
        for frame in frames[: commits[-1] + 1]
        if frame.is_good or (frame.is_current and 1 <= frame.page <= pages)
    ]
    head = struct.pack(">6I", magic, _VERSION, page_bytes, number, *salts)
    return b"".join(_sealed(head, kept, order)), True


def _frames(wal: bytes, order: str, page_bytes: int, salts: bytes, before: _Sums) -> Iterator[_Frame]:
    """Yield all frames, each checked against the sums of the one before, so that damage does not spread."""
    for at in range(_HEADER.size, len(wal) - _FRAME.size - page_bytes + 1, _FRAME.size + page_bytes):
        page, pages_after_commit, *_salts, first, second = _FRAME.unpack_from(wal, at)
        covered = wal[at : at + 8] + wal[at + _FRAME.size : at + _FRAME.size + page_bytes]
        is_current = wal[at + 8 : at + 16] == salts
        is_good = is_current and _sum(covered, order, before) == (first, second)
        yield _Frame(page, pages_after_commit, is_current, is_good, covered)
        before = first, second


def _sealed(head: bytes, frames: Iterable[_Frame], order: str) -> Iterator[bytes]:
    """Yield the parts of a WAL, with correct checksums."""
    sums = _sum(head, order, (0, 0))
    yield head + _SUMS.pack(*sums)
    for frame in frames:
        sums = _sum(frame.covered, order, sums)
        yield frame.covered[:8] + head[16:24] + _SUMS.pack(*sums) + frame.covered[8:]


def _sum(data: bytes, order: str, sums: _Sums) -> _Sums:
    first, second = sums
    for one, other in struct.iter_unpack(f"{order}2I", data):
        first = (first + one + second) & _MASK
        second = (second + other + first) & _MASK
    return first, second

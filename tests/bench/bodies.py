"""The requests that are sent: Chatwoot's ``message_created``, of any size, each with a new id."""

from __future__ import annotations

import time
from hmac import digest
from pathlib import Path

from attrs import frozen

from tests.support.webhooks import PATH
from webhookd.samples import SAMPLES, SECRET

ID_MARK = b"@ID@"
SIGNATURE_MARK = b"@SIGNATURE@"
ID_DIGITS = 16
_IDS_OF_A_LOOP = 10**15

_SAMPLE_ID = b'"id":98765,'
_SMALL = (
    b'{"account":{"id":1,"name":"Acme Support"},"content_type":"text","content":"@CONTENT@",'
    b'"conversation":{"id":412,"inbox_id":7,"status":"open"},"created_at":"2026-09-01T12:00:00.179Z",'
    b'"id":@ID@,"inbox":{"id":7,"name":"Website"},"message_type":"incoming","private":false,"event":"message_created"}'
)
_CONTENT_MARK = b"@CONTENT@"
# A mail in HTML, as Chatwoot escapes it.
_FILLER = (
    b'\\u003cp\\u003eWhere is my order #4711? It says \\"delivered\\" \xe2\x80\x94 is it?\\u003c/p\\u003e '
)


def sample_body() -> bytes:
    """Return the sample's 3 kB, with `ID_MARK` for the message's id."""
    before, found, after = SAMPLES["message_created"].body.rpartition(_SAMPLE_ID)
    if not found:
        raise ValueError("the sample's message has another id")
    return before + b'"id":' + ID_MARK + b"," + after


def body_of(size_bytes: int) -> bytes:
    """Return a message of about this size, within one repetition of its text."""
    room = size_bytes - len(_SMALL)
    return _SMALL.replace(_CONTENT_MARK, _FILLER * max(room // len(_FILLER), 1))


def first_id(loop: int = 0) -> int:
    """Return an id above those of all earlier runs: microseconds since 1970; no run sends a million a second.

    The ids of up to seven loops at the same time differ, and JavaScript holds them exactly.
    """
    return time.time_ns() // 1000 + loop * _IDS_OF_A_LOOP


@frozen
class Request:
    """One HTTP request with its marks, and the time of its signatures."""

    path: str
    body: bytes
    timestamp_s: int

    @classmethod
    def of(cls, body: bytes, path: str = PATH) -> Request:
        """Return a request with the current time."""
        return cls(path, body, int(time.time()))

    def template(self) -> bytes:
        """Return the request as Chatwoot sends it, headers in its order."""
        head = (
            f"POST {self.path} HTTP/1.1\r\n"
            "Accept-Encoding: gzip;q=1.0,deflate;q=0.6,identity;q=0.3\r\n"
            "Accept: application/json\r\n"
            "User-Agent: Ruby\r\n"
            "Host: hooks.example.com\r\n"
            "Content-Type: application/json\r\n"
            "X-Chatwoot-Delivery: 587b7988-4119-4eae-865f-daed46efd912\r\n"
            f"X-Chatwoot-Timestamp: {self.timestamp_s}\r\n"
            f"X-Chatwoot-Signature: sha256={SIGNATURE_MARK.decode()}\r\n"
            f"Content-Length: {len(self.body) - len(ID_MARK) + ID_DIGITS}\r\n\r\n"
        )
        return head.encode() + self.body

    def signatures(self, first: int, count: int) -> bytes:
        """Return the signatures of ``count`` bodies, 64 digits each."""
        before, after = self.body.split(ID_MARK)
        before = b"%d.%b" % (self.timestamp_s, before)
        key = SECRET.encode()
        return b"".join(
            digest(key, b"%b%d%b" % (before, number, after), "sha256").hex().encode()
            for number in range(first, first + count)
        )

    def write(self, directory: Path) -> Path:
        """Write the template to a file."""
        path = directory / "request.http"
        path.write_bytes(self.template())
        return path

"""Request boundaries: requests that two parsers could frame in two ways (RFC 9112).

Each case is what one client sends on one connection. Its posts carry messages with the ids 1, 2 and 3. A post
that is hidden in the body of another carries 666, and must never become a job. The last request asks to close
the connection, which marks the end of the answers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

from attrs import frozen

from .nginx import Nginx
from .target import Tally, Target
from .wire import Exchange, exchange

PATH = b"/webhook/chatwoot"
LAST = b"Connection: close\r\n"
SMUGGLED_ID = 666


@frozen
class Case:
    """The bytes to send, the status of each answer without a proxy, and the ids that become jobs.

    ``stays_open`` marks an incomplete request: the client hangs up after it.
    """

    name: str
    data: bytes
    answers: Sequence[int]
    jobs: Sequence[int] = ()
    stays_open: bool = False

    def is_framed_alike(self, jobs: Sequence[int]) -> bool:
        """Return True if these jobs are right with nginx in front.

        nginx refuses some cases. Others it accepts although we do not, and passes them on corrected: then
        only the first request may become a job, and nothing hidden in it.
        """
        return tuple(jobs) in {(), tuple(self.jobs)} or (not self.jobs and tuple(jobs) == (1,))


def message(number: int) -> bytes:
    """Return the body of an event that becomes a job."""
    return b'{"event":"message_created","id":%d,"inbox":{"id":7},"account":{"id":1}}' % number


def head(*lines: bytes, start: bytes = b"POST " + PATH + b" HTTP/1.1", host: bytes = b"Host: h") -> bytes:
    """Return the head of a request; an empty ``host`` leaves that line out."""
    given = [start, *([host] if host else []), b"Content-Type: application/json", *lines]
    return b"\r\n".join([*given, b"", b""])


def length(body: bytes) -> bytes:
    """Return the ``Content-Length`` line of a body."""
    return b"Content-Length: %d" % len(body)


def post(number: int, *lines: bytes, **start: bytes) -> bytes:
    """Return a valid request with these header lines; ``CLOSE`` makes it the last of its connection."""
    body = message(number)
    return head(length(body), *lines, **start) + body


CLOSE = b"Connection: close"
CHUNKED = b"Transfer-Encoding: chunked"
ONE = message(1)
LENGTH = length(ONE)
HIDDEN = post(SMUGGLED_ID, CLOSE)


def chunk(data: bytes, extension: bytes = b"") -> bytes:
    """Return one chunk."""
    return b"%x%b\r\n%b\r\n" % (len(data), extension, data)


END = b"0\r\n\r\n"


def chunked(body: bytes, *lines: bytes) -> bytes:
    """Return a chunked request; ``body`` has the chunks as they are sent."""
    return head(CHUNKED, *lines, CLOSE) + body


def refused(name: str, data: bytes, status: int = 400) -> Case:
    """Return a case with one answer, an error, and no job."""
    return Case(name, data, (status,))


def accepted(name: str, data: bytes, *jobs: int) -> Case:
    """Return a case in which each request is accepted."""
    return Case(name, data, (202,) * len(jobs), jobs)


def unfinished(name: str, data: bytes) -> Case:
    """Return a case that is never complete, and so has no answer."""
    return Case(name, data, (), stays_open=True)


def _both_lengths() -> Iterator[Case]:
    """Yield a length and a coding: a parser that obeys the other one finds the hidden request."""
    whole = chunk(ONE) + END
    yield refused("length, then chunked", head(b"Content-Length: %d" % len(whole), CHUNKED) + whole + HIDDEN)
    yield refused("chunked, then length", head(CHUNKED, b"Content-Length: %d" % len(whole)) + whole + HIDDEN)
    yield refused("length 0 and chunked", head(b"Content-Length: 0", CHUNKED) + chunk(HIDDEN) + END)
    yield refused("length that ends in the coding", head(b"Content-Length: 4", CHUNKED) + END + HIDDEN)
    yield refused(
        "chunks that end before the length",
        head(CHUNKED, b"Content-Length: %d" % (len(END) + len(HIDDEN))) + END + HIDDEN,
    )


def _codings() -> Iterator[Case]:
    """Yield codings other than chunked: the end of such a body is unknown."""
    body = chunk(ONE) + END
    for value in (
        b"identity",
        b"xchunked",
        b"chunkedx",
        b"chunked, identity",
        b"identity, chunked",
        b"chunked, chunked",
        b"gzip",
        b"gzip, chunked",
        b"chunked, gzip",
        b"chunked,",
        b",chunked",
        b"chunked;q=1",
        b'"chunked"',
        b"chunk ed",
        b"chunked\x0b",
        b"\x0bchunked",
        b"chunked\x00",
        b"chunked\xa0",
        b"",
        b"\xefchunked",
    ):
        coding = b"Transfer-Encoding: " + value
        yield refused(f"coding {value!r}", head(coding, CLOSE) + body + HIDDEN)
        yield refused(f"coding {value!r} and a length", head(coding, LENGTH, CLOSE) + ONE + HIDDEN)
    yield accepted("coding in upper case", head(b"TRANSFER-ENCODING: CHUNKED", CLOSE) + body, 1)
    yield accepted("coding after a tab", head(b"Transfer-Encoding:\tchunked", CLOSE) + body, 1)
    yield accepted("coding without a space", head(b"Transfer-Encoding:chunked", CLOSE) + body, 1)
    yield refused("coding before spaces", head(b"Transfer-Encoding: chunked \t ", CLOSE) + body)
    yield refused("coding twice", head(CHUNKED, CHUNKED, CLOSE) + body + HIDDEN)
    yield refused("coding twice, identity first", head(b"Transfer-Encoding: identity", CHUNKED) + body)
    yield refused("coding twice, identity last", head(CHUNKED, b"Transfer-Encoding: identity") + body)
    yield refused("coding, space before the colon", head(b"Transfer-Encoding : chunked") + body + HIDDEN)
    yield refused("coding, tab before the colon", head(b"Transfer-Encoding\t: chunked") + body + HIDDEN)
    yield refused("coding on the next line", head(b"Transfer-Encoding:\r\n chunked") + body + HIDDEN)
    yield refused("coding in HTTP/1.0", head(CHUNKED, start=b"POST " + PATH + b" HTTP/1.0") + body + HIDDEN)
    yield accepted(
        "a name that is not the coding's", head(b"Transfer_Encoding: chunked", LENGTH, CLOSE) + ONE, 1
    )


def _lengths() -> Iterator[Case]:
    """Yield lengths that are not a number, or are two."""
    size = len(ONE)
    for value in (
        b"+%d" % size,
        b"-%d" % size,
        b"0x%x" % size,
        b"%d.0" % size,
        b"%de0" % size,
        b"%d %d" % (size, size),
        b"%d, %d" % (size, size),
        b"%d,%d" % (size, size + 1),
        b"%d;" % size,
        b'"%d"' % size,
        b"",
        b"\xd9\xa1",
        b"%d\x00" % size,
        b"%d\x0b" % size,
        b"18446744073709551616",
        b"18446744073709551617",
        b"9" * 40,
        b"1_0",
        b"NaN",
    ):
        yield refused(f"length {value[:24]!r}", head(b"Content-Length: " + value, CLOSE) + ONE + HIDDEN)
    yield refused("length twice, equal", head(LENGTH, LENGTH, CLOSE) + ONE)
    yield refused("length twice, different", head(LENGTH, b"Content-Length: 5", CLOSE) + ONE + HIDDEN)
    yield refused("length, space before the colon", head(b"Content-Length : %d" % size, CLOSE) + ONE)
    yield refused("length on the next line", head(b"Content-Length:\r\n %d" % size, CLOSE) + ONE)
    yield refused("length above the limit", head(b"Content-Length: 9223372036854775807", CLOSE), 413)
    yield refused("length one byte above the limit", head(b"Content-Length: 16777217", CLOSE), 413)
    yield accepted("length with zeros", head(b"Content-Length: 000%d" % size, CLOSE) + ONE, 1)
    yield accepted("length between spaces", head(b"Content-Length: \t%d \t" % size, CLOSE) + ONE, 1)
    yield refused("length too small", head(b"Content-Length: %d" % (size - 1), CLOSE) + ONE)
    yield unfinished("length too large", head(b"Content-Length: %d" % (size + 1), CLOSE) + ONE)
    yield refused("no length and no body", head(CLOSE))
    yield Case("a body without a length", head() + ONE + HIDDEN, (400, 400))


def _chunks() -> Iterator[Case]:
    """Yield chunks, most of which break RFC 9112, section 7.1."""
    size = len(ONE)
    for value in (
        b"0x%x" % size,
        b"+%x" % size,
        b"-%x" % size,
        b"%x " % size,
        b" %x" % size,
        b"\t%x" % size,
        b"%x\t" % size,
        b"%xg" % size,
        b"%xh" % size,
        b"",
        b"\x00%x" % size,
        b"1%016x" % size,
        b"f" * 40,
        b"%x\xa0" % size,
        b"%x_" % size,
        b"%x," % size,
        b"%x =" % size,
    ):
        yield refused(f"chunk of size {value[:20]!r}", chunked(b"%b\r\n%b\r\n" % (value, ONE) + END + HIDDEN))
    yield accepted("one chunk", chunked(chunk(ONE) + END), 1)
    yield accepted(
        "one chunk per byte", chunked(b"".join(chunk(ONE[i : i + 1]) for i in range(size)) + END), 1
    )
    yield accepted("chunk size in upper case", chunked(b"%X\r\n%b\r\n" % (size, ONE) + END), 1)
    yield accepted("chunk size with zeros", chunked(b"000%x\r\n%b\r\n" % (size, ONE) + b"000" + END), 1)
    yield accepted("chunk extension", chunked(chunk(ONE, b";a=b") + END), 1)
    yield accepted("chunk extension without a value", chunked(chunk(ONE, b";a") + END), 1)
    yield accepted("chunk extension in quotes", chunked(chunk(ONE, b';a="b c"') + END), 1)
    yield accepted("chunk extension, escaped quote", chunked(chunk(ONE, b';a="b\\"c"') + END), 1)
    yield refused("chunk extension with LF", chunked(chunk(ONE, b";a\nb") + END + HIDDEN))
    yield refused("chunk extension with CR", chunked(chunk(ONE, b";a\rb") + END + HIDDEN))
    yield refused("chunk extension with LF in quotes", chunked(chunk(ONE, b';a="b\nc"') + END + HIDDEN))
    yield refused("chunk extension with CR LF in quotes", chunked(chunk(ONE, b';a="b\r\nc"') + END + HIDDEN))
    yield refused("chunk extension, quotes left open", chunked(chunk(ONE, b';a="b') + END + HIDDEN))
    yield refused("chunk extension with NUL", chunked(chunk(ONE, b";a\x00") + END + HIDDEN))
    yield refused("chunk extension after a space", chunked(chunk(ONE, b" ;a=b") + END + HIDDEN))
    yield refused("chunk size ends with LF", chunked(b"%x\n%b\r\n" % (size, ONE) + END + HIDDEN))
    yield refused("chunk size ends with CR", chunked(b"%x\r%b\r\n" % (size, ONE) + END + HIDDEN))
    yield refused("chunk size ends with CR CR LF", chunked(b"%x\r\r\n%b\r\n" % (size, ONE) + END + HIDDEN))
    yield refused("chunk without its CR LF", chunked(b"%x\r\n%b" % (size, ONE) + END + HIDDEN))
    yield refused("chunk with LF after it", chunked(b"%x\r\n%b\n" % (size, ONE) + END + HIDDEN))
    yield refused("chunk with CR after it", chunked(b"%x\r\n%b\r" % (size, ONE) + END + HIDDEN))
    yield refused("chunk with two other bytes after it", chunked(b"%x\r\n%bXX" % (size, ONE) + END + HIDDEN))
    yield refused("chunk longer than it says", chunked(b"%x\r\n%b\r\n" % (size - 1, ONE) + END + HIDDEN))
    yield unfinished("chunk of the largest size", chunked(b"%b\r\n%b" % (b"f" * 16, ONE)))
    yield unfinished("chunk shorter than it says", chunked(b"%x\r\n%b\r\n" % (size + 9, ONE) + END))
    yield refused("last chunk ends with LF", chunked(chunk(ONE) + b"0\n\n" + HIDDEN))
    yield refused("last chunk, LF for the empty line", chunked(chunk(ONE) + b"0\r\n\n" + HIDDEN))
    yield refused("last chunk, CR for the empty line", chunked(chunk(ONE) + b"0\r\n\r" + HIDDEN))
    yield unfinished("no last chunk", chunked(chunk(ONE)))
    yield unfinished("no empty line after the last chunk", chunked(chunk(ONE) + b"0\r\n"))
    last = chunk(ONE) + b"0\r\n"
    yield accepted("trailer", chunked(last + b"X-Sum: 1\r\n\r\n"), 1)
    yield refused("trailer with a length", chunked(last + b"Content-Length: 5\r\n\r\n"))
    yield accepted("trailer with another host", chunked(last + b"Host: other\r\n\r\n"), 1)
    yield refused("trailer with a coding", chunked(last + b"Transfer-Encoding: identity\r\n\r\n"))
    yield refused("trailer that ends with LF", chunked(last + b"X-Sum: 1\n\n" + HIDDEN))
    yield refused("trailer without a colon", chunked(last + b"X-Sum\r\n\r\n" + HIDDEN))
    yield refused("trailer of 300 kB", chunked(last + b"X: " + b"x" * 300_000 + b"\r\n\r\n"), 431)
    yield refused("8,000 trailers", chunked(last + b"X-Trailer-Field: value\r\n" * 8_000 + b"\r\n"), 431)


def _ends_of_lines() -> Iterator[Case]:
    """Yield lines that do not end with CR LF."""
    good = post(1, CLOSE)
    headers, _, body = good.partition(b"\r\n\r\n")
    lines = headers.split(b"\r\n")
    yield refused("LF ends the request line", good.replace(b"\r\n", b"\n", 1))
    yield refused("LF ends a header", good.replace(b"h\r\nContent", b"h\nContent"))
    yield refused("LF ends all lines", b"\n".join([*lines, b"", b""]) + body)
    yield refused("LF for the empty line", headers + b"\r\n\n" + body)
    yield refused("LF LF ends the head", headers + b"\n\n" + body)
    yield refused("CR ends the request line", good.replace(b"\r\n", b"\r", 1))
    yield refused("CR ends a header", good.replace(b"h\r\nContent", b"h\rContent"))
    yield refused("CR for the empty line", headers + b"\r\n\r" + body)
    yield refused("CR CR LF ends a header", good.replace(b"h\r\nContent", b"h\r\r\nContent"))
    yield refused("CR in a value", post(1, b"X: a\rb", CLOSE))
    yield refused("LF in a value, then a header", post(1, b"X: a\nTransfer-Encoding: chunked", CLOSE))
    yield accepted("an empty line before the request", b"\r\n" + good, 1)
    yield refused("a folded line", post(1, b"X: a\r\n b", CLOSE))
    yield refused("a line folded with a tab", post(1, b"X: a\r\n\tb", CLOSE))
    yield refused("a first header that begins with a space", good.replace(b"Host", b" Host"))
    yield refused("a line of spaces in the head", post(1, b"X: a\r\n ", CLOSE))


def _headers() -> Iterator[Case]:
    """Yield invalid header lines."""
    for line in (
        b"X : a",
        b"X\t: a",
        b" X: a",
        b": a",
        b":",
        b"no colon",
        b"X\x00: a",
        b"X: a\x00b",
        b"X: \x01",
        b"X: \x7f",
        b"X: \x1b[31m",
        b"X(y): a",
        b"X/y: a",
        b"X@y: a",
        b'"X": a',
        b"X[]: a",
        b"X{}: a",
        b"X,Y: a",
        b"\xc3\xa9: a",
        b"X\x0b: a",
    ):
        yield refused(f"header {line!r}", post(1, line, CLOSE))
    yield accepted("header without a value", post(1, b"X:", CLOSE), 1)
    yield accepted("header with a value beyond ASCII", post(1, b"X: \xc3\xa9\xff", CLOSE), 1)
    yield accepted("header of all allowed characters", post(1, b"!#$%&'*+-.^_`|~9aZ: a", CLOSE), 1)
    yield accepted("80 headers", post(1, *[b"X-%d: a" % n for n in range(80)], CLOSE), 1)
    yield refused("200 headers", post(1, *[b"X-%d: a" % n for n in range(200)], CLOSE), 431)
    yield refused("a header of 40 kB", post(1, b"X: " + b"x" * 40_000, CLOSE), 431)
    yield refused("a header name of 40 kB", post(1, b"X" * 40_000 + b": a", CLOSE), 431)


def _request_lines() -> Iterator[Case]:
    """Yield invalid request lines."""
    for line in (
        b"POST " + PATH,
        b"POST " + PATH + b" ",
        b"POST " + PATH + b" HTTP/0.9",
        b"POST " + PATH + b" HTTP/2.0",
        b"POST " + PATH + b" HTTP/3.0",
        b"POST " + PATH + b" HTTP/1.2",
        b"POST " + PATH + b" HTTP/1.10",
        b"POST " + PATH + b" HTTP/11.1",
        b"POST " + PATH + b" HTTP/1",
        b"POST " + PATH + b" HTTP/1.",
        b"POST " + PATH + b" HTTP/.1",
        b"POST " + PATH + b" HTTP/1.1 ",
        b"POST " + PATH + b" HTTP/1.1 x",
        b"POST " + PATH + b" HTTP/+1.1",
        b"POST " + PATH + b" http/1.1",
        b"POST " + PATH + b" HTTPS/1.1",
        b"POST " + PATH + b" ICE/1.0",
        b"POST " + PATH + b"\tHTTP/1.1",
        b"POST\t" + PATH + b" HTTP/1.1",
        b"POST" + PATH + b" HTTP/1.1",
        b"POST HTTP/1.1",
        b" POST " + PATH + b" HTTP/1.1",
        b"post " + PATH + b" HTTP/1.1",
        b"PoST " + PATH + b" HTTP/1.1",
        b"NONSENSE " + PATH + b" HTTP/1.1",
        b"P\x00ST " + PATH + b" HTTP/1.1",
        b"POST " + PATH + b"\x00 HTTP/1.1",
        b"POST " + PATH + b"\x01 HTTP/1.1",
        b"POST " + PATH + b"\x7f HTTP/1.1",
        b"POST webhook/chatwoot HTTP/1.1",
        b"POST \\webhook\\chatwoot HTTP/1.1",
        b"POST http:" + PATH + b" HTTP/1.1",
    ):
        yield refused(f"request line {line!r}", post(1, CLOSE, start=line))


def _targets() -> Iterator[Case]:
    """Yield request targets that are valid, or only lead elsewhere."""
    last = {"start": b"POST http://h" + PATH + b" HTTP/1.1"}
    yield accepted("target with scheme and host", post(1, CLOSE, **last), 1)
    yield accepted(
        "target with TLS's scheme", post(1, CLOSE, start=b"POST https://h" + PATH + b" HTTP/1.1"), 1
    )
    yield accepted(
        "target with a scheme in capitals", post(1, CLOSE, start=b"POST HTTP://h" + PATH + b" HTTP/1.1"), 1
    )
    yield accepted("target with a query", post(1, CLOSE, start=b"POST " + PATH + b"?a=%ff&&=&b HTTP/1.1"), 1)
    yield accepted("target with escapes", post(1, CLOSE, start=b"POST /webhook/ch%61twoot HTTP/1.1"), 1)
    for target, status in (
        (b"/", 404),
        (b"/webhook/chatwoot/..%2f..%2fetc", 404),
        (b"/webhook/%00", 404),
        (b"/webhook/chatwoot/%ff", 400),
        (b"/webhook/chatwoot/\xff", 400),
        (b"/webhook/chatwoot/%0d%0aX:%20a", 404),
        (b"ftp://h/webhook/chatwoot", 404),
        (b"/webhook//chatwoot", 404),
        (b"/webhook/chatwoot/unknown", 404),
    ):
        yield refused(f"target {target!r}", post(1, CLOSE, start=b"POST " + target + b" HTTP/1.1"), status)
    yield refused("target of 40 kB", post(1, CLOSE, start=b"POST /" + b"x" * 40_000 + b" HTTP/1.1"), 431)
    yield refused("OPTIONS *", head(CLOSE, start=b"OPTIONS * HTTP/1.1"), 404)
    yield refused("CONNECT", head(start=b"CONNECT h:80 HTTP/1.1") + HIDDEN)
    yield refused("CONNECT to our path", head(start=b"CONNECT " + PATH + b" HTTP/1.1") + HIDDEN)
    yield refused("TRACE", head(CLOSE, start=b"TRACE " + PATH + b" HTTP/1.1"), 405)
    yield refused("a method of another protocol", head(CLOSE, start=b"DESCRIBE " + PATH + b" HTTP/1.1"))
    # llhttp reads RTSP/1.0 as HTTP/1.0.
    yield accepted("another protocol", post(1, CLOSE, start=b"POST " + PATH + b" RTSP/1.0"), 1)
    yield refused(
        "HTTP/2 without asking", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"
    )
    yield refused("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200))
    yield refused("Redis", b"*1\r\n$4\r\nPING\r\n")
    yield refused("SSH", b"SSH-2.0-OpenSSH_9.2\r\n")
    yield refused("an answer", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")


def _hosts() -> Iterator[Case]:
    """Yield Host headers: HTTP/1.1 needs one, HTTP/1.0 at most one (RFC 9112, section 3.2)."""
    old = b"POST " + PATH + b" HTTP/1.0"
    yield refused("no host", post(1, CLOSE, host=b""))
    yield refused("two hosts", post(1, b"Host: h", CLOSE))
    yield refused("two hosts in one line", post(1, CLOSE, host=b"Host: h, i"))
    yield refused("two hosts in HTTP/1.0", post(1, b"Host: i", start=old))
    yield refused("host with a space before the colon", post(1, CLOSE, host=b"Host : h"))
    yield accepted("host without a value", post(1, CLOSE, host=b"Host:"), 1)
    yield accepted("host with a port", post(1, CLOSE, host=b"Host: [::1]:80"), 1)
    yield accepted("no host in HTTP/1.0", post(1, host=b"", start=old), 1)


def _several() -> Iterator[Case]:
    """Yield several requests on one connection, and ways to close it."""
    yield accepted("three at once", post(1) + post(2) + post(3, CLOSE), 1, 2, 3)
    yield accepted(
        "one in chunks between two",
        post(1) + head(CHUNKED) + chunk(message(2)) + END + post(3, CLOSE),
        1,
        2,
        3,
    )
    yield accepted("an empty line between two", post(1) + b"\r\n" + post(2, CLOSE), 1, 2)
    yield Case("one, and one that is not HTTP", post(1) + b"NONSENSE\r\n\r\n" + HIDDEN, (202, 400), (1,))
    yield Case(
        "one, and one with two lengths",
        post(1) + head(LENGTH, b"Content-Length: 1") + HIDDEN,
        (202, 400),
        (1,),
    )
    yield Case(
        "an unknown path between two",
        post(1) + post(2, start=b"POST /x HTTP/1.1") + post(3, CLOSE),
        (202, 404, 202),
        (1, 3),
    )
    yield accepted("more after the last one", post(1, CLOSE) + HIDDEN, 1)
    yield accepted("more after the last one, close in capitals", post(1, b"Connection: CLOSE") + HIDDEN, 1)
    yield accepted(
        "more after the last one, close in a list", post(1, b"Connection: x, close , y") + HIDDEN, 1
    )
    yield accepted(
        "more after the last one, close and keep-alive", post(1, b"Connection: close, keep-alive") + HIDDEN, 1
    )
    yield accepted("more after one of HTTP/1.0", post(1, start=b"POST " + PATH + b" HTTP/1.0") + HIDDEN, 1)
    yield accepted(
        "a length that Connection names as hop-by-hop", post(1, b"Connection: close, Content-Length"), 1
    )
    yield accepted(
        "an upgrade to HTTP/2",
        post(1, b"Connection: Upgrade, HTTP2-Settings, close", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABk"),
        1,
    )
    yield accepted(
        "an upgrade to a websocket, and more",
        post(1, b"Connection: Upgrade, close", b"Upgrade: websocket") + HIDDEN,
        1,
    )
    yield accepted("an unknown expectation", post(1, b"Expect: the-unexpected", CLOSE), 1)
    yield accepted(
        "an expectation in HTTP/1.0",
        post(1, b"Expect: 100-continue", start=b"POST " + PATH + b" HTTP/1.0"),
        1,
    )
    yield accepted("100-continue, and a body at once", post(1, b"Expect: 100-continue", CLOSE), 1)
    yield accepted(
        "100-continue, after another request", post(1) + post(2, b"Expect: 100-continue", CLOSE), 1, 2
    )
    offer = (b"Connection: Upgrade", b"Upgrade: h2c", b"Expect: 100-continue")
    yield accepted(
        "an upgrade to HTTP/2, three times",
        post(1, *offer) + post(2, *offer) + post(3, *offer, CLOSE),
        1,
        2,
        3,
    )
    chunks = head(CHUNKED, *offer) + chunk(message(2)) + END
    yield accepted("an upgrade to HTTP/2, in chunks", post(1, *offer) + chunks + post(3, CLOSE), 1, 2, 3)
    many = post(1, *offer) + post(2, *offer) * 30 + post(3, CLOSE)
    yield Case("an upgrade to HTTP/2, 31 times", many, (202, 202, *[200] * 29, 202), (1, 2, 3))
    live = head(start=b"GET /health/live HTTP/1.1")
    last = head(CLOSE, start=b"GET /health/live HTTP/1.1")
    yield Case("too many at once", live * 200 + last, (*[200] * 32, 429))
    get = head(length(HIDDEN), start=b"GET /health/live HTTP/1.1") + HIDDEN
    yield Case("a GET's body is not a request", get + post(1, CLOSE), (200, 202), (1,))


CASES: Sequence[Case] = [
    *_both_lengths(),
    *_codings(),
    *_lengths(),
    *_chunks(),
    *_ends_of_lines(),
    *_headers(),
    *_request_lines(),
    *_targets(),
    *_hosts(),
    *_several(),
]


def attack_directly(target: Target) -> Tally:
    """Send each case directly to the daemon."""
    tally = Tally("framing, directly")
    for case in CASES:
        exchanged = exchange(target.port, case.data, stays_open=case.stays_open)
        tally.count(case.name, exchanged.answers)
        tally.expect(case.name, "answers", exchanged.statuses, list(case.answers))
        tally.expect(case.name, "bytes after the answers", exchanged.rest, b"")
        tally.expect(case.name, "jobs", target.job_ids(), list(case.jobs))
    tally.problems += target.problems()
    return tally


def attack_through_nginx(target: Target) -> Tally:
    """Send each case through nginx, which must refuse it, or frame it as we do."""
    tally = Tally("framing, through nginx")
    with ExitStack() as stack:
        nginx = stack.enter_context(Nginx(target.port))
        for case in CASES:
            exchanged = exchange(nginx.port, case.data, stays_open=case.stays_open)
            _judge(tally, case, exchanged, nginx, target.job_ids())
    tally.problems += target.problems()
    return tally


def _judge(tally: Tally, case: Case, exchanged: Exchange, nginx: Nginx, jobs: Sequence[int]) -> None:
    seen = nginx.seen(max(len(exchanged.statuses), 0))
    tally.count(case.name, [one for one in exchanged.answers if _is_from_the_daemon(one.body)])
    answered = [one.status for one in seen if one.status not in (400, 499) or exchanged.statuses]
    tally.expect(case.name, "one answer for each request that nginx saw", exchanged.statuses, answered)
    taken = [one.by_daemon for one in seen if one.by_daemon == 202]
    tally.expect(case.name, "one job for each accepted request", len(jobs), len(taken))
    tally.expect(case.name, f"jobs {list(jobs)}, framed alike", case.is_framed_alike(jobs), wanted=True)


def _is_from_the_daemon(body: bytes) -> bool:
    try:
        json.loads(body)
    except ValueError:
        return False  # nginx's own refusals are HTML
    return True

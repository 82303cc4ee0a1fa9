"""The HTTP edge: framing, limits while bytes arrive, rejections, the access log, and the shutdown."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import LogEvent, LogLevel, capturedLogs, formatEvent
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.iweb import IRequest
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET

from tests.support.http import Response
from tests.support.web_client import MemoryClient
from webhookd.http import WebhookRequest, WebhookSite
from webhookd.http.answers import json_response
from webhookd.http.channel import (
    BODY_DEADLINE_S,
    HEAD_DEADLINE_S,
    IDLE_TIMEOUT_S,
    LINGER_S,
    MAX_HEAD_BYTES,
    MAX_HEADERS,
    WRITE_DEADLINE_S,
)
from webhookd.http.request import request_id

MAX_BODY_BYTES = 100
HEAD = b"POST /x HTTP/1.1\r\nHost: h\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


def with_length(length: int) -> bytes:
    return HEAD + b"Content-Length: %d\r\n\r\n" % length


def post(body: bytes = b"{}") -> bytes:
    return with_length(len(body)) + body


class Echo(Resource):
    """Remembers each request's body, and sends it back, at once or when the test calls `answer`."""

    isLeaf = True

    def __init__(self) -> None:
        super().__init__()
        self.bodies: list[bytes] = []
        self.paths: list[bytes] = []
        self.headers: list[Mapping[bytes, bytes]] = []
        self.waiting: list[WebhookRequest] = []
        self.is_slow = False

    def render(self, request: IRequest) -> int:
        assert isinstance(request, WebhookRequest)
        self.bodies.append(request.body)
        self.paths.append(request.path)
        self.headers.append(request.fields)
        self.waiting.append(request)
        if not self.is_slow:
            self.answer()
        return NOT_DONE_YET

    def answer(self) -> None:
        """Answer the next request that waits."""
        request = self.waiting.pop(0)
        request.setHeader(b"Content-Length", b"%d" % len(request.body))
        request.write(request.body)
        request.finish()


class SiteCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.echo = Echo()
        self.site = self.make_site()

    def make_site(
        self, *, access_log: bool = False, max_body_bytes: int = MAX_BODY_BYTES, **limits: Any
    ) -> WebhookSite:
        site = WebhookSite(
            self.echo, self.clock, max_body_bytes=max_body_bytes, access_log=access_log, **limits
        )
        site.startFactory()
        return site

    def pass_time(self, seconds: float) -> None:
        """Let a deadline pass, and the next sweep."""
        self.clock.pump([1.0] * int(seconds + 2) + [0.0])

    def connect(self) -> MemoryClient:
        return MemoryClient(self.site, self.clock)

    def assert_refused(
        self, client: MemoryClient, status: int, code: str, response: Response | None = None
    ) -> None:
        """The answer is an error and the last one, and we close although the client does not."""
        response = response or client.response()
        self.assertEqual((response.status, json.loads(response.body)["error"]["code"]), (status, code))
        self.assertEqual(response.headers["connection"], "close")
        self.assertEqual(response.headers["content-type"], "application/json")
        self.assertEqual(client.received, b"")
        self.assertTrue(client.transport.is_write_closed)
        self.assertFalse(client.transport.is_closed)
        self.pass_time(LINGER_S)
        self.assertTrue(client.transport.is_closed)
        self.assertEqual(self.site.state.channels, set())


class RequestTests(SiteCase):
    def test_keep_alive(self) -> None:
        client = self.connect()
        for number in range(3):
            body = b"%d" % number
            client.send(post(body))
            response = client.response()
            self.assertEqual((response.status, response.body), (200, body))
            self.assertNotIn("connection", response.headers)
        self.assertFalse(client.transport.disconnecting)

    def test_a_client_that_wants_the_connection_closed(self) -> None:
        client = self.connect()
        client.send(b"POST /x HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Length: 1\r\n\r\n1")

        self.assertEqual(client.response().headers["connection"], "close")
        self.assertTrue(client.transport.is_closed)

    def test_requests_in_one_read_are_answered_in_order_and_one_after_another(self) -> None:
        self.echo.is_slow = True
        client = self.connect()
        client.send(post(b"1") + post(b"22") + post(b"333"))
        self.assertEqual(self.echo.bodies, [b"1"])

        for number in (1, 2, 3):
            self.echo.answer()
            client.turn()
            self.assertEqual(len(self.echo.bodies), min(number + 1, 3))

        self.assertEqual([client.response().body for _ in range(3)], [b"1", b"22", b"333"])
        self.assertFalse(client.transport.disconnecting)

    def test_requests_byte_by_byte(self) -> None:
        client = self.connect()
        client.send(post(b"1") + post(b"22"), piece_bytes=1)

        self.assertEqual([client.response().body, client.response().body], [b"1", b"22"])

    def test_a_client_that_waits_for_100_continue(self) -> None:
        client = self.connect()
        client.send(HEAD + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n")
        self.assertEqual(client.response().status, 100)

        client.send(b"{}")

        self.assertEqual(client.response().body, b"{}")

    def test_a_request_target_with_a_host(self) -> None:
        client = self.connect()
        for target, path in (
            (b"http://h/a/b?c", b"/a/b"),
            (b"HTTP://h:80/", b"/"),
            (b"http://h", b"/"),
        ):
            client.send(b"GET %b HTTP/1.1\r\nHost: h\r\n\r\n" % target)
            client.response()
            self.assertEqual(self.echo.paths[-1], path)

    def test_http_1_0(self) -> None:
        client = self.connect()
        client.send(b"POST /x HTTP/1.0\r\nContent-Length: 1\r\n\r\n1")

        self.assertEqual(client.response().body, b"1")
        self.assertTrue(client.transport.is_closed)

    def test_a_header_that_comes_twice_is_one(self) -> None:
        client = self.connect()
        client.send(b"GET /x HTTP/1.1\r\nHost: h\r\nX-A: 1\r\nx-a: 2\r\n\r\n")

        self.assertEqual(self.echo.headers[-1][b"x-a"], b"1, 2")

    def test_a_trailer_is_no_header(self) -> None:
        client = self.connect()
        client.send(CHUNKED + b"1\r\n1\r\n0\r\nX-Chatwoot-Signature: x\r\n\r\n")

        self.assertEqual(client.response().body, b"1")
        self.assertNotIn(b"x-chatwoot-signature", self.echo.headers[-1])

    def test_an_offer_of_another_protocol_is_declined(self) -> None:
        offer = b"Connection: Upgrade\r\nUpgrade: h2c\r\n"
        for piece_bytes in (None, 1):
            client = self.connect()
            client.send(HEAD + offer + b"Content-Length: 1\r\n\r\n1" + post(b"22"), piece_bytes)

            self.assertEqual([client.response().body, client.response().body], [b"1", b"22"])
            self.assertFalse(client.transport.disconnecting)
        self.assertNotIn(b"upgrade", self.echo.headers[0])


class FlowTests(SiteCase):
    def test_nothing_is_read_while_a_request_waits_for_another(self) -> None:
        self.echo.is_slow = True
        client = self.connect()
        client.send(post(b"1"))
        self.assertFalse(client.transport.is_paused)
        client.send(post(b"2"))
        self.assertTrue(client.transport.is_paused)

        self.echo.answer()
        client.turn()

        self.assertFalse(client.transport.is_paused)
        self.assertEqual(self.echo.bodies, [b"1", b"2"])

    def test_a_request_whose_client_is_gone_in_the_same_turn_is_not_rendered(self) -> None:
        client = self.connect()
        client.transport.protocol.dataReceived(post())
        client.hang_up()
        self.clock.advance(0)

        self.assertEqual(self.echo.bodies, [])
        self.assertEqual(self.site.state.channels, set())

    def test_a_client_that_does_not_read_its_answers_gets_no_more_of_them(self) -> None:
        client = self.connect()
        client.transport.protocol.pauseProducing()
        client.send(post(b"1"))
        self.assertEqual(self.echo.bodies, [])

        client.transport.protocol.resumeProducing()
        client.turn()

        self.assertEqual(client.response().body, b"1")

    def test_a_client_that_reads_again_may_wait_for_its_answer(self) -> None:
        self.echo.is_slow = True
        client = self.connect()
        client.send(post(b"1"))
        client.transport.protocol.pauseProducing()
        client.transport.protocol.resumeProducing()
        self.pass_time(IDLE_TIMEOUT_S)

        self.echo.answer()

        self.assertEqual(client.response().body, b"1")

    def test_a_client_that_never_reads_its_answers_is_aborted(self) -> None:
        client = self.connect()
        client.send(post(b"1"))
        client.transport.protocol.pauseProducing()
        self.pass_time(WRITE_DEADLINE_S)

        self.assertTrue(client.transport.is_aborted)


class DeadlineTests(SiteCase):
    def test_a_client_that_sends_nothing_at_first(self) -> None:
        client = self.connect()
        self.pass_time(HEAD_DEADLINE_S)

        self.assertTrue(client.transport.is_closed)
        self.assertEqual(client.received, b"")

    def test_a_client_that_is_idle(self) -> None:
        client = self.connect()
        client.send(post())
        client.response()
        self.pass_time(IDLE_TIMEOUT_S - 4)
        self.assertFalse(client.transport.disconnecting)

        self.pass_time(4)

        self.assertTrue(client.transport.is_closed)
        self.assertEqual(client.received, b"")

    def test_a_head_that_arrives_byte_by_byte(self) -> None:
        client = self.connect()
        for byte in b"POST /" + 100 * b"x":
            client.send(bytes([byte]))
            self.clock.advance(1)
            if client.received:
                break

        self.assert_refused(client, 408, "too_slow")

    def test_a_body_that_arrives_byte_by_byte(self) -> None:
        client = self.connect()
        client.send(with_length(MAX_BODY_BYTES))
        for _ in range(int(HEAD_DEADLINE_S) + 2):
            client.send(b"x")
            self.clock.advance(1)
        self.assertEqual(client.received, b"")
        for _ in range(int(BODY_DEADLINE_S)):
            client.send(b"x")
            self.clock.advance(1)
            if client.received:
                break

        self.assert_refused(client, 408, "too_slow")
        self.assertEqual(self.echo.bodies, [])

    def test_a_request_under_way_has_no_deadline_here(self) -> None:
        self.echo.is_slow = True
        client = self.connect()
        client.send(post())
        self.pass_time(3 * IDLE_TIMEOUT_S)
        self.assertFalse(client.transport.disconnecting)

        self.echo.answer()

        self.assertEqual(client.response().status, 200)


class BodyLimitTests(SiteCase):
    def test_the_largest_body(self) -> None:
        body = MAX_BODY_BYTES * b"x"
        for request in (post(body), CHUNKED + b"64\r\n" + body + b"\r\n0\r\n\r\n"):
            for piece_bytes in (None, 1):
                client = self.connect()
                client.send(request, piece_bytes)
                self.assertEqual(client.response().body, body)

    def test_a_head_that_announces_more_is_enough(self) -> None:
        for length in (MAX_BODY_BYTES + 1, 10**18):
            with self.subTest(length):
                client = self.connect()
                client.send(with_length(length))
                self.assert_refused(client, 413, "too_large")
        self.assertEqual(self.echo.bodies, [])

    def test_a_client_that_waits_for_100_continue_gets_413(self) -> None:
        client = self.connect()
        client.send(HEAD + b"Expect: 100-continue\r\nContent-Length: 101\r\n\r\n")

        self.assert_refused(client, 413, "too_large")

    def test_chunks_are_counted_as_they_arrive(self) -> None:
        client = self.connect()
        client.send(CHUNKED + b"32\r\n" + 50 * b"x" + b"\r\n32\r\n" + 50 * b"x" + b"\r\n")
        self.assertEqual(client.received, b"")

        client.send(b"1\r\nx")

        self.assert_refused(client, 413, "too_large")
        self.assertEqual(self.echo.bodies, [])

    def test_a_chunk_is_refused_before_it_is_complete(self) -> None:
        client = self.connect()
        client.send(CHUNKED + b"ffffffff\r\n" + 101 * b"x")

        self.assert_refused(client, 413, "too_large")

    def test_the_rest_is_read_and_discarded(self) -> None:
        client = self.connect()
        client.send(with_length(500))
        response = client.response()
        client.send(500 * b"x")
        client.send(post() + CHUNKED + b"0\r\n\r\n")

        self.assert_refused(client, 413, "too_large", response)
        self.assertEqual(self.echo.bodies, [])

    def test_nothing_that_follows_a_rejected_request_becomes_a_request(self) -> None:
        for refused in (
            with_length(500) + 500 * b"x",
            with_length(500),
            CHUNKED + b"65\r\n" + 101 * b"x" + b"\r\n0\r\n\r\n",
            CHUNKED + 3 * (b"32\r\n" + 50 * b"x" + b"\r\n") + b"0\r\n\r\n",
        ):
            for piece_bytes in (None, 1, 7):
                with self.subTest(f"{refused[:80]!r} {piece_bytes}"):
                    client = self.connect()
                    client.send(refused + post(b"smuggled"), piece_bytes)
                    self.assert_refused(client, 413, "too_large")
        self.assertEqual(self.echo.bodies, [])

    def test_a_request_before_the_rejected_one_is_answered_first(self) -> None:
        client = self.connect()
        client.send(post(b"1") + with_length(500))

        self.assertEqual(client.response().body, b"1")
        self.assert_refused(client, 413, "too_large")

    def test_a_client_that_hangs_up_before_we_close(self) -> None:
        client = self.connect()
        client.send(with_length(500))
        client.hang_up()

        self.assertEqual(self.site.state.channels, set())
        self.pass_time(LINGER_S)
        self.assertFalse(client.transport.is_aborted)


class CrowdTests(SiteCase):
    """The limit of all arriving bodies."""

    def test_of_the_bodies_that_arrive_the_largest_gives_way(self) -> None:
        self.site = self.make_site(max_arriving_bytes=100)
        large, small, newest = self.connect(), self.connect(), self.connect()
        large.send(with_length(100) + 60 * b"x")
        small.send(with_length(40) + 30 * b"x")
        self.assertEqual(self.site.state.arriving_bytes, 90)

        newest.send(with_length(20) + 19 * b"x")

        self.assertEqual(self.site.state.arriving_bytes, 49)
        for client in (small, newest):
            client.send(10 * b"x" if client is small else b"x")
            self.assertEqual(client.response().status, 200)
        self.assertEqual(self.site.state.arriving_bytes, 0)
        self.assertEqual(large.response().headers["retry-after"], "3")
        self.assertEqual(len(self.echo.bodies), 2)

    def test_the_one_that_sends_can_be_the_largest(self) -> None:
        self.site = self.make_site(max_arriving_bytes=100)
        small, large = self.connect(), self.connect()
        small.send(with_length(40) + 39 * b"x")
        large.send(with_length(90) + 80 * b"x")
        large.send(10 * b"x" + post(b"smuggled"))

        self.assertEqual(large.response().status, 429)
        self.assertEqual(large.received, b"")
        small.send(b"x")
        self.assertEqual(small.response().status, 200)
        self.assertEqual(len(self.echo.bodies), 1)


class BadRequestTests(SiteCase):
    def assert_all_refused(self, status: int, code: str, *requests: bytes) -> None:
        for request in requests:
            for piece_bytes in (None, 1):
                with self.subTest(f"{request[:80]!r} {piece_bytes}"):
                    client = self.connect()
                    client.send(request + post(b"smuggled"), piece_bytes)
                    self.assert_refused(client, status, code)
        self.assertEqual(self.echo.bodies, [])
        self.assertEqual(self.flushLoggedErrors(), [])

    def test_what_is_not_http(self) -> None:
        self.assert_all_refused(
            400,
            "bad_request",
            b"hello\r\n",
            b"GET /\r\n",
            b"GET / HTTP/2.0\r\n\r\n",
            b"GET / HTTP/1.1 x\r\n",
            b"G\x00T / HTTP/1.1\r\n",
            b"get / HTTP/1.1\r\n",
            b"GET /\x1b[31m HTTP/1.1\r\n",
            b"GET /\x80 HTTP/1.1\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n",  # a TLS client
            b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
            b"GET / HTTP/1.1\r\nname : value\r\n\r\n",
            b"GET / HTTP/1.1\r\nname: va\x00lue\r\n\r\n",
        )

    def test_a_length_that_two_parsers_could_read_in_two_ways(self) -> None:
        self.assert_all_refused(
            400,
            "bad_request",
            HEAD + b"Content-Length: x\r\n\r\n",
            HEAD + b"Content-Length: +5\r\n\r\n",
            HEAD + b"Content-Length: -1\r\n\r\n",
            HEAD + b"Content-Length: 0x5\r\n\r\n",
            HEAD + b"Content-Length: 5, 5\r\n\r\n",
            HEAD + b"Content-Length: %b\r\n\r\n" % (5000 * b"9"),
            HEAD + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}",
            HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n",
            HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n",
            HEAD + b"Transfer-Encoding: gzip\r\n\r\n",
            HEAD + b"Transfer-Encoding: chunked, identity\r\n\r\n",
            HEAD + b"Transfer-Encoding: xchunked\r\n\r\n",
            CHUNKED + b"x\r\n",
            CHUNKED + b"0x2\r\n{}\r\n",
            CHUNKED + b"-1\r\n",
            CHUNKED + b"2\r\n{}x\r\n",
        )

    def test_a_host_that_is_missing_or_comes_twice(self) -> None:
        self.assert_all_refused(
            400,
            "bad_host",
            b"GET / HTTP/1.1\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        )

    def test_a_head_that_does_not_end(self) -> None:
        self.assert_all_refused(
            431,
            "head_too_large",
            b"GET /%b HTTP/1.1\r\nHost: h\r\n\r\n" % (MAX_HEAD_BYTES * b"x"),
            HEAD + b"X: %b\r\n\r\n" % (MAX_HEAD_BYTES * b"x"),
            HEAD + MAX_HEADERS * b"X: y\r\n" + b"\r\n",
        )

    def test_the_largest_head(self) -> None:
        client = self.connect()
        for request in (
            b"GET /%b HTTP/1.1\r\nHost: h\r\n\r\n" % (16_000 * b"x"),
            b"GET / HTTP/1.1\r\nHost: h\r\n" + (MAX_HEADERS - 1) * b"X: y\r\n" + b"\r\n",
        ):
            client.send(request)
            self.assertEqual(client.response().status, 200)

    @given(
        st.lists(
            st.one_of(
                st.sampled_from(
                    [
                        b"POST /x HTTP/1.1\r\n",
                        b"\r\n",
                        b"\n",
                        b"Host: h\r\n",
                        b"Content-Length: 2\r\n",
                        b"{}",
                        b" ",
                    ]
                ),
                st.sampled_from(
                    [b"Transfer-Encoding: chunked\r\n", b"2\r\n", b"0\r\n\r\n", b"Expect: 100-continue\r\n"]
                ),
                st.binary(max_size=5),
            ),
            max_size=12,
        ).map(b"".join),
        st.one_of(st.none(), st.integers(1, 9)),
    )
    def test_any_bytes_get_http_answers_and_cause_no_error(
        self, data: bytes, piece_bytes: int | None
    ) -> None:
        client = self.connect()
        if data:
            client.send(data, piece_bytes)
        while client.received:
            self.assertIn(client.response().status, (100, 200, 400, 413, 431))
        client.hang_up()
        self.assertEqual(self.site.state.channels, set())
        self.assertEqual(self.site.state.arriving_bytes, 0)
        self.assertEqual(self.flushLoggedErrors(), [])


class AccessLogTests(SiteCase):
    def lines(self, request: bytes, *, access_log: bool = True) -> list[LogEvent]:
        self.site = self.make_site(access_log=access_log)
        with capturedLogs() as events:
            self.connect().send(request)
        return [event for event in events if event["log_namespace"] == "webhookd.access"]

    def test_one_line_a_request_without_the_query(self) -> None:
        [event] = self.lines(b"GET /webhook/chatwoot?token=s3cret HTTP/1.1\r\nHost: h\r\n\r\n")

        self.assertEqual(formatEvent(event), "192.168.1.1 GET /webhook/chatwoot 200")
        self.assertNotIn("s3cret", repr(event))

    def test_no_line_unless_it_is_configured(self) -> None:
        self.assertEqual(self.lines(post(), access_log=False), [])

    def test_a_path_cannot_start_a_line(self) -> None:
        [event] = self.lines(b"GET /%0d%0a%1b[31m HTTP/1.1\r\nHost: h\r\n\r\n")

        self.assertTrue(formatEvent(event).isprintable())

    def test_braces_are_no_format(self) -> None:
        [event] = self.lines(b"GET /{client.__class__}{0} HTTP/1.1\r\nHost: h\r\n\r\n")

        self.assertEqual(formatEvent(event), "192.168.1.1 GET /{client.__class__}{0} 200")


class RequestIdTests(SiteCase):
    def id_of(self, *given: bytes) -> str:
        """Return the id in the answer to a request with these ids."""
        client = self.connect()
        lines = b"".join(b"X-Request-Id: %b\r\n" % one for one in given)
        client.send(HEAD + lines + b"Content-Length: 2\r\n\r\n{}")
        return client.response().headers["x-request-id"]

    def test_a_harmless_one_is_kept(self) -> None:
        for name in ("0123456789abcdef0123456789abcdef", "A.b_c-9", "x", "z" * 64):
            self.assertEqual(self.id_of(name.encode()), name)

    def test_no_two_requests_have_the_same(self) -> None:
        other_site = self.make_site()
        names = [self.id_of(), self.id_of()]
        self.site = other_site
        names.append(self.id_of())

        self.assertEqual(len(set(names)), 3)
        for name in names:
            self.assertRegex(name, r"^[0-9a-f]{12}-[0-9a-f]+$")

    def test_any_other_is_replaced(self) -> None:
        for sent in ((b"z" * 65,), (b"",), (b"a b",), (b"a;b",), (b"\xe4",), (b"a\tb",), (b"a", b"a")):
            with self.subTest(sent):
                self.assertRegex(self.id_of(*sent), r"^[0-9a-f]{12}-[0-9a-f]+$")

    @given(st.binary())
    def test_any_id_that_is_kept_is_safe_to_write(self, given_id: bytes) -> None:
        name = request_id({b"x-request-id": given_id}, iter([b"own"]))

        self.assertRegex(name, rb"\A[0-9A-Za-z._-]{1,64}\Z")
        self.assertIn(name, (given_id, b"own"))

    def test_a_request_has_few_enough_attributes_for_a_shared_dict(self) -> None:
        seen: list[str] = []

        def shortcut(request: WebhookRequest) -> bool:
            seen.extend(vars(request))
            request.respond(json_response(200, {}))
            seen.extend(vars(request))
            return True

        self.site = self.make_site(shortcut=shortcut)
        self.connect().send(post())

        self.assertLessEqual(len(set(seen)), 30)  # SHARED_KEYS_MAX_SIZE of CPython


class RefusalLineTests(SiteCase):
    def refused(self, data: bytes, **limits: Any) -> LogEvent:
        """Send data, wait, and return the one log line; its request id is in the answer."""
        self.site = self.make_site(**limits)
        with capturedLogs() as events:
            client = self.connect()
            client.send(data)
            self.pass_time(HEAD_DEADLINE_S)
        [line] = [event for event in events if event["log_namespace"] == "webhookd.http.refusals"]
        self.assertEqual(line["client"], "192.168.1.1")
        self.assertEqual(line["request_id"], client.response().headers["x-request-id"])
        return line

    def test_who_what_and_why(self) -> None:
        info, warn = LogLevel.info, LogLevel.warn
        for data, limits, status, code, path, level in (
            (b"hello\r\n\r\n", {}, 400, "bad_request", "-", info),
            (b"GET /x?token=s3cret HTTP/1.1\r\n\r\n", {}, 400, "bad_host", "/x", info),
            (b"GET /%ff HTTP/1.1\r\nHost: h\r\n\r\n", {}, 400, "bad_path", "/%ff", info),
            (HEAD, {}, 408, "too_slow", "-", info),
            (with_length(500), {}, 413, "too_large", "/x", info),
            (HEAD + b"X: " + b"x" * MAX_HEAD_BYTES, {}, 431, "head_too_large", "-", info),
            (b"", {"max_connections": 0}, 429, "too_many_connections", "-", warn),
        ):
            with self.subTest(code):
                line = self.refused(data, **limits)
                self.assertEqual((line["status"], line["code"], line["path"]), (status, code, path))
                self.assertIs(line["log_level"], level)
                self.assertEqual(
                    formatEvent(line),
                    f"refused {path} from 192.168.1.1: {status} {code}, request {line['request_id']}",
                )
                self.assertNotIn("s3cret", repr(line))

    def test_the_id_of_the_sender(self) -> None:
        line = self.refused(HEAD + b"X-Request-Id: name-1\r\nContent-Length: 500\r\n\r\n")

        self.assertEqual(line["request_id"], "name-1")


class DrainTests(SiteCase):
    DEADLINE_S = 5.0

    def drain(self) -> Deferred[None]:
        return self.site.drain(self.DEADLINE_S)

    def assert_drained(self, drained: Deferred[None]) -> None:
        self.clock.advance(0)
        self.successResultOf(drained)
        self.assertEqual(self.site.state.channels, set())
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_without_connections_there_is_nothing_to_wait_for(self) -> None:
        self.assert_drained(self.drain())

    def test_an_idle_connection_is_closed_at_once(self) -> None:
        client = self.connect()
        client.send(post())

        self.assert_drained(self.drain())
        self.assertFalse(client.transport.is_aborted)

    def test_a_busy_connection_is_closed_after_its_answer_which_says_so(self) -> None:
        self.echo.is_slow = True
        client = self.connect()
        client.send(post(b"1"))
        drained = self.drain()
        self.clock.advance(self.DEADLINE_S / 2)
        self.assertNoResult(drained)

        self.echo.answer()

        response = client.response()
        self.assertEqual((response.body, response.headers["connection"]), (b"1", "close"))
        self.assert_drained(drained)
        self.assertFalse(client.transport.is_aborted)

    def test_a_request_half_of_which_has_arrived_is_answered(self) -> None:
        for half in (1, len(HEAD), len(post()) - 1):
            with self.subTest(half):
                client = self.connect()
                client.send(post()[:half])
                drained = self.drain()
                self.clock.advance(self.DEADLINE_S / 2)
                self.assertNoResult(drained)

                client.send(post()[half:])

                self.assertEqual(client.response().headers["connection"], "close")
                self.assert_drained(drained)

    def test_a_fresh_connection_has_a_moment_to_send_its_request(self) -> None:
        client = self.connect()
        drained = self.drain()
        self.clock.advance(0.5)
        self.assertNoResult(drained)

        client.send(post(b"1"))

        response = client.response()
        self.assertEqual((response.body, response.headers["connection"]), (b"1", "close"))
        self.assert_drained(drained)

    def test_a_fresh_connection_that_sends_nothing_is_closed_after_that(self) -> None:
        client = self.connect()
        drained = self.drain()
        self.clock.advance(0.5)
        self.assertFalse(client.transport.is_closed)
        self.clock.advance(0.5)

        self.assert_drained(drained)

    def test_pending_requests_are_answered_and_the_last_answer_says_close(self) -> None:
        self.echo.is_slow = True
        client = self.connect()
        client.send(post(b"1") + post(b"2"))
        drained = self.drain()
        self.echo.answer()
        first = client.response()
        self.assertEqual((first.body, first.headers.get("connection")), (b"1", None))
        self.echo.answer()

        last = client.response()
        self.assertEqual((last.body, last.headers.get("connection")), (b"2", "close"))
        self.assert_drained(drained)

    def test_the_deadline_aborts_the_rest(self) -> None:
        self.echo.is_slow = True
        busy, half = self.connect(), self.connect()
        busy.send(post())
        half.send(HEAD)
        drained = self.drain()
        self.clock.advance(self.DEADLINE_S)

        self.assert_drained(drained)
        self.assertTrue(busy.transport.is_aborted)
        self.assertTrue(half.transport.is_aborted)

    def test_a_client_that_leaves_meanwhile(self) -> None:
        self.echo.is_slow = True
        client = self.connect()
        client.send(post())
        drained = self.drain()
        client.hang_up()

        self.assert_drained(drained)

    def test_a_connection_that_was_refused_is_not_waited_for_longer_than_it_lingers(self) -> None:
        client = self.connect()
        client.send(with_length(500))
        drained = self.drain()
        self.clock.advance(2)

        self.assert_drained(drained)

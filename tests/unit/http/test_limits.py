"""The limits of a site for all its connections, and clients that try to keep a connection open."""

from __future__ import annotations

import json

from tests.support.web_client import MemoryClient
from tests.unit.http.test_http import CHUNKED, HEAD, SiteCase
from webhookd.http.channel import MAX_HEAD_BYTES, MAX_PIPELINED, WRITE_DEADLINE_S

MAX_CONNECTIONS = 3
MAX_ARRIVING_BYTES = 100


def begin(length: int, sent: int) -> bytes:
    """The head of a request, and a part of its body."""
    return HEAD + b"Content-Length: %d\r\n\r\n" % length + b"x" * sent


class LimitsCase(SiteCase):
    def setUp(self) -> None:
        super().setUp()
        self.site = self.make_site(
            max_body_bytes=1000, max_connections=MAX_CONNECTIONS, max_arriving_bytes=MAX_ARRIVING_BYTES
        )

    def assert_answered(self, client: MemoryClient, status: int, code: str | None = None) -> None:
        response = client.response()
        self.assertEqual(response.status, status)
        if code is not None:
            self.assertEqual(json.loads(response.body)["error"]["code"], code)
            self.assertEqual("retry-after" in response.headers, status == 429)


class ConnectionTests(LimitsCase):
    def test_one_too_many_is_rejected_at_once_and_closed(self) -> None:
        others = [self.connect() for _ in range(MAX_CONNECTIONS)]
        client = self.connect()
        self.clock.advance(0)

        self.assert_answered(client, 429, "too_many_connections")
        self.assertTrue(client.transport.is_closed)
        self.assertEqual([other.received for other in others], [b""] * MAX_CONNECTIONS)

    def test_there_is_room_again_when_one_has_gone(self) -> None:
        others = [self.connect() for _ in range(MAX_CONNECTIONS)]
        others[0].hang_up()
        client = self.connect()
        client.send(begin(1, 1))

        self.assert_answered(client, 200)

    def test_one_that_never_reads_its_last_answer_is_aborted(self) -> None:
        client = self.connect()
        client.transport.loseConnection = lambda: None  # type: ignore[method-assign]  # as it is while data waits
        client.send(b"GET /x HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
        self.clock.pump([1.0] * int(WRITE_DEADLINE_S))
        self.assertFalse(client.transport.is_aborted)

        self.clock.pump([1.0] * 3)
        self.assertTrue(client.transport.is_aborted)


class ArrivingTests(LimitsCase):
    def test_a_single_body_above_the_limit_is_rejected(self) -> None:
        client = self.connect()
        client.send(begin(1000, MAX_ARRIVING_BYTES + 1))

        self.assert_answered(client, 429, "too_many")

    def test_a_complete_body_or_a_closed_connection_no_longer_counts(self) -> None:
        for _ in range(5):
            client = self.connect()
            client.send(begin(80, 80))
            self.assert_answered(client, 200)
            client.send(begin(1000, 80))
            client.hang_up()
        self.assertEqual(self.site.state.arriving_bytes, 0)


class PipelineTests(LimitsCase):
    def test_the_limit_itself_is_allowed(self) -> None:
        client = self.connect()
        client.send(begin(1, 1) * MAX_PIPELINED)

        for _ in range(MAX_PIPELINED):
            self.assert_answered(client, 200)
        self.assertFalse(client.transport.disconnecting)

    def test_one_more_is_rejected_after_the_others(self) -> None:
        client = self.connect()
        client.send(begin(1, 1) * (MAX_PIPELINED + 2))

        for _ in range(MAX_PIPELINED):
            self.assert_answered(client, 200)
        self.assert_answered(client, 429, "too_many")
        self.assertEqual(client.received, b"")

    def test_a_head_after_a_large_body_in_one_read_is_not_too_large(self) -> None:
        client = self.connect()
        body = b"x" * 90
        whole = HEAD + b"X: %b\r\nContent-Length: 90\r\n\r\n" % (b"x" * (MAX_HEAD_BYTES - 300)) + body
        client.send(whole + HEAD)
        self.assert_answered(client, 200)

        client.send(b"Content-Length: 1\r\n\r\nx")
        self.assert_answered(client, 200)


class TrailerTests(LimitsCase):
    def test_trailers_without_an_end(self) -> None:
        client = self.connect()
        client.send(CHUNKED + b"1\r\nx\r\n0\r\n")
        client.send(b"X: " + b"x" * MAX_HEAD_BYTES, piece_bytes=1000)

        self.assert_answered(client, 431, "head_too_large")

    def test_many_small_chunks_are_no_head(self) -> None:
        client = self.connect()
        client.send(CHUNKED)
        for _ in range(90):
            client.send(b"1;" + b"x" * (MAX_HEAD_BYTES // 50) + b"\r\n")
            client.send(b"x\r\n")
        client.send(b"0\r\n\r\n")

        self.assert_answered(client, 200)

"""The table of status codes, row by row, through the real routes and the real site."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from ipaddress import ip_network
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock
from twisted.logger import LogEvent, LogLevel, capturedLogs
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.resource import IResource, Resource

from tests.support.http import Response, request_bytes
from tests.support.web_client import MemoryClient
from webhookd.http import InFlight, Shortcut, WebhookSite
from webhookd.intake.auth import Credentials
from webhookd.model import (
    BadRequest,
    Delivery,
    JobRefused,
    Outcome,
    QueueUnavailable,
    Receipt,
    RedisErrorKind,
    SpoolUnavailable,
    TooMany,
    Unauthorized,
    UnknownSource,
    UnsupportedMedia,
)
from webhookd.ops.status import load_page
from webhookd.samples import SAMPLES
from webhookd.web import HealthApp, OpsApp, WebhookApp

SAMPLE = SAMPLES["message_created"]
NOW_MS = 1_788_264_005_123
PATH = "/webhook/chatwoot"
MAX_BODY_BYTES = 10_000
PEER = "192.168.1.1"  # that of a StringTransport
QUEUED = Receipt(Outcome.QUEUED, SAMPLE.job_id, SAMPLE.event)

UNAVAILABLE = {"error": {"code": "unavailable", "message": "the event could not be accepted"}}
NOT_FOUND = {"error": {"code": "not_found", "message": "Not Found"}}
NOT_ALLOWED = {"error": {"code": "method_not_allowed", "message": "Method Not Allowed"}}


class WebCase(SynchronousTestCase):
    """The receiver's routes on a connection in memory; `receipt` makes the receipt of each delivery."""

    receipt: Callable[[], Deferred[Receipt]]
    by_shortcut = True

    def setUp(self) -> None:
        self.clock = Clock()
        self.deliveries: list[Delivery] = []
        self.credentials: list[Credentials] = []
        self.is_ready = True
        self.receipt = lambda: succeed(QUEUED)
        self.set_limits()

    def set_limits(self, max_requests: int = 100, max_bytes: int = 1_000_000) -> None:
        self.in_flight = InFlight(max_requests, max_bytes)
        self.health: IResource = HealthApp(self.report, lambda: self.is_ready).app.resource()
        self.app = WebhookApp(self.accept, "chatwoot", lambda: NOW_MS, self.in_flight, self.health)
        self.site = self.make_site(self.app)

    def make_site(self, app: WebhookApp | OpsApp) -> WebhookSite:
        return WebhookSite(
            app.app.resource(),
            self.clock,
            max_body_bytes=MAX_BODY_BYTES,
            access_log=False,
            shortcut=Shortcut(app.app, app.failed) if self.by_shortcut else lambda _request: False,
        )

    def accept(self, delivery: Delivery, credentials: Credentials) -> Deferred[Receipt]:
        self.deliveries.append(delivery)
        self.credentials.append(credentials)
        return self.receipt()

    async def report(self) -> Mapping[str, object]:
        return {"status": "ok" if self.is_ready else "unavailable", "redis": {"status": "up"}}

    def fail_with(self, error: BaseException) -> None:
        self.receipt = lambda: fail(error)

    def raise_at_once(self, error: BaseException) -> None:
        def receipt() -> Deferred[Receipt]:
            raise error

        self.receipt = receipt

    def connect(self) -> MemoryClient:
        return MemoryClient(self.site, self.clock)

    def request(
        self, method: str, path: str, headers: Mapping[str, str] | None = None, body: bytes | None = None
    ) -> Response:
        return self.connect().exchange(method, path, headers, body)

    def post(
        self, body: bytes = SAMPLE.body, path: str = PATH, headers: Mapping[str, str] | None = None
    ) -> Response:
        return self.request("POST", path, {"Content-Type": "application/json"} | dict(headers or {}), body)

    def hold(self) -> list[Deferred[Receipt]]:
        """Let deliveries wait from now on, and return their receipts, for the test to fire."""
        pending: list[Deferred[Receipt]] = []

        def receipt() -> Deferred[Receipt]:
            pending.append(Deferred())
            return pending[-1]

        self.receipt = receipt
        return pending

    def assert_json(self, response: Response, status: int, content: object) -> None:
        self.assertEqual((response.status, json.loads(response.body)), (status, content))
        self.assertEqual(response.headers["content-type"], "application/json")

    def assert_nothing_in_flight(self) -> None:
        self.assertEqual((self.in_flight.requests, self.in_flight.bytes), (0, 0))


async def no_metrics(_accept: str) -> tuple[str, bytes]:
    return "text/plain", b""


class ReceiptTests(WebCase):
    def test_each_outcome_has_its_answer(self) -> None:
        with_job_id = {"jobId": SAMPLE.job_id}
        for outcome, status, content in (
            (Outcome.QUEUED, 202, {"status": "queued", **with_job_id}),
            (Outcome.ALREADY_QUEUED, 200, {"status": "already_queued", **with_job_id}),
            (Outcome.SPOOLED, 202, {"status": "spooled", **with_job_id}),
            (Outcome.IGNORED, 200, {"status": "ignored", "event": SAMPLE.event}),
        ):
            with self.subTest(outcome.value):
                receipt = Receipt(outcome, SAMPLE.job_id, SAMPLE.event)
                self.receipt = lambda receipt=receipt: succeed(receipt)  # type: ignore[misc]
                response = self.post()
                self.assert_json(response, status, content)
                self.assertEqual(response.headers["access-control-allow-origin"], "*")
                self.assertNotIn("retry-after", response.headers)
        self.assert_nothing_in_flight()

    def test_an_answer_waits_for_its_receipt(self) -> None:
        [client, pending] = self.connect(), self.hold()
        client.send(b"POST /webhook/chatwoot HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\n{}")
        self.assertEqual(client.received, b"")
        self.assertEqual((self.in_flight.requests, self.in_flight.bytes), (1, 2))

        pending[0].callback(QUEUED)

        self.assertEqual(client.response().status, 202)
        self.assert_nothing_in_flight()

    def test_a_delivery_is_the_request_as_it_was_received(self) -> None:
        self.post(headers={"X-Chatwoot-Delivery": "AbC", "X-Request-Id": "name-1"})

        self.assertEqual(self.deliveries, [Delivery("chatwoot", SAMPLE.body, "AbC", NOW_MS, b"name-1")])

    def test_a_delivery_without_an_id(self) -> None:
        self.post()

        self.assertIsNone(self.deliveries[0].delivery_id)

    def test_the_body_is_passed_on_byte_for_byte(self) -> None:
        for body in (b"", b" {} \r\n", bytes(range(256)), "é\u2028".encode()):
            self.post(body)

        self.assertEqual(
            [one.body for one in self.deliveries], [b"", b" {} \r\n", bytes(range(256)), "é\u2028".encode()]
        )

    def test_a_body_in_chunks_and_in_pieces(self) -> None:
        client = self.connect()
        client.send(
            b"POST /webhook/chatwoot HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"2\r\n{}\r\n3;x=y\r\n \r\n\r\n0\r\n\r\n",
            piece_bytes=1,
        )

        self.assertEqual(client.response().status, 202)
        self.assertEqual(self.deliveries[0].body, b"{} \r\n")

    def test_the_path_names_the_source(self) -> None:
        for path, source in (
            (PATH, "chatwoot"),
            (f"{PATH}/", "chatwoot"),
            (f"/{PATH}", "chatwoot"),
            (f"{PATH}?a=b", "chatwoot"),
            (f"{PATH}/other", "other"),
            (f"{PATH}/other/", "other"),
            (f"{PATH}/%6Fther", "other"),
            (f"{PATH}/caf%C3%A9", "café"),
        ):
            with self.subTest(path):
                self.assertEqual(self.post(path=path).status, 202)
                self.assertEqual(self.deliveries[-1].source, source)

    def test_every_way_to_show_a_credential(self) -> None:
        self.post()
        self.post(
            headers={
                "X-Chatwoot-Signature": "sha256=1",
                "X-Chatwoot-Timestamp": "2",
                "Authorization": "Basic 3",
                "X-Webhook-Token": "4",
                "X-Forwarded-For": "5",
                "X-Real-IP": "6",
            }
        )
        self.post(path=f"{PATH}?token=5%26")
        self.post(path=f"{PATH}?token=")

        self.assertEqual(
            self.credentials,
            [
                Credentials(peer=PEER),
                Credentials(b"sha256=1", b"2", b"Basic 3", b"4", PEER, b"5", b"6"),
                Credentials(token=b"5&", peer=PEER),
                Credentials(peer=PEER),
            ],
        )

    def test_a_form_in_the_body_is_no_credential(self) -> None:
        self.post(b"token=secret")

        self.assertEqual(self.credentials, [Credentials(peer=PEER)])

    def test_two_signatures_are_none(self) -> None:
        body = b"{}"
        self.connect().send(
            b"POST /webhook/chatwoot HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n"
            b"X-Chatwoot-Signature: sha256=1\r\nX-Chatwoot-Signature: sha256=2\r\n\r\n" + body
        )

        self.assertEqual(self.credentials[0].signature, b"sha256=1, sha256=2")

    def test_any_host_is_served(self) -> None:
        for host in (
            "h",
            "h:3001",
            "[::1]:3001",
            "a..b",
            64 * "x" + ".example",
            "ü.example",
            "\xff",
            "",
            "*",
        ):
            with self.subTest(host):
                self.assertEqual(self.post(headers={"Host": host}).status, 202)


class RefusalTests(WebCase):
    def assert_refused(self, error: Exception, status: int, content: object, retry_after: str | None) -> None:
        for refuse in (self.raise_at_once, self.fail_with):
            with self.subTest(f"{type(error).__name__} {refuse.__name__}"):
                refuse(error)
                response = self.post()
                self.assert_json(response, status, content)
                self.assertEqual(response.headers.get("retry-after"), retry_after)
                self.assertEqual(response.headers["access-control-allow-origin"], "*")
                self.assert_nothing_in_flight()

    def test_each_refusal_has_its_status_and_says_its_code_and_message(self) -> None:
        for kind, status in (
            (BadRequest, 400),
            (Unauthorized, 401),
            (UnknownSource, 404),
            (UnsupportedMedia, 415),
        ):
            self.assert_refused(
                kind("a_code", "a message"),
                status,
                {"error": {"code": "a_code", "message": "a message"}},
                None,
            )

    def test_too_many_may_come_back_later(self) -> None:
        self.assert_refused(
            TooMany("too_many", "wait"), 429, {"error": {"code": "too_many", "message": "wait"}}, "3"
        )

    def test_an_event_that_cannot_be_accepted_may_come_back_later_without_learning_why(self) -> None:
        for kind in RedisErrorKind:
            self.assert_refused(QueueUnavailable(kind, "at 10.0.0.7", unknown=True), 500, UNAVAILABLE, "3")
        self.assert_refused(SpoolUnavailable("/var/spool is full"), 500, UNAVAILABLE, "3")
        self.assert_refused(JobRefused("WRONGTYPE"), 500, UNAVAILABLE, "3")
        self.assertEqual(self.flushLoggedErrors(), [])

    def test_a_defect_is_logged_once_and_not_shown(self) -> None:
        for refuse in (self.raise_at_once, self.fail_with):
            with self.subTest(refuse.__name__):
                refuse(ZeroDivisionError("a detail"))
                response = self.post()
                self.assert_json(response, 500, UNAVAILABLE)
                self.assertEqual(response.headers["retry-after"], "3")
                self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
                self.assert_nothing_in_flight()


class RefusalLineTests(WebCase):
    def refused(self, send: Callable[[], Response]) -> tuple[LogEvent, LogEvent | None]:
        """Return the log line of a refused request and that of its defect; both have the answer's id."""
        with capturedLogs() as events:
            name = send().headers["x-request-id"]
        [line] = [event for event in events if event["log_namespace"] == "webhookd.http.refusals"]
        defect = next((event for event in events if "log_failure" in event), None)
        self.assertEqual(line["request_id"], name)
        self.assertEqual(name if defect is None else defect["request_id"], name)
        return line, defect

    def test_who_what_and_why(self) -> None:
        unavailable = SpoolUnavailable("full")
        for error, status, code, reason, level in (
            (Unauthorized("bad_token", "no"), 401, "bad_token", None, LogLevel.info),
            (BadRequest("not_json", "no"), 400, "not_json", None, LogLevel.info),
            (TooMany("too_many", "no"), 429, "too_many", None, LogLevel.warn),
            (unavailable, 500, "unavailable", "SpoolUnavailable", LogLevel.warn),
        ):
            with self.subTest(code):
                self.fail_with(error)
                line, defect = self.refused(lambda: self.post(path=f"{PATH}/branch?token=s3cret"))
                self.assertIsNone(defect)
                self.assertEqual(
                    (line["status"], line["code"], line["reason"], line["source"], line["client"]),
                    (status, code, reason, "branch", PEER),
                )
                self.assertEqual(line["path"], f"{PATH}/branch")
                self.assertNotIn("s3cret", repr(line))
                self.assertIs(line["log_level"], level)

    def test_the_short_path_has_a_source(self) -> None:
        self.fail_with(Unauthorized("bad_token", "no"))

        self.assertEqual(self.refused(self.post)[0]["source"], "chatwoot")

    def test_a_source_that_is_not_configured_is_none(self) -> None:
        self.raise_at_once(UnknownSource("unknown_source", "no"))

        self.assertIsNone(self.refused(lambda: self.post(path=f"{PATH}/unknown"))[0]["source"])

    def test_no_such_path_and_no_such_method(self) -> None:
        for method, path, status, code in (
            ("POST", "/nowhere", 404, "not_found"),
            ("PUT", PATH, 405, "method_not_allowed"),
            ("GET", "/health/nowhere", 404, "not_found"),
        ):
            with self.subTest(path):
                line, _ = self.refused(partial(self.request, method, path))
                self.assertEqual(
                    (line["status"], line["code"], line["path"], line["source"]), (status, code, path, None)
                )

    def test_a_defect_is_found_by_the_id_of_the_answer(self) -> None:
        self.fail_with(ZeroDivisionError())
        line, defect = self.refused(self.post)

        self.assertIsNotNone(defect)
        self.assertEqual((line["code"], line["reason"]), ("unavailable", "ZeroDivisionError"))
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_what_a_trusted_proxy_says_of_the_client(self) -> None:
        self.fail_with(Unauthorized("bad_token", "no"))
        for proxies, client in (((), PEER), ((ip_network("192.168.0.0/16"),), "203.0.113.9")):
            self.app.trusted_proxies = proxies
            line, _ = self.refused(lambda: self.post(headers={"X-Forwarded-For": "203.0.113.9"}))
            self.assertEqual(line["client"], client)


class MediaTypeTests(WebCase):
    def test_json_and_no_media_type_are_accepted(self) -> None:
        for media_type in (
            "application/json",
            "application/json; charset=utf-8",
            "application/json;charset=UTF-8",
            " Application/JSON ",
            "application/vnd.chatwoot+json",
        ):
            with self.subTest(media_type):
                self.assertEqual(self.post(headers={"Content-Type": media_type}).status, 202)
        self.assertEqual(self.request("POST", PATH, {}, b"{}").status, 202)
        self.assertEqual(self.post(headers={"Content-Encoding": "identity"}).status, 202)

    def test_anything_else_is_not(self) -> None:
        for media_type in (
            "",
            "text/plain",
            "text/json",
            "application/x-www-form-urlencoded",
            "multipart/form-data; boundary=x",
            "application/jsonp",
            "application/xml",
            "json",
            "application/json, text/html",
        ):
            with self.subTest(media_type):
                self.assert_json(
                    self.post(headers={"Content-Type": media_type}),
                    415,
                    {
                        "error": {
                            "code": "unsupported_media_type",
                            "message": "the body must be application/json",
                        }
                    },
                )
        self.assertEqual(self.deliveries, [])

    def test_a_compressed_body_is_not(self) -> None:
        content = {"error": {"code": "unsupported_encoding", "message": "the body must not be compressed"}}
        for encoding in ("gzip", "br", "deflate", "x"):
            with self.subTest(encoding):
                self.assert_json(self.post(headers={"Content-Encoding": encoding}), 415, content)
        self.assert_json(self.request("POST", PATH, {"Content-Encoding": "gzip"}, b"\x1f\x8b"), 415, content)
        self.assertEqual(self.deliveries, [])


class RouteTests(WebCase):
    def test_paths_that_are_not_there(self) -> None:
        for path in (
            "/",
            "//",
            "/webhook",
            "/webhook/",
            "/webhooks/chatwoot",
            "/webhook/chatwoot/a/b",
            "/webhook/chatwoot/a%2Fb",
            "/webhook/chatwoot//",
            "/webhook//chatwoot",
            "/Webhook/chatwoot",
            "/webhook/chatwootx",
            "/webhook/./chatwoot",
            "/webhook/../webhook/chatwoot",
            "/healthx",
            "/health/x",
            "/health/live/x",
            "/health//",
            "/metrics",
            "/favicon.ico",
        ):
            for method in ("GET", "POST"):
                with self.subTest(f"{method} {path}"):
                    self.assert_json(self.request(method, path, body=b"{}"), 404, NOT_FOUND)
        self.assertEqual(self.deliveries, [])

    def test_other_methods_than_post(self) -> None:
        for path in (PATH, f"{PATH}/", f"{PATH}/other"):
            for method in ("GET", "PUT", "PATCH", "DELETE", "TRACE", "PROPFIND"):
                with self.subTest(f"{method} {path}"):
                    response = self.request(method, path)
                    self.assert_json(response, 405, NOT_ALLOWED)
                    self.assertEqual(response.headers["allow"], "OPTIONS, POST")
        self.assertEqual(self.deliveries, [])

    def test_head_has_no_body(self) -> None:
        for path, status in ((PATH, 405), ("/", 404), ("/health", 200), ("/health/live", 200)):
            with self.subTest(path):
                client = self.connect()
                self.assertEqual(client.exchange("HEAD", path).status, status)
                self.assertEqual(client.received, b"")

    def test_a_preflight(self) -> None:
        for path in (PATH, f"{PATH}/", f"{PATH}/other"):
            with self.subTest(path):
                response = self.request(
                    "OPTIONS", path, {"Origin": "https://x.example", "Access-Control-Request-Method": "POST"}
                )
                self.assertEqual((response.status, response.body), (204, b""))
                self.assertEqual(response.headers["access-control-allow-origin"], "*")
                self.assertEqual(response.headers["access-control-allow-methods"], "POST, OPTIONS")
                self.assertIn("Authorization", response.headers["access-control-allow-headers"])
                self.assertNotIn("content-length", response.headers)  # RFC 9110, 8.6: not with 204
        self.assertEqual(self.deliveries, [])

    def test_a_browser_may_read_every_answer(self) -> None:
        for response in (self.post(), self.request("GET", PATH), self.request("GET", "/")):
            self.assertEqual(response.headers["access-control-allow-origin"], "*")

    def test_a_path_that_is_not_utf8(self) -> None:
        for path in ("/webhook/chatwoot/%FF", "/%C3", "/health/%ff"):
            with self.subTest(path):
                self.assert_json(
                    self.request("GET", path),
                    400,
                    {"error": {"code": "bad_path", "message": "the path is not UTF-8"}},
                )
        self.assertEqual(self.flushLoggedErrors(), [])

    @given(
        st.sampled_from(["GET", "POST", "PUT", "DELETE", "PATCH", "TRACE", "CONNECT", "x", "!"]),
        st.lists(
            st.one_of(
                st.sampled_from(
                    [
                        "/",
                        "//",
                        "webhook",
                        "chatwoot",
                        "health",
                        "live",
                        "ready",
                        ".",
                        "..",
                        "%2F",
                        "%00",
                        "%0d%0a",
                    ]
                ),
                st.sampled_from(
                    ["%", "%zz", "%FF", "?", "?token=x", "#", ";", "\\", "@", ":", "*", "http://h", "<", '"']
                ),
                st.text(st.characters(min_codepoint=33, max_codepoint=176), max_size=4),
            ),
            max_size=8,
        ).map("".join),
    )
    def test_no_path_and_no_method_leads_to_a_redirect_or_an_error_of_ours(
        self, method: str, path: str
    ) -> None:
        client = self.connect()
        response = client.exchange(method, f"/{path}", {"Content-Type": "application/json"}, b"{}")

        self.assertIn(response.status, (200, 202, 400, 404, 405))
        self.assertEqual(response.headers["content-type"], "application/json")
        self.assertNotIn("location", response.headers)
        self.assertIsInstance(json.loads(response.body), dict)
        self.assertEqual(client.received, b"")
        self.assertEqual(self.flushLoggedErrors(), [])


class HangUpTests(WebCase):
    """A client that hangs up in the turn of the reactor that handles its request."""

    def test_its_event_counts(self) -> None:
        client = self.connect()
        client.transport.protocol.dataReceived(request_bytes("POST", PATH, {}, SAMPLE.body))
        client.hang_up()
        self.clock.advance(0)

        self.assertEqual(len(self.deliveries), 1)
        self.assert_nothing_in_flight()

    def test_its_answer_is_discarded(self) -> None:
        pending, client = self.hold(), self.connect()
        client.send(request_bytes("POST", PATH, {}, SAMPLE.body))
        pending[0].callback(QUEUED)
        client.hang_up()

        self.assertEqual(client.received, b"")
        self.assertEqual(self.site.state.channels, set())
        self.assert_nothing_in_flight()


class LimitTests(WebCase):
    TOO_MANY = {"error": {"code": "too_many", "message": "too many requests are under way"}}  # noqa: RUF012

    def begin(self, body: bytes = b"{}", path: bytes = b"/webhook/chatwoot") -> MemoryClient:
        client = self.connect()
        head = b"POST %b HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % (path, len(body))
        client.send(head + body)
        return client

    def assert_too_many(self, client: MemoryClient) -> None:
        response = client.response()
        self.assert_json(response, 429, self.TOO_MANY)
        self.assertEqual(response.headers["retry-after"], "3")

    def test_the_number_of_requests_under_way(self) -> None:
        self.set_limits(max_requests=2)
        pending = self.hold()
        first, second = self.begin(), self.begin()
        self.assert_too_many(self.begin())

        pending[0].callback(QUEUED)
        third = self.begin()
        for receipt in pending[1:]:
            receipt.callback(QUEUED)

        self.assertEqual([one.response().status for one in (first, second, third)], [202, 202, 202])
        self.assert_nothing_in_flight()

    def test_the_bytes_under_way(self) -> None:
        self.set_limits(max_bytes=10)
        pending = self.hold()
        first, second = self.begin(b"[1234]"), self.begin(b"[23]")
        self.assert_too_many(self.begin(b"1"))
        self.assertEqual(self.in_flight.bytes, 10)

        pending[0].errback(SpoolUnavailable("full"))
        third = self.begin(b"[2345]")
        for receipt in pending[1:]:
            receipt.callback(QUEUED)

        self.assertEqual([one.response().status for one in (first, second, third)], [500, 202, 202])
        self.assert_nothing_in_flight()

    def test_what_was_refused_takes_no_place(self) -> None:
        self.set_limits(max_requests=1)
        self.raise_at_once(Unauthorized("bad_token", "no"))

        self.assertEqual([self.post().status for _ in range(3)], [401, 401, 401])
        self.assert_nothing_in_flight()

    def test_a_client_that_hangs_up_stops_no_job_and_keeps_its_place_until_the_end(self) -> None:
        for path, settle in (
            (b"/webhook/chatwoot", lambda receipt: receipt.callback(QUEUED)),
            (b"/webhook/chatwoot/other/", lambda receipt: receipt.errback(SpoolUnavailable("full"))),
            (b"/webhook/%63hatwoot/%6Fther", lambda receipt: receipt.callback(QUEUED)),
        ):
            cancelled: list[object] = []
            receipt: Deferred[Receipt] = Deferred(cancelled.append)
            self.receipt = lambda receipt=receipt: receipt  # type: ignore[misc]
            client = self.begin(path=path)
            client.hang_up()

            self.assertEqual(cancelled, [])
            self.assertEqual(self.in_flight.requests, 1)
            settle(receipt)
            self.assert_nothing_in_flight()
            self.assertEqual(client.received, b"")
            self.assertEqual(self.flushLoggedErrors(), [])

    def test_a_defect_after_the_client_hung_up_is_logged_once(self) -> None:
        pending = self.hold()
        client = self.begin()
        client.hang_up()
        pending[0].errback(ZeroDivisionError())

        self.assert_nothing_in_flight()
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)


class HealthTests(WebCase):
    def test_everything(self) -> None:
        for path in ("/health", "/health/"):
            self.assert_json(self.request("GET", path), 200, {"status": "ok", "redis": {"status": "up"}})
        self.is_ready = False
        self.assert_json(
            self.request("GET", "/health"), 503, {"status": "unavailable", "redis": {"status": "up"}}
        )

    def test_readiness(self) -> None:
        self.assert_json(self.request("GET", "/health/ready"), 200, {"status": "ok"})
        self.is_ready = False
        self.assert_json(self.request("GET", "/health/ready"), 503, {"status": "unavailable"})

    def test_liveness_asks_for_nothing(self) -> None:
        self.is_ready = False
        self.assert_json(self.request("GET", "/health/live"), 200, {"status": "ok"})

    def test_other_methods_than_get(self) -> None:
        for path in ("/health", "/health/live", "/health/ready"):
            for method in ("POST", "PUT", "DELETE", "OPTIONS"):
                with self.subTest(f"{method} {path}"):
                    response = self.request(method, path)
                    self.assert_json(response, 405, NOT_ALLOWED)
                    self.assertEqual(response.headers["allow"], "GET, HEAD")

    def test_a_defect_in_the_report_is_logged_and_not_shown(self) -> None:
        async def report() -> Mapping[str, Any]:
            raise ZeroDivisionError

        health = HealthApp(report, lambda: True).app.resource()
        self.site = self.make_site(OpsApp(health, no_metrics, load_page(), Resource()))

        self.assert_json(self.request("GET", "/health"), 500, UNAVAILABLE)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_the_operators_have_health_and_no_webhooks(self) -> None:
        self.site = self.make_site(OpsApp(self.health, no_metrics, load_page(), Resource()))

        self.assertEqual(self.request("GET", "/health").status, 200)
        self.assertEqual(self.request("GET", "/health/live").status, 200)
        for path in ("/x", PATH, "/health/x"):
            self.assert_json(self.post(path=path), 404, NOT_FOUND)
        self.assertEqual(self.deliveries, [])


class KleinReceiptTests(ReceiptTests):
    """Without the shortcut, through Klein itself, the answers are the same."""

    by_shortcut = False


class KleinRefusalTests(RefusalTests):
    by_shortcut = False


class KleinMediaTypeTests(MediaTypeTests):
    by_shortcut = False


class KleinHealthTests(HealthTests):
    by_shortcut = False

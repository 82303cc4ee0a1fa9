"""The route cache of a shortcut."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

from klein import Response
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from werkzeug.routing import MapAdapter

from webhookd.http import KleinApp, Shortcut, WebhookRequest
from webhookd.http.answers import json_response


class Names:
    """Answers with the name in the path."""

    app: ClassVar[KleinApp] = KleinApp()

    @app.route("/names/<name>", methods=["GET"])
    def name(self, _request: WebhookRequest, name: str) -> Response:
        return json_response(200, name)

    @app.handle_errors(Exception)
    def failed(self, _request: WebhookRequest, _failure: Failure) -> Response:
        return json_response(500, "failed")


class RouteCacheTests(SynchronousTestCase):
    def setUp(self) -> None:
        names = Names()
        self.shortcut = Shortcut(names.app, names.failed)
        self.matched: list[str] = []
        match = MapAdapter.match

        def count(adapter: MapAdapter, path: str, *arguments: Any, **options: Any) -> Any:
            self.matched.append(path)
            return match(adapter, path, *arguments, **options)

        self.patch(MapAdapter, "match", count)

    def request(self, path: str, method: bytes = b"GET") -> tuple[bytes | None, str]:
        """Return the answer's body, or None without an answer, and the route for the metrics."""
        answers: list[Response] = []
        request: Any = SimpleNamespace(method=method, path=path.encode(), respond=answers.append)
        self.assertEqual(self.shortcut(request), bool(answers))
        return (answers[0].body if answers else None), request.route

    def test_a_path_is_matched_once(self) -> None:
        for _ in range(3):
            self.assertEqual(self.request("/names/a"), (b'"a"\n', "/names/<name>"))

        self.assertEqual(self.matched, ["/names/a"])

    def test_a_path_without_a_route_is_matched_once(self) -> None:
        for _ in range(3):
            self.assertEqual(self.request("/nowhere"), (None, "other"))
            self.assertEqual(self.request("/names/a", b"PUT"), (None, "other"))
            self.assertEqual(self.request("/names/%ff"), (None, "other"))

        self.assertEqual(self.matched, ["/nowhere", "/names/a"])

    def test_invented_names_do_not_fill_the_cache_for_good(self) -> None:
        for number in range(1000):
            self.request(f"/names/invented{number}")
        self.matched.clear()

        for _ in range(3):
            self.request("/names/a")

        self.assertEqual(self.matched, ["/names/a"])

    def test_invented_names_do_not_evict_a_name_in_use(self) -> None:
        for number in range(1000):
            self.request("/names/a")
            self.request(f"/names/invented{number}")

        self.assertEqual(self.matched.count("/names/a"), 1)

    def test_the_cache_is_bounded(self) -> None:
        for _ in range(2):
            for number in range(1000):
                self.request(f"/names/invented{number}")

        self.assertEqual(len(self.matched), 2000)

"""Klein apps, and a shortcut to their routes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar
from urllib.parse import unquote_to_bytes

from klein import Klein, Response
from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure
from werkzeug.exceptions import HTTPException

from webhookd.http.request import WebhookRequest

_MAX_ROUTES = 256

_Handler = TypeVar("_Handler", bound=Callable[..., object])

#: An endpoint of Klein's, its arguments, and the rule for the metrics; without an endpoint it is for Klein.
_Route: TypeAlias = tuple[str | None, Mapping[str, Any], str]

_log = Logger()


class KleinApp(Klein):
    """A Klein app whose handlers take a `WebhookRequest` and return klein's ``Response``.

    It never redirects, as werkzeug does by default: one more slash still names the same path.
    """

    def __init__(self) -> None:
        super().__init__()
        self.url_map.strict_slashes = False
        self.url_map.merge_slashes = False

    if TYPE_CHECKING:  # Klein's own types allow neither of the two

        def route(self, url: str, **options: Any) -> Callable[[_Handler], _Handler]: ...  # type: ignore[override]

        def handle_errors(self, kind: type[Exception]) -> Callable[[_Handler], _Handler]: ...  # type: ignore[override]


class Shortcut:
    """Calls a Klein app's handlers without the way that Klein takes to them.

    For every request, a KleinResource binds and matches werkzeug's map and chains half a dozen Deferreds:
    more work than all the rest. A shortcut remembers the latest matches and calls the same handler with the
    same arguments. It leaves branches, and what does not match, to Klein.

    Klein cancels a handler when its client hangs up. A shortcut does not: a job on its way must not stop
    half-way.
    """

    def __init__(self, app: Klein, failed: Callable[[WebhookRequest, Failure], Response]) -> None:
        """``failed`` is the app's own error handler."""
        self._app = app
        self._failed = failed
        self._rules = app.url_map.bind("localhost")
        self._find = lru_cache(_MAX_ROUTES)(self._match)  # bounded: senders choose the paths

    def __call__(self, request: WebhookRequest) -> bool:
        """Answer a request and return True, or leave it to Klein and return False."""
        endpoint, arguments, request.route = self._find(request.method, request.path)
        if endpoint is None:
            return False
        try:
            answer: Any = self._app.execute_endpoint(endpoint, request, **arguments)
        except Exception:  # noqa: BLE001  # as Klein's own
            answer = self._failed(request, Failure())
        if isinstance(answer, Deferred):
            answer.addCallbacks(request.respond, self._respond_to_failure, errbackArgs=(request,)).addErrback(
                _log_defect
            )
        else:
            request.respond(answer)
        return True

    def _match(self, method: bytes, path: bytes) -> _Route:
        try:
            rule, arguments = self._rules.match(
                unquote_to_bytes(path).decode(), method.decode("ascii"), return_rule=True
            )
        except (UnicodeDecodeError, HTTPException):
            return None, {}, "other"
        endpoint = rule.endpoint
        if endpoint.endswith("_branch") or f"{endpoint}_branch" in self._app.endpoints:
            return None, {}, rule.rule.partition("/<")[0]
        return endpoint, arguments, rule.rule

    def _respond_to_failure(self, failure: Failure, request: WebhookRequest) -> None:
        request.respond(self._failed(request, failure))


def _log_defect(failure: Failure) -> None:
    _log.failure("cannot write an answer", failure)

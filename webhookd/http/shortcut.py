"""Klein apps, and a shortcut to their handlers."""

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

#: Klein's endpoint, or None if Klein must answer; the arguments of its handler; the label for the metrics.
_Route: TypeAlias = tuple[str | None, Mapping[str, Any], str]

_log = Logger()


class KleinApp(Klein):
    """A Klein app whose handlers take a `WebhookRequest` and return klein's ``Response``.

    It never redirects, as werkzeug does by default: Chatwoot would follow with a second POST.
    """

    def __init__(self) -> None:
        super().__init__()
        self.url_map.strict_slashes = False
        self.url_map.merge_slashes = False

    if TYPE_CHECKING:  # Klein's own types leave out both

        def route(self, url: str, **options: Any) -> Callable[[_Handler], _Handler]: ...  # type: ignore[override]

        def handle_errors(self, kind: type[Exception]) -> Callable[[_Handler], _Handler]: ...  # type: ignore[override]


class Shortcut:
    """Calls the handlers of a Klein app directly.

    For each request, a KleinResource binds and matches werkzeug's map and chains half a dozen Deferreds. This
    takes longer than all the rest. A shortcut remembers the latest matches, and calls the same handlers with
    the same arguments. Branches, and requests that match no route, go through Klein.

    Klein cancels a handler when the client hangs up. A shortcut does not, so that no job stops half-way.
    """

    def __init__(self, app: Klein, failed: Callable[[WebhookRequest, Failure], Response]) -> None:
        """``failed`` is the app's error handler."""
        self._app = app
        self._failed = failed
        self._rules = app.url_map.bind("localhost")
        self._find = lru_cache(_MAX_ROUTES)(self._match)  # bounded: senders choose the paths

    def __call__(self, request: WebhookRequest) -> bool:
        """Answer a request and return True, or return False and leave it to Klein."""
        endpoint, arguments, request.route = self._find(request.method, request.path)
        if endpoint is None:
            return False
        try:
            answer: Any = self._app.execute_endpoint(endpoint, request, **arguments)
        except Exception:  # noqa: BLE001  # as Klein's own
            answer = self._failed(request, Failure())
        if isinstance(answer, Deferred):
            answer.addCallbacks(request.respond, self._respond_to_failure, errbackArgs=(request,))
            answer.addErrback(_log_defect)
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

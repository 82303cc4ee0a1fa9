"""Webhooks to send: the samples, and as many events like them as a test needs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from hashlib import sha256
from itertools import cycle, islice

from attrs import evolve, frozen

from webhookd.samples import SAMPLES, Sample

from .daemon import Daemon
from .http import Response, connect, exchange, read_response, request_bytes
from .process import wait_until

PATH = "/webhook/chatwoot"

_WITHOUT_DELIVERY = ("message_created", "conversation_created", "contact_created")
"""The events whose job id depends only on the body."""

_ODD_BODY = (
    b'\n{ "event" : "odd.one", "id": 5 , "account":{"id":1},\n'
    b'\t"n": [1.0, 1e2, -0.0, 12345678901234567890, 0.10], "e": [], "o": {}, "z": null,\n'
    b'\t"s": "\\u003cb\\u003e \\/ \\ud83d\\ude00 \xc3\xa9 \xf0\x9f\x98\x80 \\u0000" }  '
)
"""JSON that a library would write differently: blanks, escapes, spelling of numbers, empty lists."""


@frozen
class Webhook:
    """One request to send, and the name and id that its job must get."""

    body: bytes
    headers: Mapping[str, str]
    job_id: str
    event: str

    @classmethod
    def from_sample(cls, sample: Sample) -> Webhook:
        """Return an unchanged sample."""
        return cls(sample.body, sample.headers, sample.job_id, sample.event)

    @property
    def request(self) -> bytes:
        """The bytes of the request. It closes the connection."""
        return request_bytes("POST", PATH, self.headers, self.body)

    @property
    def sha256(self) -> str:
        """The digest of the body."""
        return sha256(self.body).hexdigest()

    def numbered(self, number: int) -> Webhook:
        """Return another event like this one, whose job has another id."""
        if self.event in _WITHOUT_DELIVERY:
            head, _, entity = self.job_id.rpartition(".")
            body = re.sub(rb'"id":%s\b' % entity.encode(), b'"id":%d' % number, self.body)
            return evolve(self, body=body, job_id=f"{head}.{number}")
        delivery_id = f"00000000-0000-4000-9000-{number:012x}"
        head = ".".join(self.job_id.split(".")[:4])
        headers = {**self.headers, "X-Chatwoot-Delivery": delivery_id}
        return evolve(self, headers=headers, job_id=f"{head}.{delivery_id}")


ODD = Webhook(_ODD_BODY, {"Content-Type": "application/json"}, "chatwoot.odd_one.a1.5.h", "odd.one")
"""An event of an unknown type, in valid JSON that no library writes. `numbered` makes it unique."""

_KINDS = [ODD, *(Webhook.from_sample(sample) for sample in SAMPLES.values())]


def webhooks(count: int, first: int = 1_000_000) -> list[Webhook]:
    """Return ``count`` distinct events of all types in turn. Another ``first`` makes others."""
    return [kind.numbered(first + number) for number, kind in enumerate(islice(cycle(_KINDS), count))]


def webhook(number: int = 1) -> Webhook:
    """Return a plain message."""
    return Webhook.from_sample(SAMPLES["message_created"]).numbered(number)


DIRECT = ("--spool", "off")
"""Options of a daemon that queues each event in Redis, or refuses it."""


def connected(daemon: Daemon) -> Daemon:
    """Return the daemon when it is connected to its Redis."""
    wait_until(lambda: _redis_status(daemon) == "up", "the daemon is connected to Redis")
    return daemon


def _redis_status(daemon: Daemon) -> str:
    status = json.loads(daemon.get("/health").body)["redis"].get("status")
    return str(status)


def post(port: int, event: Webhook) -> Response:
    """Send one webhook, and read the answer."""
    return exchange(port, event.request)


def post_at_once(ports: Sequence[int], events: Sequence[Webhook]) -> list[Response]:
    """Send all webhooks at the same time, to the ports in turn, and return their answers in order.

    Each has its own connection. The last byte of each is sent when everything else has been sent.
    """
    with ExitStack() as stack:
        connections = [stack.enter_context(connect(port)) for port in islice(cycle(ports), len(events))]
        requests = [event.request for event in events]
        for connection, request in zip(connections, requests, strict=True):
            connection.sendall(request[:-1])
        for connection, request in zip(connections, requests, strict=True):
            connection.sendall(request[-1:])
        return [read_response(connection) for connection in connections]


def outcome(response: Response) -> tuple[int, str]:
    """Return the status of a response, and the ``status`` of its receipt or the ``code`` of its error."""
    content = json.loads(response.body)
    return response.status, content["error"]["code"] if "error" in content else content["status"]

"""The HTTP edge: a twisted.web site with its own parser and its own limits.

The parser is llhttp, as in Node, through the package httptools. twisted.web's own parser takes more time for
a webhook than all the rest of webhookd, and it has no limits of size or time. twisted.web's Request stays, so
resources and Klein work as usual.

* A connection answers its requests one at a time, in order. While a request waits, nothing more is read.
* Each state of a connection has a deadline, and no byte extends it: reading the head, reading the body,
  writing the answer, and being idle. One sweep a second checks all of them; no request has a timer.
* All requests that arrive in one turn of the reactor are handled together, step by step. This takes less
  time than one request after the other.
* A rejection (too large, too slow, not HTTP) is an answer like any other: JSON, in order. Then the edge
  discards what the client still sends for a short time, so that the client reads the answer, and closes.
"""

from webhookd.http.channel import WebhookChannel
from webhookd.http.in_flight import InFlight
from webhookd.http.refusals import Rejection
from webhookd.http.request import WebhookRequest
from webhookd.http.shortcut import KleinApp, Shortcut
from webhookd.http.site import MAX_CONNECTIONS, WebhookSite

__all__ = [
    "MAX_CONNECTIONS",
    "InFlight",
    "KleinApp",
    "Rejection",
    "Shortcut",
    "WebhookChannel",
    "WebhookRequest",
    "WebhookSite",
]

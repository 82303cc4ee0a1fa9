"""The HTTP edge: a Site whose connections parse with llhttp, keep to limits, and end without cutting.

llhttp is the parser of Node, here through the package httptools. twisted.web's own parser spends more time on
a webhook than all the rest of webhookd, and sets no limits of size or time. twisted.web's Request stays, so
resources and Klein work as ever.

* A connection answers its requests one at a time, in their order; what comes meanwhile waits, and is not read
  any further.
* Every state of a connection ends at a deadline that no byte puts off: the head, the body, the answer's way
  out, and idleness. One sweep a second looks after all of them; there is no timer for a request.
* What a turn of the reactor brings is handled together, step by step, which takes less time than one request
  after the other.
* A refusal (too large, too slow, not HTTP) is an answer like others: in its turn, as JSON. Then the
  connection closes, after what else the client sends was thrown away for a while, so that it gets to read.
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

"""The status page: a live view in a browser, for the person on call.

``page.html`` is all that the browser loads. The page then reads a stream of server-sent events (``feed.py``).
It has one message a second, the same for all viewers, made from differences of the parts' own counters
(``sampler.py``).
"""

from webhookd.ops.status.feed import StatusEvents, StatusFeed
from webhookd.ops.status.page import load_page
from webhookd.ops.status.sampler import Sampler

__all__ = ["Sampler", "StatusEvents", "StatusFeed", "load_page"]

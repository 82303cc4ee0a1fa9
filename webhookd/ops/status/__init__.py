"""The status page: what a person on call looks for, live, in a browser.

``page.html`` is all that the browser loads. It then reads a stream of server-sent events (``feed.py``): a
message a second, the same for all viewers, made from differences of the parts' own counters (``sampler.py``).
"""

from webhookd.ops.status.feed import StatusEvents, StatusFeed
from webhookd.ops.status.page import load_page
from webhookd.ops.status.sampler import Sampler

__all__ = ["Sampler", "StatusEvents", "StatusFeed", "load_page"]

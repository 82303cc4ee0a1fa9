"""The status page: what a person on call looks for, live, in a browser.

``page.html`` is all that the browser loads. It then reads a stream of server-sent events (``feed.py``): a
message a second, the same for all viewers, made from differences of the parts' own counters (``sampler.py``).
"""

from webhookd.ops.status.feed import INTERVAL_S, MAX_VIEWERS, StatusEvents, StatusFeed
from webhookd.ops.status.page import load_page
from webhookd.ops.status.rates import Rates, Reading, quantile, rates_between
from webhookd.ops.status.sampler import HISTORY_POINTS, WINDOW_S, Sampler

__all__ = [
    "HISTORY_POINTS",
    "INTERVAL_S",
    "MAX_VIEWERS",
    "WINDOW_S",
    "Rates",
    "Reading",
    "Sampler",
    "StatusEvents",
    "StatusFeed",
    "load_page",
    "quantile",
    "rates_between",
]

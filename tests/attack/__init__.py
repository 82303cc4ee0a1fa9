"""Attacks on a real daemon: tables of requests, each with its required result.

    python -m tests.attack                        # all; prints a table: tried, refused, accepted, 5xx
    python -m tests.attack --only framing,bodies  # some sections
    pytest tests/integration/test_attacks.py      # the short part

Invariants of every section:

* an answer is HTTP with our JSON, never a redirect, and never 5xx except the documented 500;
* there are as many answers as requests, in their order;
* the jobs in Redis are those that were acknowledged, and a worker can read each of them;
* no traceback is logged, and the daemon keeps running.
"""

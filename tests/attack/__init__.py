"""Attacks on a real daemon: what is sent, as tables of values, and what must come of it.

    python -m tests.attack                        # all, and a table: tried, refused, accepted, answered 5xx
    python -m tests.attack --only framing,bodies  # some sections
    pytest tests/integration/test_attacks.py      # the short part

Invariants of every section:

* an answer is HTTP with our JSON, never a redirect, and never 5xx but the documented 500;
* there are as many answers as requests, in their order;
* the jobs in Redis are those that were acknowledged, and each can be read by a worker;
* no traceback is logged, and the daemon lives on.
"""

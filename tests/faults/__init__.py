"""The fault bench: real faults on real servers under constant load, and an oracle that checks all results.

    python -m tests.faults                     # every row of the table, and docs/faults.md
    python -m tests.faults --only R1,P1b       # some rows, printed
    pytest tests/integration/test_faults.py    # the short rows, without a judgement of time

A row (`tests.faults.rows`) defines a fault and the expected result. Its scenario runs on a bench
(`tests.faults.bench`): Redis, replicas of webhookd, and a sender (`tests.faults.load`) in another process.
The sender writes each request and its answer to a ledger (`tests.faults.ledger`). When the fault is over, the
oracle (`tests.faults.oracle`) compares the ledger with Redis and the spools.

The oracle judges these invariants:

    I1  each event that was acknowledged is one job
    I2  no event was added twice
    I3  an event without an answer, sent again, is one job
    I4  p95 under 50 ms if the row demands it, and no answer after 4 s
    I6  each creation lock has a time to live, and a job that was added

Flawed builds (`tests.faults.builds`) test the bench itself: it must catch each of them.
"""

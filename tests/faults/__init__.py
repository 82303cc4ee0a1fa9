"""The fault bench: real faults on real servers under constant load, and an oracle that misses nothing.

    python -m tests.faults                     # every row of the table, and docs/faults.md
    python -m tests.faults --only R1,P1b       # some rows, printed
    pytest tests/integration/test_faults.py    # the short set

A row (`tests.faults.rows`) says what breaks and what must come of it. Its scenario runs on a bench
(`tests.faults.bench`): Redis, replicas of webhookd, and a sender (`tests.faults.load`) in a process of its
own, which writes down in a ledger (`tests.faults.ledger`) what it is about to send and what was answered.
When all is well again, the oracle (`tests.faults.oracle`) compares the ledger with Redis and the spools.

The invariants that it judges:

    I1  each event that was acknowledged is one job
    I2  no event was added twice, whoever repeated it
    I3  an event without an answer, sent once more, is one job
    I4  p95 under 50 ms where a row demands it, and no answer after 4 s
    I6  each creation lock has a time to live, and a job that was added

That the bench bites is shown by flawed builds (`tests.faults.builds`), each of which it must catch.
"""

"""The spool: a durable, bounded FIFO of jobs on local disk, for the times when Redis cannot take them.

Theory of operation
===================

Operations that arrive while the spool's thread is busy wait, and are then done in one SQLite transaction: one
fsync, however many there are. A Deferred fires only after the commit that it was part of.

The spool promises, if the process or the machine dies at any instruction:

* A job whose append fired with ``SPOOLED`` is in the spool exactly once, until it is removed or buried.
* Records leave in the order in which they came, and keep all of their job, its receipt time included.
* A queue and job id is in the spool at most once; a second append answers ``ALREADY_QUEUED``.
* An append that failed may be there after all, once (the disk took it and could not report it).
* A damaged record costs that record, not the rest: it is set aside and counted. A damaged file is kept for
  inspection, and what can be read of it is carried over into a new one.
* A directory is drained only by the process that holds its lock.

The caller must:

* Remove a record only after Redis has acknowledged its job. A crash in between drains it a second time, so
  the adding must be idempotent: it is, by job id, within the dedup window.
* Look for orphans from time to time (`Spools.claim_orphan`), drain each like its own spool, and close it.
* Call `Spool.expire_dead` from time to time, close each spool, and only then stop the `SpoolThread`.

The crash windows of one event, and what makes each harmless:

* Before the commit: the sender has no answer, and nothing is there.
* Between commit and answer: the record is there, and a repeated request finds it by its id.
* Between Redis' acknowledgement and the removal's commit: the job is sent again, and the script drops it.

After a failure (disk full, read-only, I/O error), appends fail with `SpoolUnavailable`, and the next group
tries again, on a newly opened file if the old one can no longer be trusted. Nothing has to be restarted.
"""
